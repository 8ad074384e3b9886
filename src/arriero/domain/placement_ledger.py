"""What memory of a node is on its way to or from a worker, and not in what its agent told last?

An agent tells what is free once a second.  What was given away since then must not be given away
twice, and what came free since then need not be waited for.
"""

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Movement:
    """Memory of one device that is taken (positive) or given back (negative), in MiB."""

    node: str
    device: str
    memory_mb: int
    #: Beats until its agent counts it; None while its agent does not know of it.
    beats_left: int | None = None
    #: The worker that it was taken for, once there is one.
    worker_id: str = ""


class Ledger:
    """The movements of a pool."""

    def __init__(self) -> None:
        self._movements: dict[str, list[Movement]] = {}

    def take(self, node: str, device: str, memory_mb: int) -> Movement:
        """Reserve memory for a worker that is being made."""
        movement = Movement(node, device, memory_mb)
        self._movements.setdefault(node, []).append(movement)
        return movement

    def gave_back(self, node: str, device: str, memory_mb: int) -> None:
        """Note that a worker ended, as its agent told."""
        if memory_mb > 0:
            self._movements.setdefault(node, []).append(Movement(node, device, -memory_mb, beats_left=1))

    def cancel(self, movement: Movement) -> None:
        """Take a reservation back; safe to call twice."""
        here = self._movements.get(movement.node, [])
        if movement in here:
            here.remove(movement)
        if not here:
            self._movements.pop(movement.node, None)

    def made(self, movement: Movement, worker_id: str, *, is_told: bool) -> None:
        """Note which worker was made; `is_told`: its agent told of it already.

        What an agent tells comes in order: a beat after its first word of a worker counts what that takes,
        one before it was on its way already.
        """
        movement.worker_id = worker_id
        movement.beats_left = 1 if is_told else 2

    def told(self, node: str, worker_id: str) -> None:
        """Take note that an agent told of a worker: the next beat counts it."""
        for movement in self._movements.get(node, []):
            if movement.worker_id == worker_id:
                movement.beats_left = 1

    def beat(self, node: str) -> None:
        """Take note that a node told what is free: what its agent knew of is in that."""
        left = []
        for movement in self._movements.get(node, []):
            if movement.beats_left is not None:
                movement.beats_left -= 1
            if movement.beats_left != 0:
                left.append(movement)
        if left:
            self._movements[node] = left
        else:
            self._movements.pop(node, None)

    def is_empty(self, node: str) -> bool:
        """Whether nothing of a node is on its way."""
        return node not in self._movements

    def taken(self, node: str) -> list[Movement]:
        """Return the reservations on a node."""
        return [movement for movement in self._movements.get(node, []) if movement.memory_mb > 0]

    def of(self, node: str) -> dict[str, int]:
        """Return by device what is not free any more, less what came free."""
        found: dict[str, int] = {}
        for movement in self._movements.get(node, []):
            found[movement.device] = found.get(movement.device, 0) + movement.memory_mb
        return found
