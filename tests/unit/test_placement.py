"""What holds for every choice of a worker and of a node."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from arriero.contracts.errors import ErrorCode
from arriero.contracts.records import DeviceRecord
from arriero.contracts.states import NodeState, WorkerState
from arriero.domain.placement import NodeView, Wants, WorkerView, choose_node, choose_worker
from arriero.domain.placement_workers import keeps_pace, widened
from arriero.domain.worker_states import READY

NAMES = st.sampled_from(["andes", "bolivia", "cusco"])
BACKENDS = st.sampled_from(["cpu", "cuda"])
WORKERS = st.lists(
    st.builds(
        WorkerView,
        worker_id=st.sampled_from([f"w-{n:012x}" for n in range(8)]),
        node=NAMES,
        model_ref=st.sampled_from(["demo", "hf:a/b"]),
        backend=BACKENDS,
        device=st.sampled_from(["cpu", "cuda:0"]),
        state=st.sampled_from(WorkerState),
        slots_free=st.integers(-3, 4),
        queued=st.integers(0, 5),
        node_state=st.sampled_from(NodeState),
        load_fraction=st.sampled_from([0.0, 0.5]),
    ),
    unique_by=lambda w: w.worker_id,
)
WANTS = st.builds(
    Wants,
    model_ref=st.sampled_from(["demo", "hf:a/b"]),
    node=st.none() | NAMES,
    backend=st.none() | BACKENDS,
    device=st.none() | st.sampled_from(["cpu", "cuda:0"]),
    excluded=st.frozensets(st.sampled_from(["w-000000000000", "w-000000000001", "andes"])),
)
CPU = DeviceRecord(id="cpu", backend="cpu", name="CPU", memory_mb=16000, memory_free_mb=9000)
GPU = DeviceRecord(id="cuda:0", backend="cuda", name="GPU", memory_mb=8000, memory_free_mb=6000)
NODES = st.lists(
    st.builds(
        NodeView,
        name=NAMES,
        state=st.sampled_from(NodeState),
        backends=st.sampled_from([("cpu",), ("cpu", "cuda")]),
        devices=st.sampled_from([(CPU,), (CPU, GPU)]),
        ram_free_mb=st.integers(0, 16000),
    ),
    unique_by=lambda n: n.name,
)


@given(workers=WORKERS, wants=WANTS, data=st.data())
def test_the_worker_does_not_depend_on_the_order_and_is_never_a_refused_one(
    workers: list[WorkerView], wants: Wants, data: st.DataObject
) -> None:
    choice = choose_worker(workers, wants)
    assert choose_worker(data.draw(st.permutations(workers)), wants) == choice
    assert choice.message
    assert choice.worker_id not in {refusal.candidate for refusal in choice.refused}
    with_model = {w.worker_id for w in workers if w.model_ref == wants.model_ref}
    if choice.worker_id is None:
        assert {refusal.candidate for refusal in choice.refused} == with_model
        return
    chosen = next(w for w in workers if w.worker_id == choice.worker_id)
    assert chosen.worker_id in with_model - wants.excluded
    assert chosen.node_state is NodeState.READY
    assert wants.node in (None, chosen.node)
    assert wants.backend in (None, chosen.backend)
    assert wants.device in (None, chosen.device)
    assert choice.is_ready == (chosen.state in READY)


@given(nodes=NODES, wants=WANTS, needed=st.none() | st.integers(0, 20000), data=st.data())
def test_the_node_does_not_depend_on_the_order_and_is_never_a_refused_one(
    nodes: list[NodeView], wants: Wants, needed: int | None, data: st.DataObject
) -> None:
    choice = choose_node(nodes, wants, needed)
    assert choose_node(data.draw(st.permutations(nodes)), wants, needed) == choice
    assert choice.message
    assert (choice.node is None) == (choice.code is not None)
    assert choice.node not in {refusal.candidate for refusal in choice.refused}
    if choice.node is not None:
        chosen = next(n for n in nodes if n.name == choice.node)
        assert chosen.state is NodeState.READY
        assert chosen.name not in wants.excluded
        assert wants.backend is None or wants.backend in chosen.backends


def _worker(
    worker_id: str, state: WorkerState = WorkerState.IDLE, free: int = 4, queued: int = 0
) -> WorkerView:
    return WorkerView(worker_id, "andes", "demo", "cpu", "cpu", state, free, queued)


def test_ready_goes_before_free_goes_before_queue() -> None:
    loading = _worker("w-1", WorkerState.LOADING)
    full = _worker("w-2", WorkerState.BUSY, free=0, queued=7)
    fuller = _worker("w-3", WorkerState.BUSY, free=0, queued=8)
    free = _worker("w-4", WorkerState.BUSY, free=1)
    assert choose_worker([loading, fuller], Wants("demo")).worker_id == "w-3"
    assert choose_worker([loading, full, fuller], Wants("demo")).worker_id == "w-2"
    assert choose_worker([loading, full, fuller, free], Wants("demo")).worker_id == "w-4"
    waited_for = choose_worker([loading], Wants("demo"))
    assert (waited_for.worker_id, waited_for.is_ready) == ("w-1", False)


def test_one_more_machine_is_wanted_where_all_slots_are_taken_and_none_loads() -> None:
    full, free = _worker("w-1", WorkerState.BUSY, free=0), _worker("w-2", WorkerState.BUSY, free=1)
    wants = Wants("demo", labels=(("room", "attic"),))
    wider = widened(full, [full], wants)
    assert wider == replace(wants, excluded=frozenset({"andes"}))
    assert widened(free, [full, free], wants) is None
    loading = replace(_worker("w-3", WorkerState.LOADING), node="bolivia")
    assert widened(full, [full, loading], wants) is None
    # What a machine loads that nobody reaches is not waited for; that machine may be asked again.
    lost = replace(loading, node_state=NodeState.UNREACHABLE)
    assert widened(full, [full, lost], wants) == wider


def test_a_machine_without_accelerator_does_not_help_one_that_has_one() -> None:
    cpu = _worker("w-1")
    cuda = replace(cpu, backend="cuda", device="cuda:0")
    assert [keeps_pace(cpu, backends) for backends in (["cpu"], ["cpu", "cuda"])] == [True, True]
    assert [keeps_pace(cuda, backends) for backends in (["cpu"], ["cpu", "metal"])] == [False, True]


def test_a_refusal_of_a_node_tells_numbers_and_the_code_that_fits() -> None:
    small = NodeView("andes", NodeState.READY, ("cpu",), (CPU,), 2048)
    tight = choose_node([small], Wants("demo"), 5222)
    assert tight.code is ErrorCode.INSUFFICIENT_RAM
    assert tight.message == "andes has 2.0 GiB free, the model needs 5.1 GiB"
    assert choose_node([], Wants("demo"), None).code is ErrorCode.NODE_UNREACHABLE
    assert choose_node([small], Wants("demo", node="x"), None).code is ErrorCode.NODE_NOT_FOUND
    assert choose_node([small], Wants("demo", backend="cuda"), None).code is ErrorCode.BACKEND_UNAVAILABLE
    assert choose_node([small], Wants("demo", device="cuda:1"), None).code is ErrorCode.DEVICE_NOT_FOUND
    gone = NodeView("bolivia", NodeState.UNREACHABLE, ("cpu",), (CPU,), 9000)
    assert choose_node([gone], Wants("demo"), None).code is ErrorCode.NODE_UNREACHABLE
    assert choose_node([gone, small], Wants("demo"), 5222).code is ErrorCode.NO_CAPACITY
    with_card = NodeView("cusco", NodeState.READY, ("cpu", "cuda"), (CPU, GPU), 2048)
    assert choose_node([with_card], Wants("demo"), 5222).node == "cusco"
    assert choose_node([with_card], Wants("demo", backend="cuda"), 7000).code is ErrorCode.INSUFFICIENT_VRAM
