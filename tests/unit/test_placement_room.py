"""Who makes room, when, and that nobody starves and nobody thrashes."""

import itertools
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.test_placement_nodes import node

from arriero.domain.placement import ModelFacts, Wants
from arriero.domain.placement_eviction import (
    ANY,
    IDLE_ONLY,
    READY_ONES,
    Occupant,
    Stage,
    fewest,
    plan_eviction,
)
from arriero.domain.placement_ledger import Ledger
from arriero.domain.placement_turns import Place, Turn, limits_of, turn
from arriero.domain.speeds import Speed

WANTS = Wants("hf:a/b")
OCCUPANTS = st.lists(
    st.builds(
        Occupant,
        worker_id=st.sampled_from([f"w-{n}" for n in range(7)]),
        device=st.just("cpu"),
        model_ref=st.just("demo"),
        memory_mb=st.integers(0, 4000),
        stage=st.sampled_from(Stage),
        last_used=st.integers(0, 5).map(float),
        is_pinned=st.booleans(),
    ),
    unique_by=lambda o: o.worker_id,
    max_size=7,
)


@given(occupants=OCCUPANTS, deficit=st.integers(-10, 12000), data=st.data())
def test_the_fewest_go_and_of_those_the_ones_used_longest_ago(
    occupants: list[Occupant], deficit: int, data: st.DataObject
) -> None:
    victims = fewest(occupants, deficit)
    assert fewest(data.draw(st.permutations(occupants)), deficit) == victims

    def enough(some: tuple[Occupant, ...]) -> bool:
        return sum(o.memory_mb for o in some) >= deficit

    able = [
        some for size in range(len(occupants) + 1) for some in itertools.combinations(occupants, size)
        if enough(some)
    ]  # fmt: skip
    if victims is None:
        assert not able
        return
    assert enough(tuple(victims))
    least = min(len(some) for some in able)
    assert len(victims) == least
    if victims:
        of_that_size = [some for some in able if len(some) == least]
        oldest = min(sorted((o.last_used, o.worker_id) for o in some) for some in of_that_size)
        assert sorted((o.last_used, o.worker_id) for o in victims) == oldest


@given(
    occupants=OCCUPANTS, needed=st.integers(0, 20000), stages=st.sampled_from([IDLE_ONLY, READY_ONES, ANY])
)
def test_no_pinned_worker_goes_and_none_that_computes_unless_it_may(
    occupants: list[Occupant], needed: int, stages: frozenset[Stage]
) -> None:
    view = node("a", 3000)
    plan = plan_eviction([view], {"a": occupants}, WANTS, needed, facts=ModelFacts(), stages=stages)
    able = [o for o in occupants if not o.is_pinned and o.stage in stages]
    if plan is None:
        assert not occupants or sum(o.memory_mb for o in able) + 3000 < needed
        return
    assert set(plan.worker_ids) <= {o.worker_id for o in able}
    assert plan.freed_mb + plan.free_mb >= needed


def occupant(worker_id: str, memory_mb: int, last_used: float) -> Occupant:
    return Occupant(worker_id, "cpu", "demo", memory_mb, Stage.IDLE, last_used)


def test_the_node_that_loses_fewest_makes_room_then_the_one_that_has_the_model() -> None:
    nodes = [node("a", 1000), node("b", 1000), node("c", 1000)]
    occupants = {
        "a": [occupant("w-1", 2000, 1.0), occupant("w-2", 2000, 2.0)],
        "b": [occupant("w-3", 4000, 3.0)],
        "c": [occupant("w-4", 4000, 4.0)],
    }
    plan = plan_eviction(nodes, occupants, WANTS, 4500, facts=ModelFacts(), stages=IDLE_ONLY)
    assert plan is not None and (plan.node, plan.worker_ids) == ("b", ("w-3",))
    plan = plan_eviction(nodes, occupants, WANTS, 4500, facts=ModelFacts(holders={"c"}), stages=IDLE_ONLY)
    assert plan is not None and plan.worker_ids == ("w-4",)
    assert plan_eviction(nodes, occupants, WANTS, 5500, facts=ModelFacts(), stages=IDLE_ONLY) is None


# --- Turns ---------------------------------------------------------------------------------------


def test_a_loaded_model_is_kept_while_it_has_requests_and_no_longer_than_the_limit() -> None:
    limits = limits_of(30.0)
    busy = Place(requests=2, quiet_s=0, resident_s=100)
    assert turn([busy], 10.0, limits).turn is Turn.WAIT
    assert turn([busy], 10.0, limits).again_s == 20.0
    assert turn([busy], 30.0, limits).turn is Turn.CLOSE
    fresh = Place(requests=2, quiet_s=0, resident_s=1)
    assert turn([fresh], 500.0, limits).turn is Turn.WAIT, "it was loaded a moment ago"
    quiet = Place(requests=0, quiet_s=2, resident_s=3)
    assert turn([quiet], 0.0, limits).turn is Turn.GO
    just_ended = Place(requests=0, quiet_s=0.2, resident_s=3)
    assert turn([just_ended], 0.0, limits).turn is Turn.WAIT
    assert turn([just_ended, busy], 0.0, limits).turn is Turn.WAIT


