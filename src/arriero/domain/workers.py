"""Which workers are there, and what may each become?  (`WorkerRegistry`)

Held by the agent for its machine and by the orchestrator for the pool.  Pure: whoever holds it
tells it what was seen, and reads from it what is so.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from arriero.contracts.errors import ErrorCode, fail
from arriero.contracts.records import WorkerRecord
from arriero.contracts.states import WorkerState
from arriero.domain.worker_states import READY, WORKERS


class WorkerRegistry:
    """Records of workers by id.  `on_change` hears of each change, with the record before (or None)."""

    def __init__(self, on_change: Callable[[WorkerRecord | None, WorkerRecord], None] | None = None) -> None:
        self._records: dict[str, WorkerRecord] = {}
        # Ids by start, so that nothing is sorted to be read; and by what they are looked up by.
        self._order: list[tuple[float, str]] = []
        self._by_model: dict[str, set[str]] = {}
        self._by_node: dict[str, set[str]] = {}
        self._on_change = on_change

    def __iter__(self) -> Iterator[WorkerRecord]:
        return iter([self._records[worker_id] for _, worker_id in self._order])

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, worker_id: str) -> bool:
        return worker_id in self._records

    def register(self, record: WorkerRecord) -> None:
        """Add a worker that is new.  Raises WORKER_ALREADY_REGISTERED if its id is known."""
        if record.worker_id in self._records:
            fail(
                ErrorCode.WORKER_ALREADY_REGISTERED,
                f"worker {record.worker_id} is registered already",
                worker_id=record.worker_id,
                state=str(self._records[record.worker_id].state),
            )
        self._keep(None, record)
        self._tell(None, record)

    def get(self, worker_id: str) -> WorkerRecord:
        """Return the record.  Raises WORKER_NOT_FOUND."""
        record = self._records.get(worker_id)
        if record is None:
            fail(ErrorCode.WORKER_NOT_FOUND, f"no worker {worker_id!r}", worker_id=worker_id)
        return record

    def find(self, worker_id: str) -> WorkerRecord | None:
        """Return the record, or None."""
        return self._records.get(worker_id)

    def update(self, worker_id: str, **changes: Any) -> WorkerRecord:
        """Change fields of a worker; a `state` among them must be an arrow of the table or the same.

        Raises WORKER_NOT_FOUND and INVALID_STATE_TRANSITION; then nothing is changed.
        """
        before = self.get(worker_id)
        state = changes.get("state", before.state)
        if state != before.state:
            WORKERS.check(before.state, state)
        after = msgspec.structs.replace(before, **changes)
        if after != before:
            self._keep(before, after)
            self._tell(before, after)
        return after

    def observe(self, record: WorkerRecord) -> None:
        """Take what another registry says of a worker: register it, or step to its state.

        States that were passed through between two observations are passed through here as well,
        by the shortest way of the table.  Raises INVALID_STATE_TRANSITION if there is none.
        """
        before = self._records.get(record.worker_id)
        if before is None:
            self.register(record)
            return
        for state in _way(before.state, record.state):
            WORKERS.check(before.state, state)
            before = msgspec.structs.replace(before, state=state)
        old = self._records[record.worker_id]
        if record != old:
            self._keep(old, record)
            self._tell(old, record)

    def remove(self, worker_id: str) -> WorkerRecord | None:
        """Forget a worker; None if it was not known."""
        record = self._records.pop(worker_id, None)
        if record is not None:
            self._unlist(record)
        return record

    def select(self, *, model_ref: str | None = None, node: str | None = None) -> list[WorkerRecord]:
        """Return the workers of a model and a node, by start."""
        if model_ref is None and node is None:
            return list(self)
        found = self._by_model.get(model_ref, set()) if model_ref is not None else None
        if node is not None:
            here = self._by_node.get(node, set())
            found = here if found is None else found & here
        records = [self._records[worker_id] for worker_id in found or ()]
        return sorted(records, key=_by_start)

    def live(self) -> list[WorkerRecord]:
        """Return the workers whose state is not final."""
        return [record for record in self if record.state not in WORKERS.final]

    def ready(self) -> list[WorkerRecord]:
        """Return the workers that take requests."""
        return [record for record in self if record.state in READY]

    def _keep(self, before: WorkerRecord | None, after: WorkerRecord) -> None:
        self._records[after.worker_id] = after
        if before is not None:
            if _place(before) == _place(after):
                return
            self._unlist(before)
        insort(self._order, _by_start(after))
        self._by_model.setdefault(after.model_ref, set()).add(after.worker_id)
        self._by_node.setdefault(after.node, set()).add(after.worker_id)

    def _unlist(self, record: WorkerRecord) -> None:
        del self._order[bisect_left(self._order, _by_start(record))]
        for index, key in ((self._by_model, record.model_ref), (self._by_node, record.node)):
            index[key].discard(record.worker_id)
            if not index[key]:
                del index[key]

    def _tell(self, before: WorkerRecord | None, after: WorkerRecord) -> None:
        if self._on_change is not None:
            self._on_change(before, after)


def _by_start(record: WorkerRecord) -> tuple[float, str]:
    return record.started_unix, record.worker_id


def _place(record: WorkerRecord) -> tuple[float, str, str]:
    return record.started_unix, record.model_ref, record.node


def _way(start: WorkerState, goal: WorkerState) -> list[WorkerState]:
    """Return the states after `start` on the shortest way to `goal`; [goal] if there is no way."""
    ways: dict[WorkerState, list[WorkerState]] = {start: []}
    todo = [start]
    for state in todo:
        for target in sorted(WORKERS.arrows[state]):
            if target not in ways:
                ways[target] = [*ways[state], target]
                todo.append(target)
    return ways.get(goal, [goal])
