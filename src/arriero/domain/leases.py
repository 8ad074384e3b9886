"""Who may hold a node, and whose requests does it still answer?  (Fencing numbers.)

The number of a node's lease only rises, whoever holds it.  A holder that was cut off and comes back
with its old number finds that it was given away; one that was silent for long enough makes room for
another, which needs a larger number as well.
"""

from dataclasses import dataclass
from typing import Final

from arriero.contracts.fence import FENCE_NUMBER_MAX, Fence

NEVER: Final = Fence("", 0)


@dataclass(frozen=True, slots=True)
class Lease:
    """A node's lease as it is now."""

    #: Of the newest holder; `NEVER`: nobody has held this node yet.
    fence: Fence = NEVER
    #: How long ago the holder's event stream was last open; 0 while it is.
    silent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Granted:
    """It may."""

    #: A new number begins: whatever runs under smaller ones is over.
    is_new: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """It may not."""

    why: str


def may_hold(lease: Lease, asked: Fence, *, silence_max_s: float) -> Granted | Refused:
    """Decide whether who opens the event stream holds the node from now on."""
    if asked == lease.fence:
        return Granted()
    if asked.holder != lease.fence.holder and lease.fence != NEVER and lease.silent_s < silence_max_s:
        return Refused("another orchestrator holds the node")
    if asked.number <= lease.fence.number:
        return Refused("a newer connection, or another orchestrator, has taken the node over")
    return Granted(is_new=True)


def may_ask(lease: Lease, asked: Fence, *, silence_max_s: float) -> Granted | Refused:
    """Decide whether any other request is answered: the holder's, under the newest number or a later one.

    Where the holder has been silent for long enough, another's is, too: it asks before it takes over.
    """
    if asked.number < lease.fence.number:
        return Refused("a newer connection, or another orchestrator, has taken the node over")
    is_anothers = lease.fence != NEVER and asked.holder != lease.fence.holder
    if is_anothers and (lease.silent_s < silence_max_s or asked.number == lease.fence.number):
        return Refused("another orchestrator holds the node")
    return Granted()


def next_number(own: int, refused_at: int = 0) -> int:
    """Return the number for a holder's next connection.

    `own`: the last one it used; `refused_at`: the node's, as the refusal told it, where another has held it.
    Raises OverflowError when there are no more, after more connections than a node will ever see.
    """
    number = max(own, refused_at) + 1
    if number > FENCE_NUMBER_MAX:
        raise OverflowError("no more fencing numbers")
    return number
