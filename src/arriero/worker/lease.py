"""Is there still an agent that looks after this worker?"""

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from arriero.runtime import processes
from arriero.runtime.clock import Clock
from arriero.runtime.processes import Identity

#: Header of the agent's polls: its pid and when that started, `PID:TICKS`.
HEADER: Final = b"x-arriero-lease"
_LOOK_S_MAX: Final = 0.5


class Lease:
    """Renewed by the agent's polls, and for as long as it holds the state stream.

    A lease of 0 s lasts exactly as long as the agent's process.  A worker that was started by hand
    (`is_owned` false) has no lease until somebody renews it.
    """

    def __init__(self, lease_s: float, clock: Clock, *, is_owned: bool) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._renewed_s: float | None = clock.monotonic_s() if is_owned else None
        self._agent: Identity | None = processes.identity(os.getppid()) if is_owned else None
        self._holders = 0
        #: Whether an agent has shown that it knows this worker.
        self.is_known = False

    def renew(self, header: bytes) -> None:
        """Take a sign of the agent; a header that is not well formed is one as well."""
        self._renewed_s = self._clock.monotonic_s()
        pid, _, ticks = header.partition(b":")
        if pid.isdigit() and ticks.isdigit() and len(header) <= 40:
            self._agent = Identity(int(pid), int(ticks), processes.boot_id())
        self.is_known = True

    @contextlib.contextmanager
    def held(self, header: bytes) -> Iterator[None]:
        """Keep the lease from running out for as long as this is open."""
        self.renew(header)
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            self.renew(header)

    def is_over(self) -> bool:
        """Return whether the worker has been without its agent for too long."""
        if self._renewed_s is None:
            return False
        if self._lease_s == 0:
            return self._agent is None or not processes.is_alive(self._agent)
        return not self._holders and self._clock.monotonic_s() - self._renewed_s >= self._lease_s

    async def wait_over(self) -> None:
        """Wait, without a limit, until the lease is over."""
        while not self.is_over():
            await self._clock.sleep_s(min(_LOOK_S_MAX, max(self._lease_s / 4, 0.05)))
