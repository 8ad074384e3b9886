"""How does any computing request go from arrival to its end: admitted, limited, cancelled, answered?

Tasks and timers are made once a request, never once a token.
"""

import asyncio
import contextlib
from abc import ABC, abstractmethod
from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.runtime import logs, sse
from arriero.runtime.asgi import BEAT_S, Receive, Scope, Send, error_bytes, send_error
from arriero.worker.core import Core
from arriero.worker.flights import Flight
from arriero.worker.web import Request

#: A client that does not read is told of the end for so long.
_TELL_S: Final = 5.0
_STREAM_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class AdmittedRequest(ABC):
    """An ASGI application that answers one request with what is computed for it in a slot.

    A stream's head goes out with the first of: a place in the queue, the first thing computed,
    `head_after_s`.  What fails before that gets its HTTP status.
    """

    def __init__(
        self,
        core: Core,
        request: Request,
        *,
        is_stream: bool,
        timeout_s: float | None = None,
        may_queue: bool = True,
        head_after_s: float = BEAT_S,
    ) -> None:
        self._core = core
        self._request_id = request.request_id
        self._fence = request.fence
        self._arrived_s = request.arrived_s
        self._deadline_s = request.deadline_s(timeout_s)
        self._is_stream = is_stream
        self._may_queue = may_queue
        self._head_after_s = head_after_s
        self._is_started = False
        self._sent_s = request.arrived_s

    @abstractmethod
    async def check(self) -> None:
        """Raise what is wrong with the request, before it takes a place."""

    @abstractmethod
    async def compute(self, flight: Flight, send: Send) -> None:
        """Do the work, in a slot.  When this returns or raises, nothing computes any more."""

    @abstractmethod
    def closing(self, duration_ms: int) -> bytes:
        """Return the stream's last frames, or the whole body of an answer at once."""

    def opening(self) -> bytes:
        """Return a stream's first frame."""
        return b""

    def queued(self, position: int) -> bytes:
        """Return what a stream says when the place in the queue has changed."""
        return b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer.  Whatever happens, the engine's work has stopped and the slot is free at the end.

        Raises REQUEST_ID_IN_USE, LEASE_SUPERSEDED.
        """
        core = self._core
        error: ArrieroError | None = None
        # While the body came the node may have been taken over.
        core.fencing.check(self._fence)
        with core.flights.open(self._request_id, self._fence) as flight:
            if self._deadline_s is not None:
                flight.end_at(self._deadline_s, self._too_late(self._deadline_s))
            async with asyncio.TaskGroup() as group:
                side = [group.create_task(_watch_client(receive, flight), name="client-watch")]
                if self._is_stream:
                    side.append(group.create_task(self._beat(send), name="stream-beat"))
                try:
                    async with flight:
                        await self._in_slot(flight, send)
                except ArrieroError as met:
                    error = met if met is flight.error else await core.host.explain(met)
                except Exception:  # noqa: BLE001  The edge: the client is told, the log has the traceback.
                    logs.get("arriero.worker").exception(
                        "request_failed", request_id=self._request_id, path=scope["path"]
                    )
                    error = ArrieroError(ErrorCode.INTERNAL_ERROR)
                finally:
                    for task in side:
                        task.cancel()
        self._note(error)
        if not flight.is_client_gone:
            await self._end(scope["path"], send, error)

    def _note(self, error: ArrieroError | None) -> None:
        """Count the end; what did not end well is a line in the log."""
        self._core.metrics.ended(None if error is None else error.code)
        if error is not None:
            logs.get("arriero.worker").info(
                "request_ended",
                request_id=self._request_id,
                code=str(error.code),
                duration_ms=round((self._core.now_s() - self._arrived_s) * 1000),
            )

    def _too_late(self, deadline_s: float) -> ArrieroError:
        limit_ms = round((deadline_s - self._arrived_s) * 1000)
        return ArrieroError(
            ErrorCode.REQUEST_TIMEOUT,
            f"the request's deadline passed, after {limit_ms} ms in the worker",
            layer="worker",
            timeout_ms=limit_ms,
        )

    async def _in_slot(self, flight: Flight, send: Send) -> None:
        core = self._core
        core.lifecycle.check_takes_requests()
        await self.check()
        # The engine may have gone meanwhile: look again, with no await from here to `arrive`.
        core.lifecycle.check_takes_requests()
        ticket = core.slots.arrive(self._request_id, may_queue=self._may_queue)
        try:
            position = ticket.position
            while position:
                if self._is_stream:
                    await self._start(send)
                    await self._send(send, self.queued(position))
                position = await ticket.moved(position)
            with core.attention.watching():
                flight.watch_stall(core.spec.stall_s, core.attention)
                await self.compute(flight, send)
        finally:
            core.slots.leave(ticket)

    # --- the way out ---------------------------------------------------------------------------

    async def _start(self, send: Send) -> None:
        """Send a stream's head and its opening, the first time."""
        if self._is_started:
            return
        # Set, and rendered, before the first await: the beat must not start the stream a second time.
        self._is_started = True
        opening = self.opening()
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await self._send(send, opening)

    async def _send(self, send: Send, frame: bytes) -> None:
        if frame:
            self._sent_s = self._core.now_s()
            await send({"type": "http.response.body", "body": frame, "more_body": True})

    async def _beat(self, send: Send) -> None:
        """Send the stream's head when it is time, and a comment whenever nothing else went out."""
        core = self._core
        await core.clock.sleep_s(self._head_after_s)
        await self._start(send)
        while True:
            silent_s = core.now_s() - self._sent_s
            if silent_s >= BEAT_S:
                await self._send(send, sse.comment("beat"))
                silent_s = 0.0
            await core.clock.sleep_s(BEAT_S - silent_s)

    async def _end(self, path: str, send: Send, error: ArrieroError | None) -> None:
        """Send the last bytes; a client that does not read them within `_TELL_S` goes without."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TELL_S):
                if error is None:
                    await self._close(send)
                elif not self._is_started:
                    await send_error(send, error, path=path)
                else:
                    frame = sse.encode(error_bytes(error, path=path), event="error")
                    await send({"type": "http.response.body", "body": frame})

    async def _close(self, send: Send) -> None:
        if self._is_stream:
            await self._start(send)  # Where nothing at all was computed, the head is still to go.
        content = self.closing(round((self._core.now_s() - self._arrived_s) * 1000))
        if not self._is_stream:
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})


async def _watch_client(receive: Receive, flight: Flight) -> None:
    """Interrupt the request when its client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    flight.is_client_gone = True
    flight.interrupt(ArrieroError(ErrorCode.REQUEST_CANCELLED, "the client went away"))
