"""Deadlines, restart intensity, names of nodes, the registry of workers, errors that crossed the wire."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.contracts import ids
from arriero.contracts.errors import ArrieroError, ErrorBody, ErrorCode, from_body
from arriero.contracts.records import WorkerRecord
from arriero.contracts.states import WorkerState
from arriero.domain import deadlines
from arriero.domain.node_names import free_name
from arriero.domain.restarts import CrashHistory, RestartPolicy
from arriero.domain.workers import WorkerRegistry


@given(st.floats(1.0, deadlines.REMAINING_MS_MAX))
def test_a_deadline_shrinks_at_every_hop_and_stays_positive(remaining_ms: float) -> None:
    inner = deadlines.for_next_hop(remaining_ms)
    assert 1.0 <= inner <= remaining_ms
    assert inner < remaining_ms or remaining_ms == 1.0


def test_the_tightest_limit_counts() -> None:
    assert deadlines.tightest(None, 500.0, 200.0) == 200.0
    assert deadlines.tightest(None, None) is None


@pytest.mark.parametrize("text", ["0", "-5", "nan", "inf", "1e99", "soon", ""])
def test_a_deadline_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        deadlines.parse_header(text)


@pytest.mark.parametrize("code", ["NOT_FOUND", "NOBODY_KNOWS"])
def test_an_error_from_elsewhere_may_have_details_of_any_name(code: str) -> None:
    details = {"code": 1, "message": [], "self": {}, "port": 7}
    error = from_body(ErrorBody(code, "said", details))
    assert error.details == details and error.message.endswith("said")


def test_three_crashes_in_the_window_refuse_the_model_for_a_growing_while() -> None:
    history = CrashHistory(RestartPolicy(intensity_max=3, window_s=60, refuse_s=60))
    for at in (0.0, 10.0, 20.0):
        assert history.refused_for_s(at) == 0
        history.crashed(at)
    assert history.refused_for_s(20.0) == 60.0
    assert history.refused_for_s(80.0) == 0.0
    for at in (81.0, 82.0, 83.0):
        history.crashed(at)
    assert history.refused_for_s(83.0) == 120.0


def test_crashes_far_apart_refuse_nothing() -> None:
    history = CrashHistory()
    for at in range(0, 600, 40):
        history.crashed(float(at))
    assert history.refused_for_s(600.0) == 0


@given(st.from_regex(ids.NODE_NAME, fullmatch=True), st.integers(0, 12))
def test_a_name_that_is_taken_gives_another_one(name: str, others: int) -> None:
    taken: list[str] = []
    for _ in range(others + 1):
        taken.append(free_name(name, taken))
    assert taken[0] == name and len(set(taken)) == len(taken)
    assert all(ids.NODE_NAME.fullmatch(each) for each in taken)


def record(
    worker_id: str = "w-000000000001", state: WorkerState = WorkerState.STARTING, **more: object
) -> WorkerRecord:
    base = WorkerRecord(
        worker_id=worker_id, node="a", url="http://127.0.0.1:8001", model_ref="demo", backend="cpu", device="cpu",
        state=state, slots_total=4, slots_available=4, pid=1, started_unix=0.0, last_activity_unix=0.0,
    )  # fmt: skip
    return msgspec.structs.replace(base, **more)


def test_a_worker_registers_once() -> None:
    registry = WorkerRegistry()
    registry.register(record())
    with pytest.raises(ArrieroError) as refused:
        registry.register(record())
    assert refused.value.code is ErrorCode.WORKER_ALREADY_REGISTERED


def test_an_impossible_step_changes_nothing_and_tells_nobody() -> None:
    told: list[WorkerState] = []
    registry = WorkerRegistry(lambda before, after: told.append(after.state))
    registry.register(record())
    with pytest.raises(ArrieroError) as refused:
        registry.update("w-000000000001", state=WorkerState.BUSY, pid=7)
    assert refused.value.code is ErrorCode.INVALID_STATE_TRANSITION
    assert (registry.get("w-000000000001").pid, told) == (1, [WorkerState.STARTING])


def test_an_unknown_worker_is_named() -> None:
    with pytest.raises(ArrieroError) as refused:
        WorkerRegistry().get("w-00000000000f")
    assert (refused.value.code, refused.value.details["worker_id"]) == (
        ErrorCode.WORKER_NOT_FOUND,
        "w-00000000000f",
    )


def test_states_passed_between_two_observations_are_passed_here_too() -> None:
    registry = WorkerRegistry()
    registry.observe(record())
    registry.observe(record(state=WorkerState.BUSY))
    assert registry.ready()[0].state is WorkerState.BUSY
    registry.observe(record(state=WorkerState.STOPPED))
    with pytest.raises(ArrieroError):
        registry.observe(record(state=WorkerState.IDLE))
    assert registry.live() == []


def test_the_registry_selects_by_model_and_node() -> None:
    registry = WorkerRegistry()
    registry.register(record("w-000000000001"))
    registry.register(record("w-000000000002", model_ref="file:///m.gguf", node="b"))
    assert [r.worker_id for r in registry.select(model_ref="demo")] == ["w-000000000001"]
    assert [r.worker_id for r in registry.select(node="b")] == ["w-000000000002"]
    assert registry.remove("w-000000000001") is not None
    assert len(registry) == 1
