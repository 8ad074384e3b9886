"""Who computes and who waits in this worker?  (The deciding is `domain.admission`.)"""

from collections.abc import Callable

from arriero.contracts.errors import ArrieroError
from arriero.domain.admission import Admission, Refuse, Wait
from arriero.runtime.tasks import Changed


class Ticket:
    """One request's place."""

    def __init__(self, request_id: str, position: int) -> None:
        self.request_id = request_id
        #: Number in the queue, counted from 1; 0: a slot is ours.
        self.position = position
        self._changed = Changed()

    async def moved(self, seen: int) -> int:
        """Wait until the position is another than `seen`, and return it."""
        while self.position == seen:
            await self._changed.wait()
        return self.position

    def move(self, position: int) -> None:
        """Give another position, and tell who waits."""
        if position != self.position:
            self.position = position
            self._changed.notify()


class Slots:
    """The slots of a worker and the queue before them.  `on_change` hears of every change."""

    def __init__(self, *, slots: int, queue_max: int, on_change: Callable[[], None]) -> None:
        self._admission = Admission(slots=slots, queue_max=queue_max)
        self._tickets: dict[str, Ticket] = {}
        self._on_change = on_change

    @property
    def total(self) -> int:
        """How many slots there are."""
        return self._admission.slots

    @property
    def busy(self) -> int:
        """How many compute."""
        return self._admission.busy

    @property
    def queued(self) -> int:
        """How many requests wait."""
        return self._admission.queued

    @property
    def is_full(self) -> bool:
        """Whether the next request has to wait."""
        return self._admission.busy >= self._admission.slots

    def arrive(self, request_id: str, *, may_queue: bool = True) -> Ticket:
        """Return the request's ticket; its holder calls `leave`, however it ends.

        Raises ALL_SLOTS_BUSY, QUEUE_FULL or REQUEST_ID_IN_USE.
        """
        decision = self._admission.arrive(request_id, may_queue=may_queue)
        if isinstance(decision, Refuse):
            raise ArrieroError(
                decision.code,
                decision.message,
                slots=self.total,
                slots_busy=self.busy,
                queued=self.queued,
                queue_max=self._admission.queue_max,
            )
        ticket = Ticket(request_id, decision.position if isinstance(decision, Wait) else 0)
        self._tickets[request_id] = ticket
        self._on_change()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Give the slot or the place back; the next one starts at once.  Safe to call twice."""
        if self._tickets.get(ticket.request_id) is not ticket:
            return
        del self._tickets[ticket.request_id]
        following = self._admission.leave(ticket.request_id)
        if following is not None:
            self._tickets[following].move(0)
        for request_id, position in self._admission.positions().items():
            self._tickets[request_id].move(position)
        self._on_change()
