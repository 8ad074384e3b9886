"""Which node takes a new worker, in the order of the promise, and why another does not."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.contracts.errors import ErrorCode
from arriero.contracts.records import DeviceRecord, ModelRecord
from arriero.contracts.states import NodeState
from arriero.domain.placement import ModelFacts, NodeView, Wants, candidates, choose_node
from arriero.domain.placement_index import NodeIndex
from arriero.domain.placement_memory import OVERHEAD_MB, memory_mb, needed
from arriero.domain.placement_wake import choose_sleeper

WANTS = Wants("hf:a/b")


def cpu(free_mb: int = 8000) -> DeviceRecord:
    return DeviceRecord(id="cpu", backend="cpu", name="CPU", memory_mb=16000, memory_free_mb=free_mb)


def card(number: int = 0, free_mb: int = 6000) -> DeviceRecord:
    return DeviceRecord(
        id=f"cuda:{number}", backend="cuda", name="RTX", memory_mb=8000, memory_free_mb=free_mb
    )


def node(name: str, ram_free_mb: int = 8000, **changes: Any) -> NodeView:
    view = NodeView(name, NodeState.READY, ("cpu",), (cpu(ram_free_mb),), ram_free_mb, ram_mb=16000)
    return replace(view, **changes)


def gpu_node(name: str, *cards: DeviceRecord, **changes: Any) -> NodeView:
    return node(name, backends=("cuda", "cpu"), devices=(cpu(), *cards), **changes)


def order(nodes: list[NodeView], needed_mb: int | None = 4000, facts: ModelFacts | None = None) -> list[str]:
    """Return the names in the order in which they would be taken."""
    found = candidates(nodes, WANTS, needed_mb, facts or ModelFacts())
    return [candidate.name for candidate in found if candidate.rank is not None]


def test_the_disk_goes_before_the_accelerator_before_the_best_fit_before_speed_before_load() -> None:
    tight, wide = node("tight", 5000), node("wide", 15000)
    fast, busy, idle = node("fast", 5010), node("busy", 5005), node("idle", 5003)
    facts = ModelFacts(
        holders={"wide"},
        speeds={"tight": 10.0, "idle": 20.0, "busy": 20.5, "fast": 80.0},
        loads={"busy": 3, "tight": 1},
    )
    with_card = gpu_node("with-card", card(free_mb=7000))
    assert order([tight, wide, idle, busy, fast, with_card], facts=facts) == [
        "wide", "with-card", "fast", "idle", "busy", "tight",
    ]  # fmt: skip


def test_small_models_leave_the_large_node_free_and_those_of_unknown_size_take_it() -> None:
    nodes = [node("large", 15000), node("small", 5000)]
    assert order(nodes, 4000) == ["small", "large"]
    assert order(nodes, 6000) == ["large"]
    assert order(nodes, None) == ["large", "small"]


def test_a_node_that_was_never_measured_is_tried() -> None:
    facts = ModelFacts(speeds={"a": 30.0})
    assert order([node("a"), node("b")], facts=facts) == ["b", "a"]


def test_what_is_promised_is_not_free() -> None:
    promised = node("a", promised_mb={"cpu": 5000})
    choice = choose_node([promised], WANTS, 4000)
    assert choice.code is ErrorCode.INSUFFICIENT_RAM
    assert choice.message == "a has 2.9 GiB free (4.9 promised), the model needs 3.9 GiB"
    cards = gpu_node("b", card(0, 6000), card(1, 5000), promised_mb={"cuda:0": 3000})
    (found,) = candidates([cards], WANTS, 4000)
    assert found.room is not None and (found.room.device, found.room.free_mb) == ("cuda:1", 5000)


CASES = [
    (node("a", state=NodeState.DRAINING), WANTS, ErrorCode.NODE_DRAINING, "takes no new work: it is drained"),
    (node("a", is_drained=True), WANTS, ErrorCode.NODE_DRAINING, "takes no new work: it is drained"),
    (
        node("a", state=NodeState.UNREACHABLE, error_code=ErrorCode.VERSION_MISMATCH, error="is 0.1"),
        WANTS, ErrorCode.VERSION_MISMATCH, "is unreachable: is 0.1",
    ),
    (node("a", state=NodeState.JOINING), WANTS, ErrorCode.NODE_UNREACHABLE, "is joining"),
    (
        node("a", labels={"disk": "slow"}), replace(WANTS, labels=(("disk", "fast"),)),
        ErrorCode.NO_CAPACITY, "lacks the label disk=fast",
    ),
    (
        node("a"), replace(WANTS, on_disk=True), ErrorCode.MODEL_NOT_FOUND,
        "does not have hf:a/b",
    ),
    (
        node("a", disk_free_mb=1024), WANTS, ErrorCode.INSUFFICIENT_DISK,
        "has 1.0 GiB of disk free, fetching it takes 2.9 GiB",
    ),
    (
        node("a", devices=(cpu(), card())), WANTS, ErrorCode.BACKEND_UNAVAILABLE,
        "has RTX, and its engine computes with cpu alone: install the one for cuda "
        "(`arriero engines install --node a`), or ask for --backend cpu",
    ),
    (
        gpu_node("a", card(free_mb=3000)), WANTS, ErrorCode.INSUFFICIENT_VRAM,
        "has 2.9 GiB free on cuda:0, the model needs 3.9 GiB",
    ),
    (
        node("a"), replace(WANTS, backend="metal"), ErrorCode.BACKEND_UNAVAILABLE,
        "has the backends cpu, metal was asked for",
    ),
    (
        node("a"), replace(WANTS, device="cuda:3"), ErrorCode.DEVICE_NOT_FOUND,
        "has the devices cpu, cuda:3 was asked for",
    ),
    (node("a"), replace(WANTS, excluded=frozenset({"a"})), ErrorCode.NO_CAPACITY, "refused it already"),
]  # fmt: skip


@pytest.mark.parametrize(("view", "wants", "code", "why"), CASES)
def test_each_refusal_has_its_code_and_its_numbers(
    view: NodeView, wants: Wants, code: ErrorCode, why: str
) -> None:
    choice = choose_node([view], wants, 4000, ModelFacts(disk_mb=3000))
    assert choice.node is None
    assert (choice.code, choice.refused[0].why) == (code, why)


def test_an_accelerator_without_its_engine_computes_on_the_cpu_for_who_asks_for_it() -> None:
    view = node("a", devices=(cpu(), card()))
    assert choose_node([view], replace(WANTS, backend="cpu"), 4000).node == "a"
    assert choose_node([view], replace(WANTS, device="cpu"), 4000).node == "a"


MODEL = ModelRecord(
    model_id="m-0123456789ab", model_ref="hf:a/b", provider="hf", files=["a.gguf"], size_bytes=4 << 30,
    sha256="0" * 64, added_unix=1.0, block_count=32, head_count=32, head_count_kv=8, embedding_length=4096,
    context_length=131072,
)  # fmt: skip


def test_the_estimate_is_the_arithmetic_of_the_cache() -> None:
    # 32 blocks × 8 heads × 128 values × keys and values × 2 bytes = 128 KiB for each token.
    assert memory_mb(MODEL, slots=1, context_tokens=8192) == 4096 + 1024 + OVERHEAD_MB
    both = needed(MODEL)
    assert (both.full_mb, both.least_mb) == (4096 + 4096 + OVERHEAD_MB, 4096 + 256 + OVERHEAD_MB)
    import msgspec

    short = msgspec.structs.replace(MODEL, context_length=256)
    assert needed(short).full_mb == needed(short).least_mb == 4096 + 128 + OVERHEAD_MB
    unknown = msgspec.structs.replace(MODEL, head_count=0)
    assert needed(unknown).full_mb == 4096


SIZES = st.integers(0, 16000)
NODES = st.lists(
    st.builds(
        lambda name, state, free, gpu, labels, disk, promised, mac, drained: node(
            name, free, state=state, backends=("cuda", "cpu") if gpu else ("cpu",),
            devices=(cpu(free), card(free_mb=free)) if gpu else (cpu(free),), labels=labels,
            disk_free_mb=disk, promised_mb=promised, mac=mac, is_drained=drained,
        ),
        st.sampled_from(["andes", "bolivia", "cusco", "lima"]),
        st.sampled_from([NodeState.READY, NodeState.READY, *NodeState]),
        SIZES, st.booleans(), st.sampled_from([{}, {"disk": "fast"}]), st.none() | SIZES,
        st.dictionaries(st.sampled_from(["cpu", "cuda:0"]), st.integers(-500, 8000)),
        st.sampled_from(["", "52:54:00:12:34:56"]), st.booleans(),
    ),
    unique_by=lambda n: n.name,
)  # fmt: skip
ANY_WANTS = st.builds(
    Wants,
    model_ref=st.just("hf:a/b"),
    node=st.none() | st.sampled_from(["andes", "bolivia"]),
    backend=st.none() | st.sampled_from(["cpu", "cuda"]),
    device=st.none() | st.sampled_from(["cpu", "cuda:0"]),
    excluded=st.frozensets(st.sampled_from(["andes", "cusco"])),
    labels=st.sampled_from([(), (("disk", "fast"),)]),
    on_disk=st.booleans(),
)
FACTS = st.builds(
    ModelFacts,
    holders=st.frozensets(st.sampled_from(["andes", "bolivia", "cusco", "lima"])),
    has_neighbour=st.booleans(),
    disk_mb=st.none() | SIZES,
    speeds=st.dictionaries(st.sampled_from(["andes", "lima"]), st.floats(0.1, 1000)),
    loads=st.dictionaries(st.sampled_from(["andes", "lima"]), st.integers(0, 9)),
)


@given(nodes=NODES, wants=ANY_WANTS, mb=st.none() | SIZES, facts=FACTS, data=st.data())
def test_the_choice_is_the_first_candidate_and_every_other_one_is_ranked_or_refused(
    nodes: list[NodeView], wants: Wants, mb: int | None, facts: ModelFacts, data: st.DataObject
) -> None:
    choice = choose_node(nodes, wants, mb, facts)
    assert choose_node(data.draw(st.permutations(nodes)), wants, mb, facts) == choice
    index = NodeIndex()
    for view in nodes:
        index.put(replace(view, state=NodeState.READY, promised_mb={}), 7)
        index.put(view, facts.loads.get(view.name, 0))
    best = index.best(wants, mb, facts)
    assert (best.name if best is not None else None) == choice.node
    listed = candidates(nodes, wants, mb, facts)
    assert {candidate.name for candidate in listed} == {view.name for view in nodes}
    assert [c.rank for c in listed if c.rank is not None] == list(range(1, len(listed) + 1))[
        : sum(c.rank is not None for c in listed)
    ]
    assert all((c.rank is None) == (c.refusal is not None) for c in listed)
    assert choice.node == (listed[0].name if listed and listed[0].rank == 1 else None)
    for candidate in listed:
        view = next(view for view in nodes if view.name == candidate.name)
        fits = candidate.rank is not None
        if fits:
            assert view.state is NodeState.READY and not view.is_drained
            assert candidate.room is not None and (mb is None or mb <= candidate.room.free_mb)
            assert wants.backend in (None, candidate.room.backend)
            assert wants.device in (None, candidate.room.device)
            assert set(wants.labels) <= set(view.labels.items())
            assert view.name not in wants.excluded and wants.node in (None, view.name)


def test_the_index_finds_the_node_that_has_just_enough_and_follows_load_and_speed() -> None:
    index = NodeIndex()
    views = [node("a", 4050), node("b", 4060), node("c", 16000)]
    for view in views:
        index.put(view, 0)

    def best(needed_mb: int, **facts: Any) -> str | None:
        found = index.best(WANTS, needed_mb, ModelFacts(**facts))
        return found.name if found is not None else None

    assert (best(4000), best(4055), best(4061), best(16001)) == ("a", "b", "c", None)
    assert best(4000, speeds={"a": 10.0, "b": 90.0}) == "b"
    assert best(4000, speeds={"a": 10.0}) == "b", "one that was never measured is tried"
    index.put(views[0], 3)
    assert best(4000) == "b"
    index.put(replace(views[1], state=NodeState.DRAINING), 0)
    assert best(4000) == "a"
    index.drop("a")
    index.drop("a")
    assert best(4000) == "c"


@given(nodes=NODES, wants=ANY_WANTS, mb=st.none() | SIZES, facts=FACTS)
def test_only_one_that_sleeps_and_could_take_it_is_woken(
    nodes: list[NodeView], wants: Wants, mb: int | None, facts: ModelFacts
) -> None:
    chosen = choose_sleeper(nodes, wants, mb, facts)
    if chosen is not None:
        assert chosen.state is NodeState.UNREACHABLE and chosen.mac and not chosen.is_drained
        assert chosen.name not in wants.excluded and wants.node in (None, chosen.name)
        assert mb is None or mb <= 16000
        assert facts.is_on(chosen.name) or facts.disk_mb is None or chosen.disk_free_mb is None or (
            facts.disk_mb <= chosen.disk_free_mb
        )  # fmt: skip


def test_the_sleeper_that_costs_least_is_woken() -> None:
    def asleep(name: str, **changes: Any) -> NodeView:
        return node(name, 100, state=NodeState.UNREACHABLE, **{"mac": "52:54:00:12:34:56", **changes})

    slow, quick, mute = asleep("a", wake_cost_s=90), asleep("b", wake_cost_s=20), asleep("c", mac="")
    found = choose_sleeper([slow, quick, mute], WANTS, 9000)
    assert found is not None and found.name == "b", "all of its memory is free when it wakes"
    found = choose_sleeper([slow, quick], WANTS, 9000, ModelFacts(holders={"a"}))
    assert found is not None and found.name == "a"
    assert choose_sleeper([slow, quick, mute], WANTS, 17000) is None
