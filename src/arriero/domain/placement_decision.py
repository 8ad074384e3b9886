"""What is done so that a new worker has a place, of all that could be?

The order in which the ways are tried, and nothing else: each way is looked for only where those before
it lead nowhere.  Doing it and foretelling it go by the same answer.
"""

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from arriero.domain.placement_eviction import ANY, IDLE_ONLY, READY_ONES, Eviction, Stage
from arriero.domain.placement_memory import Needed
from arriero.domain.placement_nodes import NodeView
from arriero.domain.placement_turns import Turn, Verdict


@dataclass(frozen=True, slots=True)
class Fit:
    """A node has room."""

    node: NodeView
    #: None: not known.
    needed_mb: int | None
    #: With less context than the model could have.
    is_reduced: bool = False


@dataclass(frozen=True, slots=True)
class Evict:
    """Workers go, now or when the verdict lets them."""

    plan: Eviction
    needed_mb: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Hold:
    """Workers are waited for that load or end by themselves."""

    plan: Eviction
    needed_mb: int


@dataclass(frozen=True, slots=True)
class Wake:
    """A machine that sleeps is woken."""

    node: NodeView


#: None: nothing helps.
Decision: TypeAlias = Fit | Evict | Hold | Wake | None


class Ways(Protocol):
    """What is looked at, for one model that wants a place."""

    def best(self, needed_mb: int | None) -> NodeView | None:
        """Return the node that has room."""
        ...

    def plan(self, needed_mb: int, stages: frozenset[Stage]) -> Eviction | None:
        """Return which workers would have to go, of those in these stages."""
        ...

    def verdict(self, plan: Eviction) -> Verdict:
        """Return whether they may go now."""
        ...

    def sleeper(self, needed_mb: int | None) -> NodeView | None:
        """Return the machine that would be woken."""
        ...


def decide(ways: Ways, needed: Needed | None, *, may_wait: bool = True) -> Decision:
    """Decide.

    Room that is there, then room that idle workers make; then with less context; then, where
    `may_wait`, room that is made by those that compute, or a machine that is woken, whichever comes
    sooner; then all of these again for the least context.
    """
    if needed is None:
        if (node := ways.best(None)) is not None:
            return Fit(node, None)
        return _wake(ways, None) if may_wait else None
    if (node := ways.best(needed.full_mb)) is not None:
        return Fit(node, needed.full_mb)
    if (idle := _evict(ways, needed.full_mb, IDLE_ONLY)) is not None:
        return idle
    has_less = needed.least_mb < needed.full_mb
    if has_less and (node := ways.best(needed.least_mb)) is not None:
        return Fit(node, needed.least_mb, is_reduced=True)
    if not may_wait:
        return _evict(ways, needed.least_mb, IDLE_ONLY) if has_less else None
    later = _later(ways, needed.full_mb)
    if later is not None or not has_less:
        return later
    return _evict(ways, needed.least_mb, IDLE_ONLY) or _later(ways, needed.least_mb)


def _later(ways: Ways, needed_mb: int) -> Decision:
    """Return room that those make that compute, or a machine that is woken, whichever comes sooner."""
    wait = _wait(ways, needed_mb)
    if isinstance(wait, Evict) and wait.verdict.turn is not Turn.WAIT:
        return wait
    asleep = _wake(ways, needed_mb)
    return asleep if asleep is not None and _is_sooner(asleep, wait) else wait


def _is_sooner(asleep: Wake, wait: Evict | Hold | None) -> bool:
    if isinstance(wait, Evict):
        return wait.verdict.again_s > asleep.node.wake_cost_s
    # What loads is there in a moment, and then it is known how long it stays.
    return wait is None


def _evict(ways: Ways, needed_mb: int, stages: frozenset[Stage]) -> Evict | None:
    plan = ways.plan(needed_mb, stages)
    return Evict(plan, needed_mb, ways.verdict(plan)) if plan is not None else None


def _wait(ways: Ways, needed_mb: int) -> Evict | Hold | None:
    found = _evict(ways, needed_mb, READY_ONES)
    if found is not None:
        return found
    plan = ways.plan(needed_mb, ANY)
    return Hold(plan, needed_mb) if plan is not None else None


def _wake(ways: Ways, needed_mb: int | None) -> Wake | None:
    node = ways.sleeper(needed_mb)
    return Wake(node) if node is not None else None
