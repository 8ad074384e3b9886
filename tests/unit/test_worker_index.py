"""Do the indexes answer as a look at everything would?"""

from collections.abc import Callable
from dataclasses import replace

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_placement import WANTS, WORKERS

from arriero.contracts.records import WorkerRecord
from arriero.contracts.states import NodeState, WorkerState
from arriero.domain.placement import Wants, WorkerIndex, WorkerView, choose_worker
from arriero.domain.workers import WorkerRegistry

FULL_WANTS = st.builds(
    lambda wants, labels: replace(wants, labels=labels), WANTS, st.sampled_from([(), (("gpu", "big"),)])
)
CHANGES: list[Callable[[WorkerView], WorkerView]] = [
    lambda w: replace(w, slots_free=0, queued=w.queued + 1),
    lambda w: replace(w, slots_free=4),
    lambda w: replace(w, state=WorkerState.IDLE, load_fraction=1.0),
    lambda w: replace(w, node_state=NodeState.DRAINING),
    lambda w: replace(w, leaves_for="hf:c/d"),
    lambda w: replace(w, leaves_for=""),
    lambda w: replace(w, speed=w.speed + 33.0),
    lambda w: replace(w, labels={"gpu": "big"}),
    lambda w: replace(w, model_ref="demo"),
    lambda w: replace(w, node="cusco"),
]


@given(
    workers=WORKERS,
    steps=st.lists(st.tuples(st.integers(0, 7), st.none() | st.sampled_from(CHANGES)), max_size=60),
    wants=st.lists(FULL_WANTS, min_size=1, max_size=4),
)
def test_the_best_of_the_index_is_the_choice_among_all(
    workers: list[WorkerView],
    steps: list[tuple[int, Callable[[WorkerView], WorkerView] | None]],
    wants: list[Wants],
) -> None:
    index = WorkerIndex()
    for worker in workers:
        index.put(worker)
    for number, change in steps:
        worker_id = f"w-{number:012x}"
        found = index.find(worker_id)
        if change is None:
            index.drop(worker_id)
        elif found is not None:
            index.put(change(found))
        for wanted in wants:
            best = index.best(wanted)
            expected = choose_worker(list(index), wanted)
            assert (best.worker_id if best is not None else None) == expected.worker_id
            assert choose_worker(index.of_model(wanted.model_ref), wanted) == expected
    for name in ("andes", "bolivia", "cusco"):
        assert {w.worker_id for w in index.of_node(name)} == {w.worker_id for w in index if w.node == name}


def test_an_index_forgets_what_is_old() -> None:
    index = WorkerIndex()
    view = WorkerView("w-1", "andes", "demo", "cpu", "cpu", WorkerState.IDLE, 4, 0)
    for number in range(10_000):
        index.put(replace(view, slots_free=number % 4))
    assert len(index._heaps["demo"]) < 100
    index.drop("w-1")
    assert not index._heaps and len(index) == 0


def record(worker_id: str, model_ref: str, node: str, started: float) -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id, node=node, url="", model_ref=model_ref, backend="cpu", device="cpu",
        state=WorkerState.IDLE, slots_total=4, slots_available=4, pid=1, started_unix=started,
        last_activity_unix=0.0,
    )  # fmt: skip


RECORDS = st.builds(
    record,
    st.sampled_from([f"w-{n}" for n in range(6)]),
    st.sampled_from(["demo", "hf:a/b"]),
    st.sampled_from(["andes", "bolivia"]),
    st.sampled_from([1.0, 2.0, 3.0]),
)


@given(st.lists(st.tuples(st.sampled_from(["observe", "remove", "update"]), RECORDS), max_size=40))
def test_the_registry_answers_as_if_it_sorted_everything(steps: list[tuple[str, WorkerRecord]]) -> None:
    registry = WorkerRegistry()
    known: dict[str, WorkerRecord] = {}
    for what, seen in steps:
        if what == "remove":
            assert registry.remove(seen.worker_id) == known.pop(seen.worker_id, None)
        elif what == "observe":
            registry.observe(seen)
            known[seen.worker_id] = seen
        elif seen.worker_id in known:
            registry.update(seen.worker_id, slots_available=1)
            known[seen.worker_id] = msgspec.structs.replace(known[seen.worker_id], slots_available=1)
        expected = sorted(known.values(), key=lambda r: (r.started_unix, r.worker_id))
        assert list(registry) == expected == registry.live() == registry.select()
        for model_ref in (None, "demo", "hf:a/b", "other"):
            for node in (None, "andes", "cusco"):
                assert registry.select(model_ref=model_ref, node=node) == [
                    r for r in expected if model_ref in (None, r.model_ref) and node in (None, r.node)
                ]
