"""How does a model that no worker has get one?  (`ModelProvisioner`)

Choose a node, fetch the model if the node lacks it, start a worker.  Whoever asks for the same
model meanwhile shares the one job.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from arriero.contracts import refs
from arriero.contracts.errors import ArrieroError, ErrorCode, ErrorResponse, fail, from_body
from arriero.contracts.events import DownloadFrame, TaskDownloading, TaskPlacing
from arriero.contracts.records import WorkerRecord
from arriero.contracts.requests import DownloadBody, PeerSource, SpawnBody
from arriero.contracts.states import DownloadState, NodeState
from arriero.domain.placement import Wants
from arriero.domain.placement_memory import Needed
from arriero.orchestrator.neighbours import Neighbours
from arriero.orchestrator.nodes import Node, NodeRegistry
from arriero.orchestrator.placing import Placing, Step, Ways
from arriero.orchestrator.room import Found, RoomFinder
from arriero.runtime import logs
from arriero.runtime.clock import Clock
from arriero.runtime.tasks import Changed

#: An agent checks the file and the memory before it answers a spawn.
SPAWN_TIMEOUT_S: Final = 60.0
#: A download tells its state each second at least; its own rules end one that brings nothing.
DOWNLOAD_SILENCE_S: Final = 60.0
TELL_EVERY_S: Final = 0.25
#: A node that goes on fetching behind a cut is waited for so long, from the last news on.
NODE_BACK_S: Final = 120.0
BACK_PAUSE_S: Final = 0.5
LEAVE_TIMEOUT_S: Final = 2.0
#: It does not answer; or another one is at its port, which goes on with the download as well.
_AGENT_GONE: Final = frozenset({ErrorCode.NODE_UNREACHABLE, ErrorCode.INVALID_API_KEY})
#: A model is in its node's catalog a moment after its download ended.
CATALOG_NEWS_S: Final = 2.0


class DownloadStarted(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/models/download` of an agent: 202."""

    download_id: str
    progress_url: str = ""
    holder: str = ""


@dataclass(frozen=True, slots=True)
class JobKey:
    """What makes two jobs the same one."""

    model_ref: str
    node: str | None
    backend: str | None
    device: str | None
    labels: tuple[tuple[str, str], ...]


def _key(wants: Wants) -> JobKey:
    return JobKey(wants.model_ref, wants.node, wants.backend, wants.device, wants.labels)


class Job:
    """One worker being made: followed by any number of requests."""

    def __init__(self, wants: Wants) -> None:
        self.wants = wants
        #: What was told so far, each with its number; of a download that advances only the newest.
        self.steps: list[tuple[int, Step]] = []
        self.worker_id: str | None = None
        self.error: ArrieroError | None = None
        self.changed = Changed()
        #: What the requests ask for that wait for it.
        self.followers: list[Wants] = []
        self.is_downloading = False
        #: Waits for room, for a machine to wake, or for news of what was fetched.
        self.is_waiting = False
        self.task: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        """Whether there is a worker or an error."""
        return self.worker_id is not None or self.error is not None

    @property
    def may_end(self) -> bool:
        """Whether nothing is begun yet that is worth finishing though nobody waits for it."""
        return self.is_downloading or self.is_waiting

    def tell(self, step: Step) -> None:
        """Add a step, wake the followers."""
        number = self.steps[-1][0] + 1 if self.steps else 1
        if (
            isinstance(step, TaskDownloading)
            and self.steps
            and isinstance(self.steps[-1][1], TaskDownloading)
        ):
            # Hours of a download are not told once more to whoever comes late.
            self.steps.pop()
        self.steps.append((number, step))
        self.changed.notify()

    def ended(self, *, worker_id: str | None = None, error: ArrieroError | None = None) -> None:
        """End the job."""
        self.worker_id = worker_id
        self.error = error
        self.changed.notify()


