"""An agent and workers that do what a test tells them: real servers on loopback, the real wire.

For what the real ones cannot be made to do at a chosen moment.  What the real ones do is tested
with them (`test_pool.py`).
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from arriero.contracts.errors import ArrieroError, ErrorCode, ErrorResponse
from arriero.contracts.events import (
    AgentBeat,
    AgentEvent,
    AgentSnapshot,
    DownloadFrame,
    ModelsChanged,
    WorkerChanged,
)
from arriero.contracts.records import (
    Capabilities,
    DeviceRecord,
    ModelList,
    ModelRecord,
    RunRecord,
    WorkerExit,
    WorkerRecord,
)
from arriero.contracts.requests import SpawnBody
from arriero.contracts.states import DownloadState, WorkerState
from arriero.contracts.version import API_VERSION, __version__
from arriero.runtime import processes, state_dir
from arriero.runtime.state_dir import StateDir

AGENT_TOKEN = "agent-secret"
#: Less than a test may take (pyproject.toml); a start takes a second of a processor, which may be busy.
WAIT_S = 60.0


def json_answer(value: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=status, content_type="application/json")


def error_answer(error: ArrieroError) -> web.Response:
    return json_answer(ErrorResponse(error.body()), error.kind.http_status)


@dataclass
class WorkerScript:
    """What a worker does; may be changed while it runs."""

    tokens: int = 5
    #: The stream stops after so many tokens until `go_on` is set.
    hold_after: int | None = None
    #: The connection breaks off after so many tokens.
    break_after: int | None = None
    #: Each request is answered with this.
    refuse: ArrieroError | None = None
    #: The stream ends with this as an error event after `tokens`.
    fail_with: ArrieroError | None = None
    queue_positions: tuple[int, ...] = ()
    slots: int = 4


class ScriptedWorker:
    """One worker's server."""

    def __init__(self, worker_id: str, node: str, model_ref: str, script: WorkerScript) -> None:
        self.worker_id = worker_id
        self.token = f"token-of-{worker_id}"
        self.script = script
        self.go_on = asyncio.Event()
        self.held = asyncio.Event()
        self.cut_off = asyncio.Event()
        self.asked = asyncio.Event()
        self.seen: list[tuple[str, dict[str, str], Any]] = []
        self._site: web.TCPSite | None = None
        self._runner: web.AppRunner | None = None
        self.record = WorkerRecord(
            worker_id=worker_id, node=node, url="", model_ref=model_ref, backend="cpu", device="cpu",
            state=WorkerState.STARTING, slots_total=script.slots, slots_available=script.slots,
            pid=0, started_unix=1.0, last_activity_unix=1.0,
        )  # fmt: skip

    async def start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_post("/v1/inference/stream", self._native)
        app.router.add_route("*", "/v1/echo/{rest:.*}", self._echo)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await self._site.start()
        host, port = self._runner.addresses[0][:2]
        self.record = msgspec.structs.replace(self.record, url=f"http://{host}:{port}")

    async def stop(self) -> None:
        self.go_on.set()
        if self._runner is not None:
            await self._runner.cleanup()

    def _enter(self, request: web.Request, body: Any) -> None:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            raise web.HTTPUnauthorized
        self.asked.set()
        self.seen.append((request.path_qs, {k.lower(): v for k, v in request.headers.items()}, body))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self._enter(request, body)
        if self.script.refuse is not None:
            return error_answer(self.script.refuse)
        if not body.get("stream"):
            text = " ".join(map(str, range(self.script.tokens)))
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            return json_answer({"id": "c", "object": "chat.completion", "model": body["model"], "created": 1,
                                "choices": [choice]})  # fmt: skip

        def chunk(index: int) -> dict[str, Any]:
            choice = {"index": 0, "delta": {"content": f"{index} "}, "finish_reason": None}
            return {"id": "c", "object": "chat.completion.chunk", "model": body["model"], "created": 1,
                    "choices": [choice]}  # fmt: skip

        return await self._stream(request, [chunk(index) for index in range(self.script.tokens)])

    async def _native(self, request: web.Request) -> web.StreamResponse:
        self._enter(request, await request.json())
        if self.script.refuse is not None:
            return error_answer(self.script.refuse)
        frames: list[dict[str, Any]] = [{"started": True, "request_id": request.headers["X-Request-Id"]}]
        frames += [{"queued": True, "position": position} for position in self.script.queue_positions]
        frames += [{"token": f"{n} ", "id": 100 + n, "index": n} for n in range(self.script.tokens)]
        done = {"done": True, "total_tokens": self.script.tokens, "prompt_tokens": 3, "duration_ms": 7,
                "finish_reason": "stop"}  # fmt: skip
        return await self._stream(request, frames, done)

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self._enter(request, body)
        return json_answer({"object": "list", "data": [], "model": body["model"]})

    async def _echo(self, request: web.Request) -> web.StreamResponse:
        content = await request.read()
        self._enter(request, content)
        return json_answer({"method": request.method, "path": request.raw_path, "body": content.decode()})

    async def _stream(
        self, request: web.Request, frames: list[dict[str, Any]], done: dict[str, Any] | None = None
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        tokens = 0
        try:
            for number, frame in enumerate(frames, 1):
                if "token" in frame or "choices" in frame:
                    if tokens == self.script.break_after:
                        assert request.transport is not None
                        await response.write(b"id: 9\ndata: {half an ev")
                        request.transport.abort()
                        return response
                    if tokens == self.script.hold_after:
                        self.held.set()
                        await self.go_on.wait()
                    tokens += 1
                await response.write(b"id: %d\ndata: %s\n\n" % (number, json.dumps(frame).encode()))
            if self.script.fail_with is not None:
                envelope = msgspec.json.encode(ErrorResponse(self.script.fail_with.body()))
                await response.write(b"event: error\ndata: %s\n\n" % envelope)
                return response
            for last in ([json.dumps(done).encode()] if done else []) + [b"[DONE]"]:
                await response.write(b"data: %s\n\n" % last)
        except (asyncio.CancelledError, ConnectionError):
            self.cut_off.set()
            raise
        return response


@dataclass
class SpawnScript:
    """What a spawn does."""

    refuse: ArrieroError | None = None
    fractions: tuple[float, ...] = (0.25, 0.5)
    #: Loading stays at the last fraction until it is set.
    load_gate: asyncio.Event | None = None
    #: It fails at the end of loading with this.
    fails_with: WorkerExit | None = None
    worker: WorkerScript = field(default_factory=WorkerScript)


class ScriptedAgent:
    """An agent whose workers are `ScriptedWorker`s in this process."""

    def __init__(self, home: Path, name: str = "andes") -> None:
        self.name = name
        self.folder = StateDir(home)
        self.spawn = SpawnScript()
        self.workers: dict[str, ScriptedWorker] = {}
        self.models: list[ModelRecord] = []
        self.spawned: list[SpawnBody] = []
        self.download_frames: list[DownloadFrame] = []
        self.download_error: ArrieroError | None = None
        self.downloaded: list[str] = []
        #: A download is not answered before it is set.
        self.download_gate = asyncio.Event()
        self.download_gate.set()
        self.download_asked = asyncio.Event()
        #: Who left a download.
        self.left: asyncio.Queue[str] = asyncio.Queue()
        self.is_silent = False
        #: What stands in its snapshot instead of what does there.
        self.says: dict[str, Any] = {}
        #: What a worker of a model takes, in MiB; less is free meanwhile.
        self.memory_of: dict[str, int] = {}
        self._queues: set[asyncio.Queue[AgentEvent]] = set()
        self._runner: web.AppRunner | None = None
        self._group: asyncio.TaskGroup | None = None
        #: Their ids go on from here.
        self.workers_made = 0

    async def start(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/v1/events", self._events)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/workers", self._spawn)
        app.router.add_delete("/v1/workers/{id}", self._delete)
        app.router.add_get("/v1/workers/{id}/logs", self._logs)
        app.router.add_post("/v1/models/download", self._download)
        app.router.add_get("/v1/models/download/progress", self._progress)
        app.router.add_delete("/v1/downloads/{id}", self._leave)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        me = processes.identity(os.getpid())
        assert me is not None
        self.folder.prepare()
        record = RunRecord(
            pid=me.pid, url=f"http://{host}:{port}", version=__version__, started=1.0, token=AGENT_TOKEN,
            pid_start_ticks=me.start_ticks, boot_id=me.boot_id,
        )  # fmt: skip
        state_dir.write(self.folder.run_file("agent"), record)

    async def stop(self) -> None:
        """End the agent alone; its workers go on."""
        self.folder.run_file("agent").unlink(missing_ok=True)
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def stop_all(self) -> None:
        await self.stop()
        for worker in list(self.workers.values()):
            await worker.stop()

    def tell(self, event: AgentEvent) -> None:
        for queue in self._queues:
            queue.put_nowait(event)

    def change(self, worker: ScriptedWorker, **changes: Any) -> None:
        worker.record = msgspec.structs.replace(worker.record, **changes)
        self.tell(WorkerChanged(worker=worker.record, worker_token=worker.token))

    async def add_worker(self, model_ref: str = "demo", script: WorkerScript | None = None) -> ScriptedWorker:
        """Have a worker that is idle already."""
        worker = await self._new_worker(model_ref, script or WorkerScript())
        self.change(worker, state=WorkerState.LOADING)
        self.change(worker, state=WorkerState.IDLE)
        return worker

    @property
    def ram_free_mb(self) -> int:
        return 7578 - sum(worker.record.memory_mb for worker in self.workers.values())

    def has_models(self, *models: ModelRecord) -> None:
        """Have these models in the catalog, and tell."""
        self.models[:] = models
        self.tell(ModelsChanged(models=list(models)))

    async def _new_worker(self, model_ref: str, script: WorkerScript) -> ScriptedWorker:
        self.workers_made += 1
        worker = ScriptedWorker(f"w-{self.workers_made:012x}", self.name, model_ref, script)
        memory_mb = self.memory_of.get(model_ref, 0)
        worker.record = msgspec.structs.replace(worker.record, memory_mb=memory_mb)
        self.workers[worker.worker_id] = worker
        await worker.start()
        return worker

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {AGENT_TOKEN}":
            return error_answer(ArrieroError(ErrorCode.INVALID_API_KEY))
        answer: web.StreamResponse = await handler(request)
        return answer

    async def _events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        queue: asyncio.Queue[AgentEvent] = asyncio.Queue()
        self._queues.add(queue)
        try:
            event: AgentEvent = self._snapshot()
            while True:
                if not self.is_silent:
                    said = msgspec.to_builtins(event)
                    if isinstance(event, AgentSnapshot):
                        said |= self.says
                    await response.write(b"data: %s\n\n" % msgspec.json.encode(said))
                try:
                    async with asyncio.timeout(0.3):
                        event = await queue.get()
                except TimeoutError:
                    event = AgentBeat(ram_free_mb=self.ram_free_mb, disk_free_mb=9000, unix=1.0)
        finally:
            self._queues.discard(queue)

    def _snapshot(self) -> AgentSnapshot:
        cpu = DeviceRecord(id="cpu", backend="cpu", name="CPU", memory_mb=16000, memory_free_mb=7578)
        return AgentSnapshot(
            capabilities=Capabilities(
                name=self.name, version=__version__, api_version=API_VERSION, backends=["cpu"], devices=[cpu],
                engines={}, ram_mb=16000, ram_free_mb=self.ram_free_mb, disk_free_mb=9000, cpu_cores=2, os="linux", arch="x",
            ),
            workers=[worker.record for worker in self.workers.values()],
            worker_tokens={worker.worker_id: worker.token for worker in self.workers.values()},
            downloads=[],
            models=self.models,
        )  # fmt: skip

    async def _models(self, request: web.Request) -> web.StreamResponse:
        return json_answer(ModelList(self.models))

    async def _spawn(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=SpawnBody)
        self.spawned.append(body)
        if self.spawn.refuse is not None:
            return error_answer(self.spawn.refuse)
        worker = await self._new_worker(body.model_ref, self.spawn.worker)
        self.tell(WorkerChanged(worker=worker.record, worker_token=worker.token))
        assert self._group is not None
        self._group.create_task(self._load(worker, self.spawn), name=f"load-{worker.worker_id}")
        return json_answer(worker.record, 202)

    async def _load(self, worker: ScriptedWorker, script: SpawnScript) -> None:
        for fraction in (0.0, *script.fractions):
            self.change(worker, state=WorkerState.LOADING, load_fraction=fraction)
            await asyncio.sleep(0.15)
        if script.load_gate is not None:
            await script.load_gate.wait()
        if script.fails_with is not None:
            self.change(worker, state=WorkerState.FAILED, exit=script.fails_with)
            return
        self.change(worker, state=WorkerState.IDLE, load_fraction=1.0)

    async def _delete(self, request: web.Request) -> web.StreamResponse:
        worker = self.workers.pop(request.match_info["id"])
        self.change(worker, state=WorkerState.STOPPED)
        await worker.stop()
        return json_answer(worker.record, 202)

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text=f"log of {request.match_info['id']} {request.query_string}\n")

    async def _download(self, request: web.Request) -> web.StreamResponse:
        self.downloaded.append(json.loads(await request.read())["model_ref"])
        self.download_asked.set()
        await self.download_gate.wait()
        return json_answer({"download_id": "d-000000000001", "progress_url": "/x", "holder": "h-1"}, 202)

    async def _leave(self, request: web.Request) -> web.StreamResponse:
        self.left.put_nowait(request.query["holder"])
        return json_answer({})

    async def _progress(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for frame in self.download_frames:
            await response.write(b"data: %s\n\n" % msgspec.json.encode(frame))
            await asyncio.sleep(0.3)
        if self.download_error is not None:
            envelope = msgspec.json.encode(ErrorResponse(self.download_error.body()))
            await response.write(b"event: error\ndata: %s\n\n" % envelope)
        return response


def download_frame(stage: DownloadState, done: int) -> DownloadFrame:
    return DownloadFrame(
        stage=stage, bytes_downloaded=done, bytes_total=1000, speed_mbps=1.0, eta_s=1.0,
        download_id="d-000000000001",
    )  # fmt: skip


# --- The orchestrator as a process -------------------------------------------------------------


@dataclass
class RunningOrchestrator:
    """A real `arriero orchestrator`."""

    log: Path
    process: asyncio.subprocess.Process
    url: str
    session: aiohttp.ClientSession

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as response:
            return await response.json()

    async def until(self, path: str, is_so: Any) -> Any:
        """Wait until an answer is as wanted; return it."""
        async with asyncio.timeout(WAIT_S):
            while not is_so(answer := await self.get(path)):  # noqa: ASYNC110 - Another process.
                await asyncio.sleep(0.02)
        return answer

    async def until_refused(self) -> None:
        """Wait until no new connection is taken."""
        host, port = self.url.removeprefix("http://").split(":")
        async with asyncio.timeout(WAIT_S):
            while True:
                try:
                    _, writer = await asyncio.open_connection(host, int(port))
                except OSError:
                    return
                writer.close()
                await asyncio.sleep(0.02)


@asynccontextmanager
async def orchestrator(home: Path, *flags: str, **settings: str) -> AsyncIterator[RunningOrchestrator]:
    """Run an orchestrator; SIGTERM at the end."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ARRIERO_")}
    env |= {"ARRIERO_HOME": str(home), "ARRIERO_ORCHESTRATOR_PORT": "0", "ARRIERO_STOP_GRACE_S": "2"}
    env |= {f"ARRIERO_{name.upper()}": value for name, value in settings.items()}
    log = home / "orchestrator-of-test.log"
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "arriero", "orchestrator", *flags, env=env, stdout=output, stderr=output
        )
    try:
        record = None
        async with asyncio.timeout(WAIT_S):
            while record is None or record.pid != process.pid:
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.02)
                record = StateDir(home).running("orchestrator")
        async with aiohttp.ClientSession() as session:
            yield RunningOrchestrator(log, process, record.url, session)
    finally:
        if process.returncode is None:
            process.terminate()
            async with asyncio.timeout(WAIT_S):
                await process.wait()


@asynccontextmanager
async def agent(home: Path, name: str = "andes") -> AsyncIterator[ScriptedAgent]:
    """Run a scripted agent."""
    scripted = ScriptedAgent(home, name)
    async with asyncio.TaskGroup() as group:
        await scripted.start(group)
        try:
            yield scripted
        finally:
            await scripted.stop_all()


async def sse_lines(response: aiohttp.ClientResponse) -> AsyncGenerator[str, None]:
    """Yield the lines of a stream as they come."""
    async for line in response.content:
        yield line.decode().rstrip("\n")


async def read_events(response: aiohttp.ClientResponse) -> list[dict[str, Any]]:
    """Return all `data:` of a stream, decoded; `[DONE]` as {"done": True}."""
    found: list[dict[str, Any]] = []
    async for line in sse_lines(response):
        if line == "data: [DONE]":
            found.append({"DONE": True})
        elif line.startswith("data: "):
            found.append(json.loads(line[6:]))
    return found
