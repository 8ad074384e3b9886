"""Which worker computes a request, and what does the person hear while there is none yet?"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Final, TypeAlias

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.events import TaskDownloading, TaskLoading, TaskPlacing
from arriero.contracts.records import WorkerExit, WorkerRecord
from arriero.contracts.states import NodeState, WorkerState
from arriero.domain.placement import Wants, WorkerChoice, choose_worker
from arriero.domain.placement_workers import WorkerView, chosen, keeps_pace, widened
from arriero.domain.worker_states import READY, WORKERS
from arriero.orchestrator.nodes import NodeRegistry
from arriero.orchestrator.provisioning import Job, ModelProvisioner
from arriero.orchestrator.upstream import Address
from arriero.orchestrator.views import PoolViews
from arriero.runtime import logs
from arriero.runtime.clock import Clock

#: Between two steps of loading that are told.
TELL_EVERY_S: Final = 0.1
#: Between two looks of whoever waits for a worker that is made: another one may be there sooner.
LOOK_S: Final = 0.25
#: Workers that end while somebody waits for them, before the wait is given up.
CHOICES_MAX: Final = 20
#: Between two looks for one more machine for a model whose slots are all taken.
WIDEN_EVERY_S: Final = 5.0
#: After a stream broke: so long the agent has to tell how its worker ended.
EXIT_NEWS_S: Final = 2.0

Waiting: TypeAlias = TaskPlacing | TaskDownloading | TaskLoading
#: Hears each step; None: still waiting, nothing new for a while.
Say: TypeAlias = Callable[[Waiting | None], Awaitable[None]]


class Lease:
    """A worker that takes one request; counted as busy until the lease ends."""

    def __init__(self, views: PoolViews, record: WorkerRecord, address: Address, why: str) -> None:
        self._views = views
        self.worker_id = record.worker_id
        self.node = record.node
        self.address = address
        #: Why this one was chosen.
        self.why = why

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._views.released(self.worker_id, self.node)


class Scheduler:
    """Chooses workers, and waits for those that are being made."""

    def __init__(
        self,
        registry: NodeRegistry,
        provisioner: ModelProvisioner,
        clock: Clock,
        *,
        beat_s: float,
        join_s: float,
        connect_s: float,
    ) -> None:
        self._registry = registry
        self._provisioner = provisioner
        self._clock = clock
        self._beat_s = beat_s
        # So long after our own start the agent may not have been found yet, and a machine not been reached.
        self._join_until_s = clock.monotonic_s() + join_s
        self._connect_until_s = clock.monotonic_s() + max(connect_s, join_s)
        self._widen_from_s = 0.0
        self._log = logs.get("arriero.placement")

    @property
    def requests_in_flight(self) -> int:
        """How many requests are with workers now."""
        return self._registry.views.requests_in_flight

    def requests_on(self, node: str) -> int:
        """Return how many requests are with the workers of a node now, whatever road they came."""
        return self._registry.views.requests_on(node)

    def choose(self, wants: Wants) -> WorkerChoice:
        """Return which worker would take a request now."""
        workers = self._registry.views.workers
        best = workers.best(wants)
        if best is not None:
            return chosen(best)
        return choose_worker(workers.of_model(wants.model_ref), wants)

    def try_lease(self, wants: Wants) -> Lease | None:
        """Return a lease on a worker that is ready; None if there is none at this moment."""
        best = self._registry.views.workers.best(wants)
        if best is None or best.state not in READY:
            return None
        if best.slots_free <= 0:
            self._widen(best, wants)
        record = self._registry.workers.get(best.worker_id)
        address = self._registry.address(record)
        why = chosen(best).message
        self._registry.views.leased(record.worker_id)
        return Lease(self._registry.views, record, address, why)

    def _widen(self, best: WorkerView, wants: Wants) -> None:
        """Have another machine begin with a model whose slots are all taken.

        It has the model on its disk, and room for it, so that nobody has to go.
        """
        now_s = self._clock.monotonic_s()
        if wants.node is not None or now_s < self._widen_from_s:
            return
        self._widen_from_s = now_s + WIDEN_EVERY_S
        wider = widened(best, self._registry.views.workers.of_model(wants.model_ref), wants)
        node = self._provisioner.room.spare(wider) if wider is not None else None
        if node is None or not keeps_pace(best, node.backends):
            return
        self._log.info("all slots are taken", model_ref=wants.model_ref, begins_on=node.name)
        self._provisioner.job(replace(wants, node=node.name, excluded=frozenset()))

    async def lease(self, wants: Wants, say: Say) -> Lease:
        """Return a lease on a worker, as long as it takes to make one; `say` hears each step.

        Raises why no worker can be had: NO_CAPACITY, NODE_UNREACHABLE, the download's or the
        worker's own error…
        """
        await self.joined(wants.node, wants.labels)
        for _ in range(CHOICES_MAX):
            lease = self.try_lease(wants)
            if lease is not None:
                return lease
            choice = self.choose(wants)
            worker_id = choice.worker_id
            await say(TaskPlacing(worker_id=worker_id, actor="orchestrator", message=choice.message))
            if worker_id is None:
                worker_id = await self._follow_job(self._provisioner.job(wants), wants, say)
            await self._follow_loading(worker_id, wants, say)
        fail(
            ErrorCode.NO_CAPACITY,
            f"no worker for {wants.model_ref} stayed: {CHOICES_MAX} were waited for",
            model_ref=wants.model_ref,
        )

    async def lost(self, lease: Lease, why: str) -> ArrieroError:
        """Return the error of a worker that broke off, with how it ended once its agent has told."""
        deadline_s = self._clock.monotonic_s() + EXIT_NEWS_S
        while self._registry.workers.find(lease.worker_id) is not None:
            left_s = deadline_s - self._clock.monotonic_s()
            if left_s <= 0 or not await self._changed(left_s):
                break
        try:
            ended = self._registry.worker(lease.worker_id)
        except ArrieroError:
            ended = None
        exit_ = ended.exit if ended is not None else None
        if exit_ is not None and exit_.code == ErrorCode.OUT_OF_MEMORY:
            return _exit_error(lease.worker_id, lease.node, exit_)
        shown = _exit_details(exit_) if exit_ is not None else {}
        how = f": {exit_.message}" if exit_ is not None and exit_.message else f" ({why})"
        return ArrieroError(
            ErrorCode.WORKER_LOST,
            f"worker {lease.worker_id} on {lease.node} broke off{how}",
            worker_id=lease.worker_id,
            node=lease.node,
            **shown,
        )

    # --- Waiting -------------------------------------------------------------------------

    async def joined(self, name: str | None, labels: Sequence[tuple[str, str]] = ()) -> None:
        """Right after our start, wait for the node that is asked for, or for any with these labels."""
        while not self._has_joined(name, labels):
            is_tried = NodeState.JOINING in self._meant(name, labels)
            until_s = self._connect_until_s if is_tried else self._join_until_s
            left_s = until_s - self._clock.monotonic_s()
            if left_s <= 0 or not await self._changed(left_s):
                return

    def _has_joined(self, name: str | None, labels: Sequence[tuple[str, str]]) -> bool:
        meant = self._meant(name, labels)
        if name is not None:
            return bool(meant) and NodeState.JOINING not in meant
        # Registered machines are connected to one by one: others being ready says nothing of these.
        return NodeState.READY in meant or (self._registry.is_ready() and NodeState.JOINING not in meant)

    def _meant(self, name: str | None, labels: Sequence[tuple[str, str]]) -> list[NodeState]:
        if name is not None:
            node = self._registry.find(name)
            return [node.state] if node is not None else []
        nodes = self._registry.nodes()
        return [node.state for node in nodes if set(labels) <= set(node.entry.labels.items())]

    async def _follow_job(self, job: Job, wants: Wants, say: Say) -> str:
        job.followers.append(wants)
        try:
            return await self._wait_for_job(job, wants, say)
        finally:
            self._provisioner.left(job, wants)

    async def _wait_for_job(self, job: Job, wants: Wants, say: Say) -> str:
        """Wait for the worker that is made, or for one that is there sooner.  Raises why there is none."""
        told = 0
        told_s = self._clock.monotonic_s()
        while True:
            if (fresh := next((step for step in job.steps if step[0] > told), None)) is not None:
                told, told_s = fresh[0], self._clock.monotonic_s()
                await say(fresh[1])
                continue
            if job.worker_id is not None:
                return job.worker_id
            best = self._registry.views.workers.best(wants)
            # One that loads may be the job's own, once that has begun with one.
            if best is not None and (best.state in READY or job.may_end):
                return best.worker_id
            if job.error is not None:
                raise _again(job.error)
            if await self._has_news(job):
                continue
            if self._clock.monotonic_s() - told_s >= self._beat_s:
                told_s = self._clock.monotonic_s()
                await say(None)

    async def _has_news(self, job: Job) -> bool:
        # In a large pool something changes all the time: not everybody who waits looks each time.
        try:
            async with asyncio.timeout(min(LOOK_S, self._beat_s)):
                await job.changed.wait()
        except TimeoutError:
            return False
        return True

    async def _follow_loading(self, worker_id: str, wants: Wants, say: Say) -> None:
        """Wait until a worker is ready, this or another one, or its node is gone.  Raises how it ended."""
        told = -1.0
        told_s = 0.0
        while True:
            record = self._registry.worker(worker_id)
            if record.state in WORKERS.final:
                raise _exit_error(worker_id, record.node, record.exit or WorkerExit())
            node = self._registry.node(record.node)
            if record.state in READY or node.state is not NodeState.READY:
                return
            if record.state is WorkerState.DRAINING:
                return
            best = self._registry.views.workers.best(wants)
            if best is not None and best.state in READY:
                return
            now_s = self._clock.monotonic_s()
            if record.state is WorkerState.LOADING and record.load_fraction > told:
                if now_s - told_s >= TELL_EVERY_S:
                    told, told_s = record.load_fraction, now_s
                    await say(_loading(record))
                    continue
                await self._changed(TELL_EVERY_S)
            elif not await self._changed(self._beat_s):
                await say(None)

    async def _changed(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._registry.changed.wait()
        except TimeoutError:
            return False
        return True


def _loading(record: WorkerRecord) -> TaskLoading:
    percent = round(record.load_fraction * 100)
    return TaskLoading(
        fraction=record.load_fraction,
        actor=record.node,
        message=f"{record.worker_id} loads {record.model_ref}: {percent} %",
    )


def _again(error: ArrieroError) -> ArrieroError:
    # One job's error goes to several requests: each raises its own, with its own traceback.
    same = ArrieroError(error.code, error.message)
    same.details = dict(error.details)
    return same


def _exit_error(worker_id: str, node: str, ended: WorkerExit) -> ArrieroError:
    """Return the error of a worker that ended before it was of use."""
    try:
        code = ErrorCode(ended.code or "")
    except ValueError:
        code = ErrorCode.WORKER_START_FAILED
    how = ended.message or f"ended with exit code {ended.exit_code}"
    return ArrieroError(
        code, f"worker {worker_id} on {node}: {how}", worker_id=worker_id, node=node, **_exit_details(ended)
    )


def _exit_details(ended: WorkerExit) -> dict[str, object]:
    details: dict[str, object] = {"exit_code": ended.exit_code, "signal": ended.signal}
    if ended.log_tail:
        details["log_tail"] = ended.log_tail[-20:]
    return {name: value for name, value in details.items() if value is not None}
