"""Does the index of those who could make room answer as a look at everything would?"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_placement_nodes import ANY_WANTS, FACTS, MODEL, NODES, WANTS, card, cpu, gpu_node, node
from tests.unit.test_placement_room import OCCUPANTS

from arriero.contracts.events import NodeChanged, PoolWorkerChanged
from arriero.contracts.records import NodeRecord, WorkerRecord
from arriero.contracts.states import NodeState, WorkerState
from arriero.domain.placement import ModelFacts, NodeView, Wants
from arriero.domain.placement_eviction import ANY, IDLE_ONLY, READY_ONES, Occupant, Stage, plan_eviction
from arriero.domain.placement_eviction_index import EvictionIndex
from arriero.orchestrator.views import PoolViews
from arriero.runtime.clock import SystemClock

NAMES = ("andes", "bolivia", "cusco", "lima")
DEVICES = ("cpu", "cuda:0", "cuda:1")
ON_DEVICES = st.tuples(OCCUPANTS, st.lists(st.sampled_from(DEVICES), min_size=7, max_size=7)).map(
    lambda drawn: [replace(each, device=device) for each, device in zip(*drawn, strict=False)]
)
MEMORY = st.integers(0, 9000)


def put(index: EvictionIndex, name: str, occupants: list[Occupant]) -> None:
    for occupant in occupants:
        index.put(name, occupant)


@given(
    nodes=NODES,
    occupants=st.dictionaries(st.sampled_from(NAMES), ON_DEVICES),
    earlier=ON_DEVICES,
    cards=st.none() | st.tuples(MEMORY, MEMORY),
    wants=ANY_WANTS | st.just(WANTS),
    needed=st.integers(0, 20_000),
    facts=FACTS | st.just(ModelFacts(is_everywhere=True)),
)
def test_the_plan_of_the_index_is_the_plan_of_a_look_at_all(
    nodes: list[NodeView],
    occupants: dict[str, list[Occupant]],
    earlier: list[Occupant],
    cards: tuple[int, int] | None,
    wants: Wants,
    needed: int,
    facts: ModelFacts,
) -> None:
    if cards is not None:
        two = gpu_node("potosi", card(0, cards[0]), card(1, cards[1]))
        nodes, occupants = [*nodes, two], {**occupants, "potosi": earlier}
    index = EvictionIndex()
    # Everything was different before: what is told last counts.
    put(index, "andes", earlier)
    for view in nodes:
        put(index, view.name, earlier[:3])
        index.put_node(replace(view, devices=(cpu(4000), card(1)), backends=("cuda", "cpu")))
        index.put_node(
            replace(view, state=NodeState.READY, is_drained=False, ram_free_mb=500, promised_mb={})
        )
        index.put_node(view)
    for name in (*NAMES, "potosi"):
        told = occupants.get(name, [])
        put(index, name, [replace(each, device="cpu", memory_mb=77) for each in told[:2]])
        for number in range(7):
            if f"w-{number}" not in [each.worker_id for each in told]:
                index.drop(name, f"w-{number}")
        put(index, name, told)
    for stages in (IDLE_ONLY, READY_ONES, ANY):
        plain = plan_eviction(nodes, occupants, wants, needed, facts=facts, stages=stages)
        assert index.plan(wants, needed, facts=facts, stages=stages) == plain
    for view in nodes:
        index.drop_node(view.name)
    assert index.plan(wants, 0, facts=facts, stages=ANY) is None


def test_of_nodes_that_lose_as_many_the_one_used_longest_ago_whoever_else_is_there() -> None:
    index = EvictionIndex()
    for number in range(50):
        name = f"n-{number:02}"
        index.put_node(node(name, 1000))
        # The oldest of each is too small: it tells nothing of who would have to go.
        index.put(name, Occupant(f"small-{number}", "cpu", "demo", 100, Stage.IDLE, float(number)))
        index.put(name, Occupant(f"large-{number}", "cpu", "demo", 5000, Stage.IDLE, float(100 - number)))

    def victims(needed_mb: int, **facts: Any) -> tuple[str, ...]:
        plan = index.plan(WANTS, needed_mb, facts=ModelFacts(**facts), stages=IDLE_ONLY)
        return plan.worker_ids if plan is not None else ()

    assert victims(4000) == ("large-49",)
    assert victims(4000, holders={"n-07", "n-08"}) == ("large-8",)
    assert victims(6100, holders={"n-07"}) == ("small-7", "large-7")
    assert victims(6101) == ()


# --- What the orchestrator tells it --------------------------------------------------------------

REF = "hf:a/b"


def node_record(name: str, state: NodeState, free_mb: int) -> NodeRecord:
    return NodeRecord(
        name=name, status=state, version="1", devices=[cpu(free_mb), card(free_mb=free_mb)],
        backends=["cuda", "cpu"], ram_mb=16000, ram_free_mb=free_mb, disk_free_mb=9000,
    )  # fmt: skip


def worker(number: int, name: str, device: str, state: WorkerState, used: float) -> WorkerRecord:
    return WorkerRecord(
        worker_id=f"w-{number}", node=name, url="", model_ref=REF, device=device, backend=device[:4].rstrip(":"),
        state=state, slots_total=2, slots_available=2, pid=1, started_unix=1.0, last_activity_unix=used,
        memory_mb=3000,
    )  # fmt: skip


PAIR = st.sampled_from(["andes", "bolivia"])
IDS = st.sampled_from([f"w-{number}" for number in range(4)])
Step = Callable[[PoolViews, list[Any]], None]


def _lease(views: PoolViews, taken: list[Any], worker_id: str) -> None:
    found = views.workers.find(worker_id)
    if found is not None:
        views.leased(worker_id)
        taken.append(lambda: views.released(worker_id, found.node))


def _reserve(views: PoolViews, taken: list[Any], name: str, device: str) -> None:
    if views.node(name) is not None:
        movement = views.reserve(name, device, 2000)
        taken.append(lambda: views.unreserve(movement))


def _end(taken: list[Any]) -> None:
    if taken:
        taken.pop(0)()


def _beat(views: PoolViews, name: str, free_mb: int) -> None:
    devices = [cpu(free_mb), card(free_mb=free_mb)]
    views.beat(name, ram_free_mb=free_mb, disk_free_mb=9000, devices=devices, promised_mb={})


def _models(views: PoolViews, name: str, is_pinned: bool, size_gb: int) -> None:
    views.models_told(
        name,
        [msgspec.structs.replace(MODEL, is_pinned=is_pinned, size_bytes=size_gb << 30)] if size_gb else [],
    )


STEPS: st.SearchStrategy[Step] = st.one_of(
    st.builds(
        lambda name, state, free: lambda v, _: v.take(NodeChanged(node=node_record(name, state, free))),
        PAIR, st.sampled_from([NodeState.READY, NodeState.READY, *NodeState]), MEMORY,
    ),
    st.builds(
        lambda *drawn: lambda v, _: v.take(PoolWorkerChanged(worker=worker(*drawn))),
        st.integers(0, 3), PAIR, st.sampled_from(["cpu", "cuda:0"]), st.sampled_from(WorkerState), MEMORY.map(float),
    ),
    st.builds(lambda *drawn: lambda v, _: _beat(v, *drawn), PAIR, MEMORY),
    st.builds(lambda *drawn: lambda v, _: _models(v, *drawn), PAIR, st.booleans(), st.integers(0, 3)),
    st.builds(lambda *drawn: lambda v, taken: _lease(v, taken, *drawn), IDS),
    st.builds(lambda *drawn: lambda v, taken: _reserve(v, taken, *drawn), PAIR, st.sampled_from(["cpu", "cuda:0"])),
    st.builds(lambda: lambda _, taken: _end(taken)),
    st.builds(lambda one: lambda v, _: v.leave([one], "hf:c/d"), IDS),
    st.builds(lambda one: lambda v, _: v.stay([one]), IDS),
)  # fmt: skip


@given(steps=st.lists(STEPS, max_size=40), needed=st.integers(2000, 9000))
def test_whatever_is_told_of_a_pool_is_seen_by_whoever_wants_room(steps: list[Step], needed: int) -> None:
    views = PoolViews(SystemClock())
    taken: list[Any] = []
    for number, name in enumerate(("andes", "bolivia")):
        views.take(NodeChanged(node=node_record(name, NodeState.READY, 2000)))
        _models(views, name, False, 2)
        for device in ("cpu", "cuda:0"):
            at = 2 * number + (device == "cpu")
            views.take(PoolWorkerChanged(worker=worker(at, name, device, WorkerState.IDLE, float(at))))
    for step in steps:
        step(views, taken)
        facts = views.facts(REF)
        occupants = {view.name: views.occupants(view.name) for view in views.nodes()}
        for wants in (WANTS, replace(WANTS, backend="cpu")):
            for stages in (IDLE_ONLY, ANY):
                plain = plan_eviction(views.nodes(), occupants, wants, needed, facts=facts, stages=stages)
                assert views.evictions.plan(wants, needed, facts=facts, stages=stages) == plain
