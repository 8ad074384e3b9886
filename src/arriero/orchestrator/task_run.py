"""How is one task computed?  A worker's native token stream becomes the task's events."""

import asyncio
from typing import Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode, ErrorResponse, from_body
from arriero.contracts.events import (
    TaskDownloading,
    TaskEnd,
    TaskLoading,
    TaskPlacing,
    TaskQueued,
    TaskToken,
    TaskUsage,
)
from arriero.contracts.requests import TaskBody
from arriero.contracts.states import TaskState
from arriero.domain.placement import Wants, labels_of
from arriero.orchestrator.courier import (
    ERROR_BYTES_MAX,
    Counters,
    Courier,
    EventCutter,
    Refused,
    hop_headers,
    silence_limit_s,
)
from arriero.orchestrator.exchange import Exchange
from arriero.orchestrator.nodes import NodeRegistry
from arriero.orchestrator.relay import Tries, stalled
from arriero.orchestrator.scheduler import Lease, Scheduler, Waiting
from arriero.orchestrator.task import Task
from arriero.orchestrator.upstream import Connection, Lost, Silent
from arriero.runtime.asgi import BEAT_S
from arriero.runtime.clock import Clock

#: A task that nobody waits for at an open connection waits so long for a node to come back.
NODE_WAIT_S: Final = 60.0
_NOT_FOR_WORKERS: Final = frozenset({"model", "node", "backend", "device", "labels", "timeout"})


class _Frame(msgspec.Struct, frozen=True):
    """Any frame of a worker's native stream; it is known by the fields it has."""

    token: str | None = None
    id: int = -1
    index: int = -1
    position: int | None = None
    prompt_processed: int | None = None
    done: bool = False
    total_tokens: int = 0
    duration_ms: int = 0
    finish_reason: str = ""
    prompt_tokens: int = 0


_FRAME: Final = msgspec.json.Decoder(_Frame)


