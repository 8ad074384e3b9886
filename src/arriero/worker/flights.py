"""Which requests are on their way, and how is one ended from outside?"""

import asyncio
import contextlib
from collections.abc import Iterator
from types import TracebackType
from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.runtime.attention import Attention
from arriero.runtime.tasks import Changed

#: So long a canceller waits for the engine to have stopped: more than one batch of a prompt.
CANCEL_WAIT_S: Final = 10.0


class Flight:
    """One request on its way.

    Used as `async with flight:` around the work: `interrupt(error)` makes the work raise `error`
    at the place where it waits, after its cleanup ran.  Built like `asyncio.timeout`: a
    cancellation from elsewhere stays one.
    """

    def __init__(self, request_id: str, fence: int | None = None) -> None:
        self.request_id = request_id
        #: The number that it came under, see `contracts.fence`.
        self.fence = fence
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}
        #: Why it was interrupted; None if it was not.
        self.error: ArrieroError | None = None
        self.is_client_gone = False
        #: When the engine was last heard of, on the loop's clock.
        self.heard_s = 0.0

    async def __aenter__(self) -> "Flight":
        if self.error is not None:
            raise self.error
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        for timer in self._timers.values():
            timer.cancel()
        assert task is not None
        if self.error is not None and task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise self.error from error

    def interrupt(self, error: ArrieroError) -> None:
        """End the work with `error`; the first reason counts, later ones change nothing."""
        if self.error is not None:
            return
        self.error = error
        if self._task is not None:
            self._task.cancel()

    def end_at(self, when_s: float, error: ArrieroError) -> None:
        """Interrupt at that time of the loop's clock."""
        self._timers["deadline"] = self._loop.call_at(when_s, self.interrupt, error)

    def watch_stall(self, stall_s: float, attention: Attention) -> None:
        """From now on, interrupt with STREAM_STALLED when the engine was not heard of for so long.

        Time in which this process stood still, as `attention` knows, is none of the engine's silence.
        One timer that looks at `heard_s` when it fires, so that a token costs nothing but a number.
        """
        self.heard_s = self._loop.time()
        known_s = attention.away_s()

        def look() -> None:
            nonlocal known_s
            missed_s, known_s = attention.away_s() - known_s, attention.away_s()
            due_s = self.heard_s + stall_s + missed_s
            if self._loop.time() < due_s:
                self._timers["stall"] = self._loop.call_at(due_s, look)
                return
            self.interrupt(
                ArrieroError(
                    ErrorCode.STREAM_STALLED,
                    f"no token for {stall_s:g} s, which is the limit",
                    stall_s=stall_s,
                )
            )

        self._timers["stall"] = self._loop.call_at(self.heard_s + stall_s, look)


class Flights:
    """All requests on their way, by id."""

    def __init__(self) -> None:
        self._flights: dict[str, Flight] = {}
        self._changed = Changed()

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(list(self._flights.values()))

    @contextlib.contextmanager
    def open(self, request_id: str, fence: int | None = None) -> Iterator[Flight]:
        """Hold an id as long as its request is on its way.  Raises REQUEST_ID_IN_USE if it is held."""
        if request_id in self._flights:
            raise ArrieroError(
                ErrorCode.REQUEST_ID_IN_USE,
                f"request {request_id} is in flight already",
                request_id=request_id,
            )
        flight = self._flights[request_id] = Flight(request_id, fence)
        try:
            yield flight
        finally:
            del self._flights[request_id]
            self._changed.notify()

    async def cancel(self, request_id: str, error: ArrieroError) -> bool:
        """End a request and wait until its work has stopped and its slot is free.

        Returns whether there was one.  Waits `CANCEL_WAIT_S` at most.
        """
        flight = self._flights.get(request_id)
        if flight is None:
            return False
        flight.interrupt(error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_WAIT_S):
                while self._flights.get(request_id) is flight:
                    await self._changed.wait()
        return True

    def interrupt_all(self, error: ArrieroError) -> None:
        """End every request."""
        for flight in self._flights.values():
            flight.interrupt(error)

    async def wait_empty(self) -> None:
        """Wait, without a limit, until no request is on its way."""
        while self._flights:
            await self._changed.wait()
