"""Which tasks were accepted, and how far are they?  (`TaskRegistry`)

`task` is one of them with its events; `task_run` does the work itself.
"""

import asyncio
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import msgspec

from arriero.contracts import ids, refs
from arriero.contracts.errors import ArrieroError, ErrorBody, ErrorCode, fail
from arriero.contracts.events import TaskAccepted, TaskFailed
from arriero.contracts.records import TaskRecord
from arriero.contracts.requests import TaskBody
from arriero.contracts.states import TaskState
from arriero.orchestrator.exchange import Exchange, Exchanges
from arriero.orchestrator.feed import Feed
from arriero.orchestrator.store.tasks import StoredTask, TaskStore
from arriero.orchestrator.task import Task
from arriero.orchestrator.task_run import TaskRunner
from arriero.runtime import logs
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy

#: Finished tasks whose events can still be read, and the memory those may take.
HISTORY_TASKS_MAX: Final = 200
HISTORY_BYTES_MAX: Final = 64 * 1024 * 1024
KEY_CHARS_MAX: Final = 255


@dataclass(frozen=True, slots=True)
class Accepted:
    """A task that was accepted; only the record of one whose events are not in memory any more."""

    task: Task | TaskRecord
    #: False where its idempotency key came before.
    is_new: bool


class TaskRegistry:
    """All tasks of this orchestrator."""

    def __init__(
        self,
        store: TaskStore,
        runner: TaskRunner,
        exchanges: Exchanges,
        feed: Feed,
        group: asyncio.TaskGroup,
        clock: Clock,
        entropy: Entropy,
        *,
        default_model: str,
    ) -> None:
        self._store = store
        self._runner = runner
        self._exchanges = exchanges
        self._feed = feed
        self._group = group
        self._clock = clock
        self._entropy = entropy
        self._default_model = default_model
        self._open: dict[str, Task] = {}
        self._finished: OrderedDict[str, Task] = OrderedDict()
        self._finished_bytes = 0
        self._by_key: dict[str, tuple[str, str]] = {}
        self._key_lock = asyncio.Lock()
        self._is_stopping = False
        self._log = logs.get("arriero.tasks")

    # --- Accepting -----------------------------------------------------------------------

    async def accept(
        self, body: TaskBody, *, request_id: str, remaining_ms: float | None, is_owned: bool, key: str
    ) -> Accepted:
        """Accept a task and start it; with an idempotency `key` seen before, return that task.

        A task that is not owned is on disk when this returns.
        Raises INVALID_REQUEST, INVALID_MODEL_REFERENCE, INSUFFICIENT_DISK.
        """
        body = self._checked(body)
        if not key:
            return Accepted(
                await self._begin(body, request_id, remaining_ms, is_owned=is_owned, key="", digest=""), True
            )
        if len(key) > KEY_CHARS_MAX or not key.isprintable():
            fail(
                ErrorCode.INVALID_REQUEST,
                f"Idempotency-Key has {len(key)} characters, the limit is {KEY_CHARS_MAX} printable ones",
                param="Idempotency-Key",
            )
        digest = hashlib.sha256(msgspec.json.encode(body)).hexdigest()
        async with self._key_lock:
            found = await self._seen(key, digest)
            if found is not None:
                return Accepted(found, False)
            return Accepted(
                await self._begin(body, request_id, remaining_ms, is_owned=is_owned, key=key, digest=digest),
                True,
            )

    def _checked(self, body: TaskBody) -> TaskBody:
        given = [name for name in ("prompt", "prompt_ids", "messages") if getattr(body, name) is not None]
        if len(given) != 1:
            fail(
                ErrorCode.INVALID_REQUEST,
                f"exactly one of prompt, prompt_ids and messages: {' and '.join(given) or 'none'} given",
                param=given[1] if given else "prompt",
            )
        model = body.model or self._default_model
        refs.parse(model)
        return msgspec.structs.replace(body, model=model)

    async def _seen(self, key: str, digest: str) -> Task | TaskRecord | None:
        task_id, known_digest = self._by_key.get(key, ("", ""))
        if not task_id:
            stored = await self._store.by_key(key)
            if stored is None:
                return None
            task_id, known_digest = stored.record.task_id, stored.body_sha256
        if digest != known_digest:
            fail(
                ErrorCode.INVALID_REQUEST,
                "this Idempotency-Key came before with another request",
                param="Idempotency-Key",
                task_id=task_id,
            )
        found = self.find(task_id) or await self._store.record(task_id)
        state = found.record.state if isinstance(found, Task) else found.state if found else None
        # Whoever lost the connection comes back with its key to have the work done after all.
        return None if state in (None, TaskState.CANCELLED) else found

    async def _begin(
        self, body: TaskBody, request_id: str, remaining_ms: float | None, *, is_owned: bool, key: str,
        digest: str,
    ) -> Task:  # fmt: skip
        record = TaskRecord(
            task_id=ids.task_id(self._entropy.hex(16)),
            state=TaskState.ACCEPTED,
            model=body.model or "",
            created_unix=self._clock.wall_s(),
        )
        task = Task(record, body, request_id=request_id, is_owned=is_owned, feed=self._feed)
        stored = StoredTask(
            record=record,
            body=msgspec.json.encode(body),
            body_sha256=digest,
            request_id=request_id,
            is_owned=is_owned,
            run=1,
            idempotency_key=key or None,
        )
        if key:
            self._by_key[key] = (task.task_id, digest)
        if is_owned:
            # Its client hears of every failure itself and need not wait for the disk.
            self._group.create_task(self._save(stored), name=f"save-{task.task_id}")
        else:
            try:
                await self._store.accept(stored)
            except BaseException:
                self._by_key.pop(key, None)
                raise
        self._start(task, remaining_ms)
        return task

    def _start(self, task: Task, remaining_ms: float | None) -> None:
        self._open[task.task_id] = task
        self._group.create_task(self._run(task, remaining_ms), name=f"task-{task.task_id}")

    async def _save(self, stored: StoredTask) -> None:
        try:
            await self._store.accept(stored)
        except ArrieroError as error:
            self._log.error("task not kept", task_id=stored.record.task_id, code=str(error.code))

    # --- Running -------------------------------------------------------------------------

    async def _run(self, task: Task, remaining_ms: float | None) -> None:
        again = f", begun again for the {task.run - 1}. time" if task.run > 1 else ""
        task.tell(
            TaskAccepted(
                task_id=task.task_id, actor="orchestrator", message=f"accepted {task.task_id}{again}"
            )
        )
        exchange = Exchange(task.gone, remaining_ms)
        failure: ArrieroError | None = None
        try:
            await self._exchanges.run(exchange, lambda: self._runner.run(task, exchange))
            if exchange.is_gone:
                failure = ArrieroError(ErrorCode.REQUEST_CANCELLED)
        except ArrieroError as error:
            failure = error
        except Exception:  # noqa: BLE001  The edge: readers are told, the log has the traceback.
            self._log.exception("task failed", task_id=task.task_id)
            failure = ArrieroError(ErrorCode.INTERNAL_ERROR)
        if self._is_stopping and failure is not None and not task.is_owned:
            # It stays open on disk: the next orchestrator runs it again.
            task.tell(TaskFailed(error=failure.body()))
            task.tell_end(is_good=False)
            self._open.pop(task.task_id, None)
            return
        await self._finish(task, failure)

    async def _finish(self, task: Task, failure: ArrieroError | None) -> None:
        body: ErrorBody | None = None
        if failure is not None:
            body = failure.body()
            task.tell(TaskFailed(error=body, actor="orchestrator", message=failure.message))
        state = _final_state(failure)
        task.change(finished_unix=self._clock.wall_s(), error=body, text="".join(task.texts))
        if failure is not None:
            self._runner.count_failure(failure)
            task.change(completion_tokens=len(task.texts))
        task.step(state)
        task.tell_end(is_good=failure is None)
        self._log.info(
            "task", task_id=task.task_id, state=str(state), worker_id=task.record.worker_id,
            tokens=task.record.completion_tokens, code=str(failure.code) if failure else None,
        )  # fmt: skip
        self._open.pop(task.task_id, None)
        self._remember(task)
        try:
            await self._store.finish(task.record)
        except ArrieroError as error:
            self._log.error("result not kept", task_id=task.task_id, code=str(error.code))

    def _remember(self, task: Task) -> None:
        self._finished[task.task_id] = task
        self._finished_bytes += task.frames_bytes
        while len(self._finished) > HISTORY_TASKS_MAX or (
            self._finished_bytes > HISTORY_BYTES_MAX and len(self._finished) > 1
        ):
            _, old = self._finished.popitem(last=False)
            self._finished_bytes -= old.frames_bytes
            self._by_key = {key: seen for key, seen in self._by_key.items() if seen[0] != old.task_id}

    async def resume(self) -> None:
        """Begin again what an orchestrator before us left open; cancel what lost its reader with it."""
        for stored in await self._store.open_tasks():
            body = msgspec.json.decode(stored.body, type=TaskBody)
            task = Task(
                msgspec.structs.replace(stored.record, state=TaskState.ACCEPTED),
                body,
                request_id=f"{stored.request_id[:100]}.r{stored.run + 1}",
                run=stored.run + 1,
                is_owned=stored.is_owned,
                feed=self._feed,
            )
            if stored.is_owned:
                lost = ArrieroError(ErrorCode.REQUEST_CANCELLED, "the orchestrator ended while it ran")
                await self._finish(task, lost)
            else:
                await self._store.begin_again(task.task_id, task.run)
                self._start(task, body.timeout * 1000 if body.timeout else None)

    # --- Reading -------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._open)

    def open_records(self) -> list[TaskRecord]:
        """Return the tasks that are not finished, without their texts."""
        return [msgspec.structs.replace(task.record, text="") for task in self._open.values()]

    def find(self, task_id: str) -> Task | None:
        """Return a task whose events are in memory."""
        return self._open.get(task_id) or self._finished.get(task_id)

    async def record(self, task_id: str) -> TaskRecord:
        """Return any task's record.  Raises NOT_FOUND."""
        task = self.find(task_id)
        record = task.shown() if task is not None else await self._store.record(task_id)
        if record is None:
            fail(ErrorCode.NOT_FOUND, f"no task {task_id!r}", task_id=task_id)
        return record

    async def with_events(self, task_id: str) -> Task:
        """Return a task whose events can be read.  Raises NOT_FOUND."""
        task = self.find(task_id)
        if task is None:
            await self.record(task_id)
            fail(
                ErrorCode.NOT_FOUND,
                f"the events of {task_id} are not kept any more; its result is at /v1/tasks/{task_id}",
                task_id=task_id,
            )
        return task

    async def cancel(self, task_id: str) -> None:
        """Cancel a task; nothing happens to one that is over.  Raises NOT_FOUND."""
        task = self._open.get(task_id)
        if task is None:
            await self.record(task_id)
        else:
            task.cancelled.set()

    def stopping(self) -> None:
        """Know that tasks cut off from now on are to be begun again by the next orchestrator."""
        self._is_stopping = True


def _final_state(failure: ArrieroError | None) -> TaskState:
    if failure is None:
        return TaskState.DONE
    if failure.code is ErrorCode.REQUEST_CANCELLED:
        return TaskState.CANCELLED
    if failure.code is ErrorCode.REQUEST_TIMEOUT:
        return TaskState.TIMED_OUT
    return TaskState.FAILED