@dataclass
class Machine:
    """A node that holds one model at a time: what the orchestrator does with `turn`, in steps of time."""

    starvation_s: float
    slots: int = 4
    load_s: float = 2.0
    step_s: float = 0.25
    now_s: float = 0.0
    loaded: str = ""
    ready_s: float = 0.0
    quiet_since_s: float = 0.0
    is_closed: bool = False
    #: Ends of the running requests.
    running: list[float] = field(default_factory=list)
    waiting: dict[str, deque[tuple[float, float]]] = field(default_factory=dict)
    line: list[tuple[str, float]] = field(default_factory=list)
    swaps: int = 0
    ran_dry: int = 0
    turns_waited_s: list[float] = field(default_factory=list)
    served: int = 0

    def run(self, arrivals: list[tuple[float, str, float]]) -> None:
        todo = deque(sorted(arrivals))
        while todo or self.running or any(self.waiting.values()):
            while todo and todo[0][0] <= self.now_s:
                at_s, model, work_s = todo.popleft()
                self.waiting.setdefault(model, deque()).append((at_s, work_s))
            self._serve()
            for model in self.waiting:
                is_away = model != self.loaded or self.is_closed
                if self.waiting[model] and is_away and model not in [name for name, _ in self.line]:
                    self.line.append((model, self.now_s))
            if self.line:
                self._decide()
            self.now_s += self.step_s
            assert self.now_s < 1_000_000, "somebody waits for ever"

    def _serve(self) -> None:
        before = len(self.running)
        self.running = [end_s for end_s in self.running if end_s > self.now_s]
        if before and not self.running:
            self.quiet_since_s = self.now_s
        queue = self.waiting.get(self.loaded, deque())
        while queue and not self.is_closed and self.now_s >= self.ready_s:
            # The worker's own queue: all that came are with it, so it computes until they are done.
            _, work_s = queue.popleft()
            self.running.append(self.now_s + work_s)
            self.served += 1

    def _decide(self) -> None:
        if self.now_s < self.ready_s:
            return
        model, since_s = self.line[0]
        place = Place(
            requests=len(self.running),
            quiet_s=self.now_s - max(self.quiet_since_s, self.ready_s),
            resident_s=self.now_s - self.ready_s,
        )
        found = turn([place] if self.loaded else [], self.now_s - since_s, limits_of(self.starvation_s))
        if found.turn is Turn.CLOSE and not self.is_closed:
            self.is_closed = True
            self.turns_waited_s.append(self.now_s - max(since_s, self.ready_s))
        if found.turn is Turn.GO or (self.is_closed and not self.running):
            if found.turn is Turn.GO and not self.is_closed:
                self.ran_dry += 1
            self.line.pop(0)
            self.loaded, self.is_closed = model, False
            self.ready_s = self.now_s + self.load_s
            self.swaps += 1


ARRIVALS = st.lists(
    st.tuples(st.floats(0, 300), st.sampled_from("ABC"), st.floats(0.1, 8)), min_size=1, max_size=60
)


@settings(max_examples=150)
@given(arrivals=ARRIVALS, starvation_s=st.sampled_from([4.0, 30.0]))
def test_every_request_has_its_turn_and_swaps_are_bounded_by_time(
    arrivals: list[tuple[float, str, float]], starvation_s: float
) -> None:
    machine = Machine(starvation_s)
    machine.run(arrivals)
    assert machine.served == len(arrivals)
    # A model gives way when it has nothing to do, or once in the limit.
    assert machine.swaps <= machine.ran_dry + machine.now_s / starvation_s + 1
    assert all(waited_s <= starvation_s + 2 * machine.step_s for waited_s in machine.turns_waited_s)


def test_two_models_that_are_asked_for_in_turn_do_not_chase_each_other_out() -> None:
    machine = Machine(30.0)
    machine.run([(0.5 * number, "AB"[number % 2], 1.0) for number in range(100)])
    assert (machine.served, machine.swaps) == (100, 3)


# --- What moves, and how fast it is --------------------------------------------------------------


def test_memory_is_not_given_away_twice_and_a_beat_settles_what_its_agent_knew() -> None:
    ledger = Ledger()
    taken = ledger.take("a", "cpu", 4000)
    ledger.take("a", "cuda:0", 100)
    ledger.gave_back("a", "cpu", 1500)
    assert ledger.of("a") == {"cpu": 2500, "cuda:0": 100}
    ledger.beat("a")
    assert ledger.of("a") == {"cpu": 4000, "cuda:0": 100}, "what came free is told, what is reserved is not"
    ledger.made(taken, "w-1", is_told=True)
    ledger.beat("a")
    assert ledger.of("a") == {"cuda:0": 100}
    ledger.cancel(taken)
    for movement in ledger.taken("a"):
        ledger.cancel(movement)
        ledger.cancel(movement)
    assert ledger.is_empty("a") and ledger.of("b") == {}


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(("told", "answer", "beat"), id="the answer comes last"),
        pytest.param(("answer", "told", "beat"), id="the answer is quicker"),
        pytest.param(("answer", "beat", "told", "beat"), id="a beat was on its way"),
        pytest.param(("answer", "beat", "beat"), id="nobody tells"),
    ],
)
def test_the_first_beat_after_an_agent_told_of_a_worker_counts_it(order: tuple[str, ...]) -> None:
    ledger = Ledger()
    taken = ledger.take("a", "cpu", 4000)
    for number, word in enumerate(order):
        assert ledger.of("a") == {"cpu": 4000}, order[:number]
        if word == "answer":
            ledger.made(taken, "w-1", is_told="told" in order[:number])
        elif word == "beat":
            ledger.told("a", "w-2")
            ledger.beat("a")
        else:
            ledger.told("a", "w-1")
    assert ledger.is_empty("a")


def test_a_speed_is_a_mean_that_forgets() -> None:
    speed = Speed()
    speed.finished(tokens=3, seconds=1)
    speed.finished(tokens=100, seconds=0)
    assert speed.tokens_per_s == 0
    speed.finished(tokens=100, seconds=1)
    assert speed.tokens_per_s == 100
    speed.finished(tokens=100, seconds=2)
    assert speed.tokens_per_s == 90
