"""Which accepted tasks and results survive the orchestrator's end?  (`TaskStore`)"""

import sqlite3
from dataclasses import dataclass
from typing import Final

import msgspec

from arriero.contracts.records import TaskRecord
from arriero.runtime.sqlite import Database

#: Finished tasks beyond these are forgotten, the oldest first.
FINISHED_MAX: Final = 10_000
#: They are looked for once in so many.
_PRUNE_EVERY: Final = 100


@dataclass(frozen=True, slots=True)
class StoredTask:
    """One accepted task as it lies on disk."""

    record: TaskRecord
    body: bytes
    body_sha256: str
    request_id: str
    is_owned: bool
    run: int
    idempotency_key: str | None


class TaskStore:
    """The table of tasks.  What a method acknowledged is on disk."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._finished = 0

    async def accept(self, task: StoredTask) -> None:
        """Keep an accepted task; one that is there already stays as it is."""
        await self._database.execute(
            "INSERT OR IGNORE INTO tasks"
            " (task_id, created_unix, is_owned, request_id, idempotency_key, body, body_sha256, run, record)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                task.record.task_id,
                task.record.created_unix,
                int(task.is_owned),
                task.request_id,
                task.idempotency_key,
                task.body,
                task.body_sha256,
                task.run,
                msgspec.json.encode(task.record),
            ),
        )

    async def begin_again(self, task_id: str, run: int) -> None:
        """Keep that a task was begun again."""
        await self._database.execute("UPDATE tasks SET run = ? WHERE task_id = ?", (run, task_id))

    async def finish(self, record: TaskRecord) -> None:
        """Keep a task's result."""
        await self._database.execute(
            "UPDATE tasks SET finished_unix = ?, record = ? WHERE task_id = ?",
            (record.finished_unix, msgspec.json.encode(record), record.task_id),
        )
        self._finished += 1
        if self._finished % _PRUNE_EVERY == 1:
            await self._database.execute(
                "DELETE FROM tasks WHERE task_id IN (SELECT task_id FROM tasks"
                " WHERE finished_unix IS NOT NULL ORDER BY finished_unix DESC LIMIT -1 OFFSET ?)",
                (FINISHED_MAX,),
            )

    async def record(self, task_id: str) -> TaskRecord | None:
        """Return a task as it was last kept."""
        row = await self._database.fetch_one("SELECT record FROM tasks WHERE task_id = ?", (task_id,))
        return None if row is None else msgspec.json.decode(row["record"], type=TaskRecord)

    async def by_key(self, idempotency_key: str) -> StoredTask | None:
        """Return the newest task that was accepted with a key."""
        row = await self._database.fetch_one(
            "SELECT * FROM tasks WHERE idempotency_key = ? ORDER BY created_unix DESC LIMIT 1",
            (idempotency_key,),
        )
        return None if row is None else _task(row)

    async def open_tasks(self) -> list[StoredTask]:
        """Return the tasks without a result, the oldest first."""
        rows = await self._database.fetch_all(
            "SELECT * FROM tasks WHERE finished_unix IS NULL ORDER BY created_unix, task_id"
        )
        return [_task(row) for row in rows]


def _task(row: sqlite3.Row) -> StoredTask:
    return StoredTask(
        record=msgspec.json.decode(row["record"], type=TaskRecord),
        body=row["body"],
        body_sha256=row["body_sha256"],
        request_id=row["request_id"],
        is_owned=bool(row["is_owned"]),
        run=row["run"],
        idempotency_key=row["idempotency_key"],
    )
