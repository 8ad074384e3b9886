"""When does a loaded model have to make room for one that waits?

A loaded model keeps its place while it has requests, so that two models that are asked for in turn
do not chase each other out; and no model that waits, waits for ever: after the starvation limit no
new request goes to the loaded one, what it computes ends, and the other has its turn.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Turn(StrEnum):
    """What a model that waits for room does now."""

    #: Nothing computes there: stop it.
    GO = "go"
    #: It had its time: give it no new request, stop it when nothing computes any more.
    CLOSE = "close"
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class Place:
    """A worker that would make room."""

    #: Requests that are with it, those in its queue counted.
    requests: int
    #: Since its last request ended, or since it was loaded.
    quiet_s: float
    #: Since it was loaded.
    resident_s: float


@dataclass(frozen=True, slots=True)
class TurnLimits:
    """How long one waits for the other, in seconds."""

    #: A model that waits has its turn after so long at the latest; as long each loaded model may stay.
    starvation_s: float
    #: A model without requests is still kept for so long: the next one is often on its way.
    linger_s: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do, and after how many seconds to ask again at the latest where that is to wait."""

    turn: Turn
    again_s: float


def limits_of(starvation_s: float) -> TurnLimits:
    """Return the limits that go with a starvation limit."""
    return TurnLimits(starvation_s=starvation_s, linger_s=min(1.0, starvation_s / 4))


def turn(places: Iterable[Place], waited_s: float, limits: TurnLimits) -> Verdict:
    """Decide for the model that has waited longest among those that want these places.

    A model that was loaded a moment ago is not starved by one that has waited for hours: it has its
    time first, so that what waited for it is computed.  So there is no more than one swap in
    `starvation_s` as long as the loaded models have requests.
    """
    held = list(places)
    starved_s = min([waited_s, *(place.resident_s for place in held)])
    is_starved = starved_s >= limits.starvation_s
    if all(place.requests == 0 for place in held):
        quiet_s = min((place.quiet_s for place in held), default=limits.linger_s)
        if is_starved or quiet_s >= limits.linger_s:
            return Verdict(Turn.GO, 0.0)
        return Verdict(Turn.WAIT, min(limits.linger_s - quiet_s, limits.starvation_s - starved_s))
    if is_starved:
        return Verdict(Turn.CLOSE, 0.0)
    return Verdict(Turn.WAIT, limits.starvation_s - starved_s)
