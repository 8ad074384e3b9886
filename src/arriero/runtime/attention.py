"""Is somebody silent, or did we not listen?  (`Attention`)

A process that was stopped, or whose machine was (a virtual machine that is moved, a laptop that
swaps), finds all of its time limits passed when it goes on, and what came meanwhile unread.  The
time in which it stood still is nobody's silence.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Final, TypeVar

T = TypeVar("T")

#: A look is due so often while anybody waits within a limit.
LOOK_EVERY_S: Final = 0.25
#: One that comes so much later than the one before shows that we stood still; less is a busy machine.
STOOD_STILL_S: Final = 0.75


class Attention:
    """Knows for how long this process has stood still; of one event loop."""

    def __init__(self) -> None:
        self._away_s = 0.0
        self._looked_s = 0.0
        self._waiting = 0
        self._next: asyncio.TimerHandle | None = None

    def away_s(self) -> float:
        """Return for how long it has stood still, of the time in which anybody was `watching`."""
        if self._waiting:
            now_s = asyncio.get_running_loop().time()
            gap_s, self._looked_s = now_s - self._looked_s, now_s
            if gap_s >= STOOD_STILL_S:
                # It may have gone on until the look that was due.
                self._away_s += gap_s - LOOK_EVERY_S
        return self._away_s

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Notice, while this is open, for how long this process stands still."""
        loop = asyncio.get_running_loop()
        self._waiting += 1
        if self._waiting == 1:
            self._looked_s = loop.time()
        if self._next is None:
            self._next = loop.call_later(LOOK_EVERY_S, self._look)
        try:
            yield
        finally:
            self._waiting -= 1

    @contextlib.asynccontextmanager
    async def within(self, limit_s: float) -> AsyncIterator[None]:
        """Do something in `limit_s` of the time in which this process does not stand still.

        Raises TimeoutError.
        """
        loop = asyncio.get_running_loop()
        known_s = 0.0
        timer: asyncio.TimerHandle | None = None

        def due() -> None:
            nonlocal known_s, timer
            missed_s, known_s = self.away_s() - known_s, self.away_s()
            if missed_s > 0:
                timer = loop.call_later(missed_s, due)
            else:
                limit.reschedule(loop.time())

        try:
            with self.watching():
                known_s = self.away_s()
                async with asyncio.timeout(None) as limit:
                    timer = loop.call_later(limit_s, due)
                    yield
        finally:
            if timer is not None:
                timer.cancel()

    async def patiently(self, attempt: Callable[[], Awaitable[T]], limit_s: float) -> T:
        """Return what `attempt` gives, as `within` a limit, for next to nothing where it is soon there.

        It is cancelled and called again after this process stood still, so it must lose nothing by that; who
        calls is `watching`.  Raises TimeoutError.
        """
        known_s = self.away_s()
        while True:
            try:
                async with asyncio.timeout(limit_s):
                    return await attempt()
            except TimeoutError:
                missed_s, known_s = self.away_s() - known_s, self.away_s()
                if missed_s <= 0:
                    raise
                limit_s = missed_s

    def _look(self) -> None:
        self.away_s()
        # It ends by itself: whoever reads a stream waits again in the next moment.
        self._next = (
            asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look) if self._waiting else None
        )