class TaskRunner:
    """Runs tasks, each over as many workers as it takes."""

    def __init__(
        self,
        registry: NodeRegistry,
        scheduler: Scheduler,
        courier: Courier,
        counters: Counters,
        clock: Clock,
        *,
        stall_s: float,
    ) -> None:
        self._registry = registry
        self._scheduler = scheduler
        self._courier = courier
        self._counters = counters
        self._clock = clock
        self._stall_s = silence_limit_s(stall_s)

    def count_failure(self, error: ArrieroError) -> None:
        """Count a task that did not come to its end."""
        if error.code is ErrorCode.REQUEST_CANCELLED:
            self._counters.cancelled += 1
        else:
            self._counters.failures += 1

    async def run(self, task: Task, exchange: Exchange) -> None:
        """Compute a task; its events are told as they come.  Raises why it could not be."""
        self._counters.requests += 1
        body = _native(task.body)
        tries = Tries()
        if not task.is_owned:
            await self._some_node()
        while True:
            task.step(TaskState.PLACING)
            lease = await self._place(task, tries)
            with lease:
                told = len(task.texts)
                try:
                    await self._compute(task, lease, exchange, body)
                    return
                except Silent as silent:
                    raise stalled(lease, silent) from silent
                except Lost as lost:
                    if len(task.texts) > told or not tries.may_follow_loss(lease.worker_id):
                        raise await self._scheduler.lost(lease, lost.why) from lost
                    why = f"broke off ({lost.why})"
                    wait_s = 0.0
                except Refused as refused:
                    again_s = tries.after_refusal(lease.worker_id, refused.error)
                    if again_s is None:
                        raise refused.error from refused
                    why, wait_s = f"refused ({refused.error.code})", again_s
            self._counters.retries += 1
            message = f"{lease.worker_id} on {lease.node} {why} before the first token: once more"
            task.tell(TaskPlacing(actor="orchestrator", message=message))
            await self._clock.sleep_s(wait_s)

    async def _place(self, task: Task, tries: Tries) -> Lease:
        body = task.body
        wants = Wants(
            model_ref=body.model or "",
            node=body.node,
            backend=body.backend,
            device=body.device,
            excluded=frozenset(tries.excluded),
            labels=labels_of(body.labels),
        )

        async def say(step: Waiting | None) -> None:
            if step is None:
                return
            if isinstance(step, TaskDownloading | TaskLoading):
                task.step(TaskState.PROVISIONING)
            task.tell(step)

        lease = await self._scheduler.lease(wants, say)
        task.change(worker_id=lease.worker_id, node=lease.node)
        task.tell(
            TaskPlacing(node=lease.node, worker_id=lease.worker_id, actor="orchestrator", message=lease.why)
        )
        return lease

    async def _compute(self, task: Task, lease: Lease, exchange: Exchange, body: bytes) -> None:
        headers = hop_headers(exchange, task.request_id, accept="text/event-stream")
        connection, head = await self._courier.bring(
            lease.address, "POST", "/v1/inference/stream", headers=headers, body=body
        )
        try:
            if head.status >= 300:
                raise Refused(head, await connection.read_all(ERROR_BYTES_MAX))
            await self._read(task, connection)
        finally:
            connection.release()

    async def _read(self, task: Task, connection: Connection) -> None:
        """Turn the worker's frames into events.  Raises Lost, Silent, and the error of an error event."""
        connection.beat(min(BEAT_S, self._stall_s))
        cutter = EventCutter()
        while True:
            chunk = await connection.read(stall_s=self._stall_s)
            if chunk is None:
                continue
            if chunk == b"":
                cutter.check_end()
                raise Lost("the stream ended without its last frame")
            whole = cutter.cut(chunk)
            self._counters.bytes_relayed += len(whole)
            is_error = False
            for line in whole.split(b"\n"):
                if line.startswith(b"data: "):
                    if is_error:
                        _raise_error(task, line[6:])
                    if line != b"data: [DONE]" and self._take(task, line[6:]):
                        await _drain(connection)
                        return
                elif line.startswith(b"event: error"):
                    is_error = True

    def _take(self, task: Task, data: bytes) -> bool:
        """Take one frame; return whether it is the last one."""
        try:
            frame = _FRAME.decode(data)
        except msgspec.DecodeError as error:
            raise Lost("a frame that is none of ours") from error
        if frame.token is not None:
            if not task.texts:
                task.step(TaskState.RUNNING)
            task.texts.append(frame.token)
            task.tell(TaskToken(token=frame.token, id=frame.id, index=frame.index))
        elif frame.position is not None:
            task.step(TaskState.QUEUED)
            message = f"all slots compute: number {frame.position} in the queue"
            task.tell(TaskQueued(position=frame.position, actor=task.record.worker_id or "", message=message))
        elif frame.prompt_processed is not None:
            task.step(TaskState.RUNNING)
        elif frame.done:
            task.step(TaskState.RUNNING)
            task.change(
                prompt_tokens=frame.prompt_tokens,
                completion_tokens=frame.total_tokens,
                finish_reason=frame.finish_reason,
            )
            task.tell(
                TaskUsage(
                    prompt_tokens=frame.prompt_tokens,
                    completion_tokens=frame.total_tokens,
                    duration_ms=frame.duration_ms,
                    actor=task.record.worker_id or "",
                    message=f"{frame.total_tokens} tokens in {frame.duration_ms} ms",
                )
            )
            task.tell(
                TaskEnd(
                    finish_reason=frame.finish_reason,
                    actor=task.record.worker_id or "",
                    message=f"the answer is whole: {frame.finish_reason}",
                )
            )
            return True
        return False

    async def _some_node(self) -> None:
        """Wait for a node, within limits: nobody waits at a connection for this task."""
        try:
            async with asyncio.timeout(NODE_WAIT_S):
                while not self._registry.is_ready():
                    await self._registry.changed.wait()
        except TimeoutError:
            return


def _native(body: TaskBody) -> bytes:
    """Return the worker's body: what the task asks for, without what is for the orchestrator alone."""
    given = msgspec.to_builtins(body)
    return msgspec.json.encode(
        {name: value for name, value in given.items() if value is not None and name not in _NOT_FOR_WORKERS}
    )


def _raise_error(task: Task, data: bytes) -> None:
    try:
        error = from_body(msgspec.json.decode(data, type=ErrorResponse).error)
    except msgspec.DecodeError as undecodable:
        raise Lost("an error that is none of ours") from undecodable
    if error.code is ErrorCode.WORKER_LOST and not task.texts:
        raise Lost("its engine died")
    raise error


async def _drain(connection: Connection) -> None:
    """Read what is left after the last frame, so that the connection can be used again."""
    try:
        async with asyncio.timeout(1.0):
            while await connection.read() != b"":
                pass
    except (TimeoutError, Lost):
        return
