"""Which request computes now, which one waits as number what, which one is refused?

Pure: whoever holds it tells it of arrivals and departures, and acts on the answers.
"""

from dataclasses import dataclass
from typing import Final, TypeAlias

from arriero.contracts.errors import ErrorCode


@dataclass(frozen=True, slots=True)
class Start:
    """A slot is free: compute at once."""


@dataclass(frozen=True, slots=True)
class Wait:
    """All slots compute: wait as number `position`, counted from 1."""

    position: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """Not taken; nothing has changed."""

    code: ErrorCode
    message: str


Decision: TypeAlias = Start | Wait | Refuse
START: Final = Start()


class Admission:
    """Slots and a bounded queue, first come first served.

    Never more requests compute than there are slots; nobody waits while a slot is free.
    """

    def __init__(self, *, slots: int, queue_max: int) -> None:
        assert slots >= 1 and queue_max >= 0
        self.slots: Final = slots
        self.queue_max: Final = queue_max
        self._computing: set[str] = set()
        # A dict keeps the order of arrival and finds a request that gives up in no time.
        self._waiting: dict[str, None] = {}

    @property
    def busy(self) -> int:
        """How many slots compute."""
        return len(self._computing)

    @property
    def queued(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._computing or request_id in self._waiting

    def arrive(self, request_id: str, *, may_queue: bool = True) -> Decision:
        """Take a request in, or refuse it.

        Refuses with REQUEST_ID_IN_USE an id that is inside already, with ALL_SLOTS_BUSY one that
        may not queue, with QUEUE_FULL one for which there is no room.
        """
        if request_id in self:
            return Refuse(ErrorCode.REQUEST_ID_IN_USE, f"request {request_id} is in flight already")
        if len(self._computing) < self.slots:
            self._computing.add(request_id)
            return START
        if not may_queue:
            return Refuse(
                ErrorCode.ALL_SLOTS_BUSY,
                f"all {self.slots} slots compute, {self.queued} requests wait, and the request may not",
            )
        if len(self._waiting) >= self.queue_max:
            return Refuse(
                ErrorCode.QUEUE_FULL,
                f"all {self.slots} slots compute, {self.queued} requests wait, the limit is {self.queue_max}",
            )
        self._waiting[request_id] = None
        return Wait(len(self._waiting))

    def leave(self, request_id: str) -> str | None:
        """Let a request go, whether it computed or waited; return the one that starts now in its place.

        Safe to call twice: an unknown id changes nothing.
        """
        if request_id in self._waiting:
            del self._waiting[request_id]
            return None
        if request_id not in self._computing:
            return None
        self._computing.remove(request_id)
        following = next(iter(self._waiting), None)
        if following is not None:
            del self._waiting[following]
            self._computing.add(following)
        return following

    def positions(self) -> dict[str, int]:
        """Return who waits as number what, counted from 1, in order."""
        return {request_id: number for number, request_id in enumerate(self._waiting, start=1)}
