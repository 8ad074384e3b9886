"""Is a request still one of the orchestrator that holds this node now?  (`X-Arriero-Fence`)"""

from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.fence import FENCE_HEADER, Fence

HEADER: Final = FENCE_HEADER.lower().encode()


class Fencing:
    """The newest number of the node, as the agent told it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def admit(self, header: bytes) -> int | None:
        """Return the number that a request came under; None if it says none: it is of this machine.

        Raises LEASE_SUPERSEDED for one from before the newest, INVALID_REQUEST.
        """
        if not header:
            return None
        number = Fence.parse(header.decode("latin-1")).number
        self.check(number)
        return number

    def check(self, number: int | None) -> None:
        """Raise LEASE_SUPERSEDED if `number` is from before the newest."""
        if number is not None and number < self.number:
            raise superseded(number, self.number)

    def rise(self, number: int) -> bool:
        """Take a number; return whether it is newer than what was known."""
        is_newer = number > self.number
        self.number = max(number, self.number)
        return is_newer


def superseded(number: int, newest: int) -> ArrieroError:
    """Return what is told of a request whose number is not the newest any more."""
    return ArrieroError(
        ErrorCode.LEASE_SUPERSEDED,
        f"the node was taken over under number {newest} since this request came, under {number}",
        number=newest,
    )
