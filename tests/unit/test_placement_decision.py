"""In which order the ways to a place for a new worker are gone, and that none is forgotten."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_placement_nodes import node

from arriero.domain.placement import NodeView
from arriero.domain.placement_decision import Evict, Fit, Hold, Wake, decide
from arriero.domain.placement_eviction import ANY, IDLE_ONLY, READY_ONES, Eviction, Stage
from arriero.domain.placement_memory import Needed
from arriero.domain.placement_turns import Turn, Verdict


@dataclass(frozen=True)
class Room:
    """A pool by what each way could give, at the most."""

    free_mb: int
    idle_mb: int
    busy_mb: int
    moving_mb: int
    asleep_mb: int
    turn: Turn
    again_s: float
    wake_cost_s: float = 60.0

    def best(self, needed_mb: int | None) -> NodeView | None:
        return node("free") if (needed_mb or 0) <= self.free_mb else None

    def most_mb(self, stages: frozenset[Stage]) -> int:
        by_stage = {IDLE_ONLY: self.idle_mb, READY_ONES: self.busy_mb, ANY: self.moving_mb}
        return max(most for known, most in by_stage.items() if known <= stages)

    def plan(self, needed_mb: int, stages: frozenset[Stage]) -> Eviction | None:
        held_mb = self.most_mb(stages)
        return Eviction("full", "cpu", ("w-1",), held_mb, 0) if needed_mb <= held_mb else None

    def verdict(self, plan: Eviction) -> Verdict:
        return Verdict(self.turn, self.again_s)

    def sleeper(self, needed_mb: int | None) -> NodeView | None:
        is_enough = (needed_mb or 0) <= self.asleep_mb
        return node("asleep", wake_cost_s=self.wake_cost_s) if is_enough else None


MB = st.integers(0, 20)
ROOMS = st.builds(
    Room, free_mb=MB, idle_mb=MB, busy_mb=MB, moving_mb=MB, asleep_mb=MB, turn=st.sampled_from(Turn),
    again_s=st.sampled_from([0.0, 30.0, 90.0]),
)  # fmt: skip
NEEDS = st.tuples(MB, MB).map(lambda both: Needed(full_mb=max(both), least_mb=min(both)))


@given(room=ROOMS, needed=NEEDS)
def test_nobody_is_refused_while_any_way_gives_the_least_context(room: Room, needed: Needed) -> None:
    decision = decide(room, needed)
    most_mb = max(room.free_mb, room.most_mb(ANY), room.asleep_mb)
    assert (decision is None) == (needed.least_mb > most_mb)
    idle_mb = max(room.free_mb, room.idle_mb)
    assert (decide(room, needed, may_wait=False) is None) == (needed.least_mb > idle_mb)
    if isinstance(decision, Fit | Evict | Hold):
        assert decision.needed_mb in (needed.full_mb, needed.least_mb)
        if decision.needed_mb < needed.full_mb <= most_mb:
            assert isinstance(decision, Fit), "less context only where nothing has to be waited for"


@given(room=ROOMS, needed=NEEDS)
def test_a_machine_is_woken_where_nothing_awake_is_there_or_comes_sooner(room: Room, needed: Needed) -> None:
    is_enough = needed.full_mb <= max(room.most_mb(ANY), room.asleep_mb)
    needed_mb = needed.full_mb if is_enough else needed.least_mb
    is_waited_for = needed_mb <= room.most_mb(ANY)
    is_later = needed_mb <= room.most_mb(READY_ONES) and room.again_s > room.wake_cost_s
    assert isinstance(decide(room, needed), Wake) == (
        room.free_mb < needed.least_mb
        and room.idle_mb < needed_mb <= room.asleep_mb
        and (not is_waited_for or (is_later and room.turn is Turn.WAIT))
    )
