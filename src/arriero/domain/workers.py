"""Which workers are there, and what may each become?  (`WorkerRegistry`)

Held by the agent for its machine and by the orchestrator for the pool.  Pure: whoever holds it
tells it what was seen, and reads from it what is so.
"""

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
        self._on_change = on_change

    def __iter__(self) -> Iterator[WorkerRecord]:
        return iter(sorted(self._records.values(), key=lambda r: (r.started_unix, r.worker_id)))

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
        self._records[record.worker_id] = record
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
            self._records[worker_id] = after
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
            self._records[record.worker_id] = record
            self._tell(old, record)

    def remove(self, worker_id: str) -> WorkerRecord | None:
        """Forget a worker; None if it was not known."""
        return self._records.pop(worker_id, None)

    def select(self, *, model_ref: str | None = None, node: str | None = None) -> list[WorkerRecord]:
        """Return the workers of a model and a node, by start."""
        return [
            record
            for record in self
            if (model_ref is None or record.model_ref == model_ref) and (node is None or record.node == node)
        ]

    def live(self) -> list[WorkerRecord]:
        """Return the workers whose state is not final."""
        return [record for record in self if record.state not in WORKERS.final]

    def ready(self) -> list[WorkerRecord]:
        """Return the workers that take requests."""
        return [record for record in self if record.state in READY]

    def _tell(self, before: WorkerRecord | None, after: WorkerRecord) -> None:
        if self._on_change is not None:
            self._on_change(before, after)


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
