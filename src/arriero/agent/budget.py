"""What do all downloads of this machine share?  The rate of the line, and the room on the disk."""

import shutil
from pathlib import Path

from arriero.agent.files import disk_error, in_thread, no_room
from arriero.domain.token_bucket import TokenBucket
from arriero.runtime.clock import Clock

#: So much of a second may come at once before the cap is felt.
_BURST_S = 0.25


class Budget:
    """One for an agent, handed to every fetch.  A rate of 0 is no cap."""

    def __init__(self, clock: Clock, rate_bytes_per_s: float = 0.0) -> None:
        self._clock = clock
        self._bucket = (
            TokenBucket(rate_bytes_per_s, rate_bytes_per_s * _BURST_S) if rate_bytes_per_s > 0 else None
        )
        self._reservations: list[Reservation] = []

    async def spend(self, count: int) -> None:
        """Wait as long as the cap demands after `count` bytes came."""
        if self._bucket is None:
            return
        wait_s = self._bucket.take(count, self._clock.monotonic_s())
        if wait_s > 0:
            await self._clock.sleep_s(wait_s)

    def reserve(self, folder: Path, later_bytes: int = 0) -> "Reservation":
        """Return a reservation on the disk of `folder`, of `later_bytes` so far; end it with `release()`."""
        reservation = Reservation(self, folder, later_bytes)
        self._reservations.append(reservation)
        return reservation

    def before(self, reservation: "Reservation") -> int:
        """Return the bytes that older reservations still need: whoever came first goes first."""
        place = self._reservations.index(reservation)
        return sum(other.needed_bytes for other in self._reservations[:place])

    def drop(self, reservation: "Reservation") -> None:
        """Forget a reservation."""
        if reservation in self._reservations:
            self._reservations.remove(reservation)


class Reservation:
    """The room that one download still needs.  Bytes that were written are no longer part of it."""

    def __init__(self, budget: Budget, folder: Path, later_bytes: int) -> None:
        self._budget = budget
        self._folder = folder
        self._free_bytes: int | None = None
        self._now_bytes = 0
        self._later_bytes = later_bytes

    @property
    def needed_bytes(self) -> int:
        """What is still to come, as far as anybody knows."""
        return self._now_bytes + self._later_bytes

    async def measure(self) -> None:
        """Look how much room the disk has.  Raises STATE_DIR_UNUSABLE."""
        try:
            usage = await in_thread(lambda: shutil.disk_usage(self._folder))
        except OSError as error:
            raise disk_error(error, "its room was measured") from error
        self._free_bytes = usage.free

    def note(self, now_bytes: int) -> None:
        """Say how much of the present file is still to come; 0 where nobody knows."""
        self._now_bytes = now_bytes

    def check(self) -> None:
        """Hold what is needed against the room last measured.

        Raises INSUFFICIENT_DISK (details: required, available, shortfall) if that is too little,
        what older downloads still need counted as taken.
        """
        if self._free_bytes is None:
            return
        others_bytes = self._budget.before(self)
        if self.needed_bytes + others_bytes > self._free_bytes:
            raise no_room(self.needed_bytes, self._free_bytes, others_bytes)

    def release(self) -> None:
        """Give the room back; safe to call twice."""
        self._budget.drop(self)
