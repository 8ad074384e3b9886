"""How does an agent start, live and end?  (`arriero agent`)"""

import asyncio
import contextlib
import os
import socket
from typing import cast
from urllib.parse import urlsplit

from arriero.agent.adoption import adopt
from arriero.agent.catalog import CatalogEntry, ModelCatalog
from arriero.agent.catalog_news import CatalogNews
from arriero.agent.engine_builds import engine_version
from arriero.agent.engine_install import EngineInstaller
from arriero.agent.engine_uploads import Uploads
from arriero.agent.estimates import Estimates
from arriero.agent.events import Feed
from arriero.agent.fetch import FetchLimits
from arriero.agent.importer import Importer
from arriero.agent.lease import Leased, NodeLease
from arriero.agent.machine import Machine, look_at_machine
from arriero.agent.metrics import AgentMetrics, Downloads
from arriero.agent.preflight import Preflight
from arriero.agent.provisioner import ModelProvisioner, ProvisionLimits
from arriero.agent.retries import RetryLimits
from arriero.agent.routes.admin import admin_routes
from arriero.agent.routes.catalog import catalog_routes, estimate_routes
from arriero.agent.routes.downloads import download_routes
from arriero.agent.routes.engines import engine_routes
from arriero.agent.routes.node import node_routes
from arriero.agent.routes.stock import BODY_LIMITS, stock_routes
from arriero.agent.routes.workers import READY_PATH, worker_routes
from arriero.agent.spawner import Spawner
from arriero.agent.supervisor import Supervisor
from arriero.agent.worker_logs import prune
from arriero.contracts import refs
from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.events import AgentBeat, AgentSnapshot, DownloadChanged, ModelsChanged, WorkerChanged
from arriero.contracts.peers import reading_token, reads_models
from arriero.contracts.records import DownloadRecord, RunRecord, WorkerList, WorkerRecord
from arriero.contracts.requests import ShutdownBody
from arriero.contracts.version import __version__
from arriero.domain.workers import WorkerRegistry
from arriero.engines import formats
from arriero.engines import registry as engines
from arriero.runtime import daemon, logs, processes, state_dir
from arriero.runtime.asgi import AsgiApp, Guard
from arriero.runtime.clock import Clock, SystemClock
from arriero.runtime.entropy import Entropy, SystemEntropy
from arriero.runtime.http import Http
from arriero.runtime.litestar_app import make_app
from arriero.runtime.log_files import rotate
from arriero.runtime.serve import bind, serve, url_of
from arriero.runtime.settings import Settings
from arriero.runtime.state_dir import StateDir

BEAT_S = 1.0
#: Between two looks at the devices: asking a driver may take seconds.
LOOK_EVERY_S = 10.0
TIDY_S = 2.0
#: An agent that begins with what the one before knew has been found by those who miss it by then.
ASK_ENGINES_AFTER_S = 3.0
#: Workers that are bound to an orchestrator go when it was silent for so many times `node_timeout_s`: a cut
#: of seconds must not end them.
BOUND_TIMEOUTS = 5
#: Open requests may finish within this time once the workers are gone.
HTTP_GRACE_S = 2.0
TOKEN_DIGITS = 48


def main(settings: Settings) -> int:
    """Run an agent until SIGTERM or SIGINT; returns the exit code.

    Raises what `run` raises, as a plain `ArrieroError`: the caller tells it in one line.
    """
    logs.configure(level=settings.log_level, role="agent")
    try:
        daemon.run(lambda stop: run(settings, stop))
    except BaseExceptionGroup as group:
        expected, rest = group.split(ArrieroError)
        if expected is None or rest is not None:
            raise
        raise _first(expected) from group
    return 0


def _first(group: BaseExceptionGroup[ArrieroError]) -> ArrieroError:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, ArrieroError), "the group was split by this type"
    return found


async def run(settings: Settings, stop: asyncio.Event) -> None:
    """Serve until `stop` is set, then stop all workers and end.

    Raises STATE_DIR_UNUSABLE, ALREADY_RUNNING, PORT_IN_USE.
    """
    state = StateDir(settings.home_path())
    state.prepare()
    with state.lock("agent"), contextlib.closing(_bound(settings, state)) as sock:
        inspect = formats.inspect_model
        catalog = await ModelCatalog.open(state.catalog_db, state.models, SystemClock(), inspect)
        try:
            async with Http() as http, asyncio.TaskGroup() as group:
                machine = await look_at_machine(settings.name_of_node(), state.home, backend=settings.backend)
                agent = _Agent(settings, state, url_of(sock), http, group, catalog, machine, stop)
                await agent.live(sock)
        finally:
            await catalog.close()


def _bound(settings: Settings, state: StateDir) -> socket.socket:
    """Return a listening socket; where any port will do, that of an agent that was killed.

    Workers that were loading call back there, and whoever spoke to it asks there first.
    """
    before = None if settings.agent_port else state.recorded("agent")
    if before is not None:
        with contextlib.suppress(ArrieroError):
            return bind("127.0.0.1", urlsplit(before.url).port or 0)
    return bind("127.0.0.1", settings.agent_port)


