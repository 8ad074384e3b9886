"""Is the worker to end, why, and by when?"""

import asyncio

from arriero.contracts.errors import ArrieroError
from arriero.runtime.tasks import Changed


class Ending:
    """The one wish to end; later wishes can only make it sooner."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._requested = asyncio.Event()
        self._changed = Changed()
        #: Why; empty until somebody asked.
        self.reason = ""
        #: Set when the worker cannot go on: it ends as failed, at once.
        self.error: ArrieroError | None = None
        self._deadline_s: float | None = None

    @property
    def is_requested(self) -> bool:
        """Whether somebody asked."""
        return self._requested.is_set()

    def drain(self, reason: str, *, grace_s: float | None) -> None:
        """Ask to end when the running requests have; after `grace_s` (None: no limit) they are cancelled."""
        self.reason = self.reason or reason
        if grace_s is not None:
            until_s = self._loop.time() + grace_s
            self._deadline_s = until_s if self._deadline_s is None else min(self._deadline_s, until_s)
        self._requested.set()
        self._changed.notify()

    def fail(self, error: ArrieroError) -> None:
        """Say that the worker cannot go on; the first error counts."""
        self.error = self.error or error
        self.drain(str(error.code), grace_s=0.0)

    async def requested(self) -> None:
        """Wait, without a limit, until somebody asks."""
        await self._requested.wait()

    async def out_of_grace(self) -> None:
        """Wait until the time for the running requests is over; it may still be shortened."""
        while True:
            left_s = None if self._deadline_s is None else self._deadline_s - self._loop.time()
            if left_s is not None and left_s <= 0:
                return
            try:
                async with asyncio.timeout(left_s):
                    await self._changed.wait()
            except TimeoutError:
                return