class ModelProvisioner:
    """Starts workers; one job for each model, node, backend and device at a time."""

    def __init__(
        self, registry: NodeRegistry, room: RoomFinder, group: asyncio.TaskGroup, clock: Clock
    ) -> None:
        self._registry = registry
        self.room = room
        self.neighbours = Neighbours(registry, group, clock)
        self._group = group
        self._clock = clock
        self._jobs: dict[JobKey, Job] = {}
        self._log = logs.get("arriero.provisioning")
        #: Whether the workers that are started go with this orchestrator.
        self.binds_workers = False

    @property
    def jobs_running(self) -> int:
        """How many workers are being made."""
        return len(self._jobs)

    def job(self, wants: Wants) -> Job:
        """Return the running job for these wants; start it if there is none."""
        key = _key(wants)
        job = self._jobs.get(key)
        if job is None:
            job = Job(replace(wants, excluded=frozenset()))
            self._jobs[key] = job
            name = f"provision-{wants.model_ref[:40]}"
            job.task = self._group.create_task(self._run(key, job), name=name)
        return job

    def running(self, wants: Wants) -> Job | None:
        """Return the running job for these wants, or None."""
        return self._jobs.get(_key(wants))

    def left(self, job: Job, wants: Wants) -> None:
        """Take note that a request waits no more.

        A worker that is being started is finished for the next one; room that nobody waits for is not
        made, and a download is left: its agent ends it unless somebody else asked for it.
        """
        job.followers.remove(wants)
        if not job.followers and job.may_end and job.task is not None:
            self._forget(job)
            job.task.cancel()

    def _forget(self, job: Job) -> None:
        """Have whoever comes now begin a new job."""
        self._jobs = {key: other for key, other in self._jobs.items() if other is not job}

    async def spawn(
        self, body: SpawnBody, node_name: str | None, labels: tuple[tuple[str, str], ...] = ()
    ) -> WorkerRecord:
        """Start a worker as somebody asked for it; idle workers make room where there is none.

        Nothing is fetched for it.  Raises why no node can take it, and what the agents answer;
        MODEL_NOT_FOUND if the node does not have the model.
        """
        refs.parse(body.model_ref)
        wants = Wants(body.model_ref, node_name, body.backend, body.device, labels=labels)
        if node_name is None and self._registry.views.model(body.model_ref) is not None:
            # Of a model that nobody told of, and of a node that is named, its agent may know better.
            wants = replace(wants, on_disk=True)
        needed = self._registry.views.needed(
            body.model_ref, slots=body.slots, context_tokens=body.context_tokens
        )

        async def find(open_wants: Wants, learned: Needed | None) -> Found:
            return await self.room.find(open_wants, _unheard, needed=needed, learned=learned, may_wait=False)

        async def start(found: Found) -> WorkerRecord:
            if found.victims and not self._registry.views.has_model(found.node, body.model_ref):
                # It would be refused after they are gone.
                fail(
                    ErrorCode.MODEL_NOT_FOUND,
                    f"{found.node} does not have {body.model_ref}",
                    model_ref=body.model_ref,
                    node=found.node,
                )
            await self.room.clear(found)
            return await self._spawn_in(found, body)

        return await Placing(self._registry, self.room, wants, Ways(_unheard, find, start)).run()

    # --- A job ---------------------------------------------------------------------------

    async def _run(self, key: JobKey, job: Job) -> None:
        try:
            record = await self._provision(job)
            job.ended(worker_id=record.worker_id)
        except ArrieroError as error:
            self._log.warning("no worker", model_ref=key.model_ref, code=str(error.code), why=error.message)
            job.ended(error=error)
        except Exception:  # noqa: BLE001  The edge: whoever waits is told, the log has the traceback.
            self._log.exception("provisioning failed", model_ref=key.model_ref)
            job.ended(error=ArrieroError(ErrorCode.INTERNAL_ERROR))
        finally:
            if not job.is_over:
                job.ended(error=ArrieroError(ErrorCode.REQUEST_CANCELLED, "the orchestrator is stopping"))
            if self._jobs.get(key) is job:
                del self._jobs[key]

    async def _provision(self, job: Job) -> WorkerRecord:
        def is_served() -> bool:
            best = self._registry.views.workers.best
            return bool(job.followers) and all(best(each) is not None for each in job.followers)

        async def find(wants: Wants, learned: Needed | None) -> Found:
            job.is_waiting = True
            try:
                # Room that nobody waits for is not made.
                may_wait = bool(job.followers)
                return await self.room.find(
                    wants, job.tell, learned=learned, may_wait=may_wait, is_served=is_served
                )
            finally:
                job.is_waiting = False

        async def fetch(node_name: str) -> None:
            node = self._registry.reachable(node_name)
            await self._download(node, job)
            job.is_waiting = True
            try:
                await self._heard_of(node, job.wants.model_ref)
            finally:
                job.is_waiting = False

        async def start(found: Found) -> WorkerRecord:
            return await self._provision_on(job, found)

        ways = Ways(job.tell, find, start, fetch)
        return await Placing(self._registry, self.room, job.wants, ways).run()

    async def _provision_on(self, job: Job, found: Found) -> WorkerRecord:
        wants = job.wants
        job.is_waiting = True
        try:
            await self.room.clear(found)
        finally:
            job.is_waiting = False
        # The engine and its options are the node's own settings.
        body = SpawnBody(model_ref=wants.model_ref, backend=wants.backend, device=wants.device)
        record = await self._spawn_in(found, body)
        message = f"starts {record.worker_id} for {wants.model_ref}"
        job.tell(
            TaskPlacing(node=record.node, worker_id=record.worker_id, actor=record.node, message=message)
        )
        return record

    async def _spawn_in(self, found: Found, body: SpawnBody) -> WorkerRecord:
        """Have a worker started in the room that was found for it."""
        node = self.room.taking(found.node)
        body = msgspec.structs.replace(
            body, device=body.device or found.device, bound=body.bound or self.binds_workers
        )
        record = await node.peer.call(
            "POST", "/v1/workers", body=body, answer=WorkerRecord, timeout_s=SPAWN_TIMEOUT_S
        )
        record = msgspec.structs.replace(record, node=node.name)
        if found.movement is not None:
            self._registry.views.made(found.movement, record.worker_id)
        # Its event may have been quicker than this answer: then we know more already.
        if self._registry.workers.find(record.worker_id) is None:
            self._registry.observe(record)
        return record

    async def start_download(
        self, node: Node, model_ref: str, *, peers: Sequence[PeerSource] = (), clean: bool = False
    ) -> DownloadStarted:
        """Have a node begin to fetch a model, or join the download that does.  Raises what it answers.

        `peers` are asked for it besides the other nodes, and all before the internet.
        """
        sources = [*peers, *await self.neighbours.sources_for(node, model_ref)]
        body = DownloadBody(model_ref=model_ref, peers=sources, clean=clean)
        return await node.peer.call("POST", "/v1/models/download", body=body, answer=DownloadStarted)

    async def leave_download(self, node: Node, download_id: str, holder: str) -> None:
        """Leave a download, within a short time and whatever happens."""
        try:
            path = f"/v1/downloads/{download_id}?holder={holder}"
            await node.peer.call("DELETE", path, timeout_s=LEAVE_TIMEOUT_S)
        except ArrieroError as error:
            self._log.warning("download not left", node=node.name, code=str(error.code))

    async def _download(self, node: Node, job: Job) -> None:
        """Fetch the model onto `node`.  Raises the download's error."""
        model_ref = job.wants.model_ref
        if not job.followers:
            raise ArrieroError(ErrorCode.REQUEST_CANCELLED, "nobody waits for the model any more")
        started = await self.start_download(node, model_ref)
        if not job.followers:
            # The last one went while the agent was being asked.
            self._forget(job)
            await self.leave_download(node, started.download_id, started.holder)
            raise ArrieroError(ErrorCode.REQUEST_CANCELLED, "nobody waits for the model any more")
        job.is_downloading = True
        try:
            await self._follow_to_end(node, job, started)
        except asyncio.CancelledError:
            await self.leave_download(node, started.download_id, started.holder)
            raise
        finally:
            job.is_downloading = False

    async def _heard_of(self, node: Node, model_ref: str) -> None:
        """Wait a moment until a node has told of a model that it fetched, and with that of its size."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CATALOG_NEWS_S):
                while not self._registry.views.has_model(node.name, model_ref):
                    await self._registry.changed.wait()

    async def _follow_to_end(self, node: Node, job: Job, started: DownloadStarted) -> None:
        """Follow a download; where no other node would do, also over cuts of the link to this one."""
        until_s = 0.0
        while True:
            try:
                return await self._follow_download(node, job, started)
            except ArrieroError as error:
                if error.code not in _AGENT_GONE or job.wants.node is None:
                    raise
                if job.steps and isinstance(job.steps[-1][1], TaskDownloading):
                    until_s = self._clock.monotonic_s() + NODE_BACK_S
                message = f"{node.name} does not answer ({error.message}): waits for it"
                job.tell(TaskPlacing(node=node.name, actor="orchestrator", message=message))
                if not await self._is_back(node, until_s - self._clock.monotonic_s()):
                    raise

    async def _is_back(self, node: Node, limit_s: float) -> bool:
        try:
            async with asyncio.timeout(limit_s):
                # That a line is gone may be known a moment after what went over it.
                await self._clock.sleep_s(BACK_PAUSE_S)
                while node.state not in (NodeState.READY, NodeState.DRAINING):
                    await self._registry.changed.wait()
        except TimeoutError:
            return False
        return True

    async def _follow_download(self, node: Node, job: Job, started: DownloadStarted) -> None:
        model_ref = job.wants.model_ref
        path = f"/v1/models/download/progress?download_id={started.download_id}"
        told_s, told_why = -TELL_EVERY_S, None
        events = node.peer.events(path, silence_s=DOWNLOAD_SILENCE_S)
        try:
            async for event in events:
                if event.comment is not None or event.is_done or not event.data:
                    continue
                if event.event == "error":
                    raise from_body(msgspec.json.decode(event.data, type=ErrorResponse).error)
                frame = msgspec.json.decode(event.data, type=DownloadFrame)
                now_s = self._clock.monotonic_s()
                if frame.stage is DownloadState.COMPLETE:
                    job.tell(_downloading(node, model_ref, frame))
                    return
                if frame.stage in (DownloadState.FAILED, DownloadState.CANCELLED):
                    continue  # The event after this one carries the reason.
                # Numbers may wait; that an attempt failed is gone with the next frame.
                if now_s - told_s >= TELL_EVERY_S or frame.retry_reason not in (None, told_why):
                    told_s, told_why = now_s, frame.retry_reason
                    job.tell(_downloading(node, model_ref, frame))
        except msgspec.DecodeError as error:
            raise ArrieroError(ErrorCode.VERSION_MISMATCH, "a download told what is none of ours") from error
        finally:
            await events.aclose()
        fail(ErrorCode.DOWNLOAD_FAILED, f"{node.name} stopped telling of the download of {model_ref}")


def _unheard(_: Step) -> None:
    """Tell nobody."""


def _downloading(node: Node, model_ref: str, frame: DownloadFrame) -> TaskDownloading:
    if frame.stage is DownloadState.VERIFYING:
        message = f"checks {model_ref}"
    elif frame.retry_reason is not None:
        message = f"fetches {model_ref}: {frame.retry_reason}, tries again (attempt {frame.attempt + 1})"
    else:
        message = f"fetches {model_ref}" + (f" from {frame.source}" if frame.source else "")
    return TaskDownloading(
        bytes_downloaded=frame.bytes_downloaded,
        bytes_total=frame.bytes_total,
        speed_mbps=frame.speed_mbps,
        eta_s=frame.eta_s,
        actor=node.name,
        message=message,
    )