def provision_limits(settings: Settings) -> ProvisionLimits:
    """Return the numbers of downloads that the settings name."""
    return ProvisionLimits(
        fetch=FetchLimits(
            connect_s=settings.connect_timeout_s,
            stall_s=settings.download_stall_s,
            retry=RetryLimits(attempts=settings.download_attempts),
            connections=settings.download_connections,
            rate_bytes_per_s=settings.download_rate_max_mbps * 1_000_000 / 8,
        )
    )


class _Agent:
    """All parts of one agent, joined."""

    def __init__(
        self, settings: Settings, state: StateDir, url: str, http: Http, group: asyncio.TaskGroup,
        catalog: ModelCatalog, machine: Machine, stop: asyncio.Event,
    ) -> None:  # fmt: skip
        clock, entropy = SystemClock(), SystemEntropy()
        self._settings = settings
        self._state = state
        self._url = url
        self._http = http
        self._group = group
        self._clock = clock
        self._token = entropy.hex(TOKEN_DIGITS)
        self._machine = machine
        self._catalog = catalog
        self._downloads = Downloads()
        self._feed = Feed(self._snapshot)
        self._stop = stop
        self._keeps_workers = False
        self._news = CatalogNews(catalog, lambda models: self._feed.publish(ModelsChanged(models=models)))
        self._http_stop = asyncio.Event()
        self._log = logs.get("arriero.agent")
        me = processes.identity(os.getpid())
        assert me is not None, "this process lives"
        self._me = me
        self._inspect = formats.inspect_model
        self._lease = NodeLease(
            state.lease_file, clock, silence_max_s=settings.node_timeout_s, on_taken=self._feed.wake
        )
        self._importer = Importer(catalog, inspect=self._inspect, clock=clock, entropy=entropy)
        self._provisioner = ModelProvisioner(
            catalog,
            clock=clock,
            entropy=entropy,
            inspect=self._inspect,
            on_change=self._download_changed,
            group=group,
            limits=provision_limits(settings),
        )
        self._supervisor = Supervisor(
            settings=settings,
            state=state,
            registry=WorkerRegistry(self._worker_changed),
            http=http,
            group=group,
            clock=clock,
            name=f"{me.pid}:{me.start_ticks}",
            lease=self._lease,
        )
        self._engines = self._installer(settings)
        preflight = Preflight(machine, log_bytes_max=settings.log_bytes_max)
        self._estimates = Estimates(
            settings=settings,
            machine=machine,
            preflight=preflight,
            kind_of=engines.kind,
            promises=self._supervisor.promises,
        )
        self._spawner = self._new_spawner(preflight, clock, entropy)

    def _new_spawner(self, preflight: Preflight, clock: Clock, entropy: Entropy) -> Spawner:
        return Spawner(
            settings=self._settings,
            node=self._machine.node,
            state=self._state,
            supervisor=self._supervisor,
            preflight=preflight,
            locate=self._locate,
            kind_of=engines.kind,
            callback_url=self._url + READY_PATH,
            fence=lambda: self._lease.number,
            clock=clock,
            entropy=entropy,
        )

    def _installer(self, settings: Settings) -> EngineInstaller:
        return EngineInstaller(
            home=self._state.home,
            settings=settings,
            machine=self._machine,
            uploads=Uploads(self._state.home, self._machine.platform, engine_version()),
            clock=self._clock,
            on_change=self._engines_changed,
        )

    async def live(self, sock: socket.socket) -> None:
        """Adopt, serve until it is to end, stop the workers, end."""
        async with self._provisioner:
            await adopt(self._state, self._supervisor, self._http)
            for model_ref in await self._provisioner.resume():
                self._log.info("download_resumed", model_ref=model_ref)
            await self._news.look()
            tasks = [
                self._group.create_task(self._beat(), name="beat"),
                self._group.create_task(self._look(), name="look"),
                self._group.create_task(self._news.run(), name="catalog-news"),
                self._group.create_task(self._tidy(), name="tidy"),
                self._group.create_task(self._catalog.recheck(), name="catalog-recheck"),
                self._group.create_task(self._end_in_order(), name="end"),
            ]
            if self._machine.is_recalled:
                tasks.append(self._group.create_task(self._ask_engines(), name="ask-engines"))
            guard = Guard(
                Leased(self._app(), self._lease),
                token=self._token,
                reading_token=reading_token(self._token),
                is_reading=reads_models,
                open_paths=frozenset({READY_PATH}),
                body_bytes_max_of=BODY_LIMITS,
            )
            try:
                await serve(guard, sock, stop=self._http_stop, on_started=self._answers, grace_s=HTTP_GRACE_S)
            finally:
                self._state.run_file("agent").unlink(missing_ok=True)
                self._supervisor.let_go()
                for task in tasks:
                    task.cancel()
        self._log.info("agent_ended")

    def _app(self) -> AsgiApp:
        metrics = AgentMetrics(self._supervisor, self._downloads, self._catalog)
        app = make_app(
            [
                *node_routes(self._machine, self._feed, metrics, stop=self._http_stop),
                *admin_routes(self._shut_down, self._release),
                *worker_routes(self._supervisor, self._spawner, stop=self._http_stop),
                *catalog_routes(self._catalog, self._supervisor.models_in_use, stop=self._http_stop),
                *estimate_routes(self._catalog, self._estimates),
                *stock_routes(
                    self._catalog,
                    self._importer,
                    self._supervisor.models_in_use,
                    inspect=self._inspect,
                    stop=self._http_stop,
                ),
                *download_routes(self._provisioner, self._catalog, stop=self._http_stop),
                *engine_routes(self._machine, self._engines, stop=self._http_stop),
            ],
            title="arriero agent",
        )
        return cast("AsgiApp", app)

    async def _answers(self) -> None:
        record = RunRecord(
            pid=self._me.pid,
            url=self._url,
            version=__version__,
            started=self._clock.wall_s(),
            token=self._token,
            pid_start_ticks=self._me.start_ticks,
            boot_id=self._me.boot_id,
            log_path=str(self._state.log_file("agent")),
        )
        state_dir.write(self._state.run_file("agent"), record)
        self._log.info("agent_answers", url=self._url, node=self._machine.node)

    # --- What goes on beside the requests -----------------------------------------------------

    async def _end_in_order(self) -> None:
        await self._stop.wait()
        self._log.info("agent_ending", keeps_workers=self._keeps_workers)
        if self._keeps_workers:
            self._supervisor.is_stopping = True
        else:
            await self._supervisor.stop_all("its agent ended")
        await self._provisioner.aclose()
        self._http_stop.set()

    async def _beat(self) -> None:
        while True:
            await self._clock.sleep_s(BEAT_S)
            if not self._feed.readers:
                continue
            resources = await asyncio.to_thread(self._machine.resources)
            self._feed.publish(
                AgentBeat(
                    ram_free_mb=resources.ram_free_mb,
                    disk_free_mb=resources.disk_free_mb,
                    unix=self._clock.wall_s(),
                    device_free_mb={device.id: device.memory_free_mb for device in resources.devices},
                    promised_mb=self._supervisor.promises().by_device(),
                )
            )

    async def _look(self) -> None:
        """Look at the devices now and then: however long a card takes, the beats go on."""
        while True:
            await self._clock.sleep_s(LOOK_EVERY_S)
            if self._feed.readers:
                await self._machine.look_aside()

    async def _ask_engines(self) -> None:
        await self._clock.sleep_s(ASK_ENGINES_AFTER_S)
        await self._engines.look_again()

    async def _tidy(self) -> None:
        while True:
            await self._clock.sleep_s(TIDY_S)
            self._supervisor.tidy()
            self._supervisor.stop_bound(self._has_gone)
            live = self._supervisor.live_logs()
            for path in (self._state.log_file("agent"), *live):
                await asyncio.to_thread(rotate, path, self._settings.log_bytes_max)
            await asyncio.to_thread(prune, self._state.logs / "workers", live)

    def _has_gone(self, holder: str) -> bool:
        return self._lease.silent_s(holder) >= BOUND_TIMEOUTS * self._settings.node_timeout_s

    # --- What is asked of it as a whole ---------------------------------------------------------

    def _shut_down(self, body: ShutdownBody) -> WorkerList:
        """Begin to end; what a first wish said of the workers stays."""
        if not self._stop.is_set():
            self._keeps_workers = not body.workers
        self._stop.set()
        return WorkerList(list(self._supervisor.registry))

    async def _release(self, holder: str) -> None:
        self._lease.release()
        stopped = self._supervisor.stop_bound(lambda bound_to: bound_to == holder)
        await self._supervisor.wait_ended(stopped)

    # --- What parts ask of each other ---------------------------------------------------------

    async def _locate(self, model_ref: str) -> CatalogEntry:
        """Return a model's entry; `demo` and `file:` are registered on the spot, others must be there."""
        parsed = refs.parse(model_ref)
        if isinstance(parsed, refs.DemoRef | refs.FileRef):
            await self._provisioner.ensure(model_ref)
        entry = await self._catalog.get(model_ref)
        if entry is None:
            fail(
                ErrorCode.MODEL_NOT_FOUND,
                f"{self._machine.node} does not have the model {model_ref!r}",
                model_ref=model_ref,
                node=self._machine.node,
            )
        await self._catalog.touch(entry.record.model_id)
        return entry

    def _worker_changed(self, _: WorkerRecord | None, after: WorkerRecord) -> None:
        self._feed.publish(
            WorkerChanged(worker=after, worker_token=self._supervisor.token_of(after.worker_id))
        )

    def _download_changed(self, record: DownloadRecord) -> None:
        self._downloads.changed(record)
        self._feed.publish(DownloadChanged(download=record))

    async def _engines_changed(self) -> None:
        await self._machine.look_aside()
        # The backends are told by a snapshot alone.
        self._feed.renew()

    def _snapshot(self) -> AgentSnapshot:
        return AgentSnapshot(
            capabilities=self._machine.capabilities(),
            workers=list(self._supervisor.registry),
            worker_tokens=self._supervisor.live_tokens(),
            downloads=self._provisioner.records(),
            models=self._news.models,
        )
