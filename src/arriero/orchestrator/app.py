"""How does the orchestrator's process begin, live and end?"""

import asyncio
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Final, cast

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import RunRecord
from arriero.contracts.version import __version__
from arriero.fabrics.base import Fabric, NodeAddress
from arriero.fabrics.local import LocalFabric
from arriero.fabrics.ssh import SshFabric
from arriero.orchestrator.cascade import Leaving, leave
from arriero.orchestrator.core import Orchestrator, assemble
from arriero.orchestrator.machines.machines import Machines
from arriero.orchestrator.reach import LocalReach
from arriero.orchestrator.routes.management import handlers
from arriero.orchestrator.routes.streams import Front
from arriero.orchestrator.store import open_database
from arriero.orchestrator.store.nodes import NodeStore
from arriero.orchestrator.store.tasks import TaskStore
from arriero.runtime import daemon, logs, processes, state_dir
from arriero.runtime.asgi import AsgiApp, Guard
from arriero.runtime.clock import Clock, SystemClock
from arriero.runtime.entropy import SystemEntropy
from arriero.runtime.http import Http
from arriero.runtime.litestar_app import make_app
from arriero.runtime.log_files import rotate
from arriero.runtime.serve import bind, serve, url_of
from arriero.runtime.settings import Settings
from arriero.runtime.state_dir import StateDir, run_identity

#: The local fabric reaches this machine whatever the address says.
HERE: Final = NodeAddress("localhost")
ROLE: Final = "orchestrator"
#: After the grace time streams are told to end; so long they have to say so to their clients.
LAST_WORDS_S: Final = 2.0
#: Beyond an agent's own grace time, for ending it.
AGENT_EXTRA_S: Final = 15.0
#: Between two looks at how large our own log is.
LOG_LOOK_S: Final = 60.0
_IDLE_CHECKS: Final = 20


def main(
    settings: Settings,
    *,
    is_background: bool = False,
    leaving: Leaving | None = None,
    fabric: Fabric | None = None,
) -> int:
    """Run the orchestrator until SIGTERM or SIGINT; return its exit code.

    `is_background`: it leaves by itself after `orchestrator_idle_s` without work.  `leaving`: what goes
    along at its end, and is waited for.  `fabric`: how other machines are reached, by SSH if none is given.
    Raises ALREADY_RUNNING, PORT_IN_USE, STATE_DIR_UNUSABLE before it serves.
    """
    logs.configure(level=settings.log_level, role=ROLE)
    folder = StateDir(settings.home_path())
    folder.prepare()
    leaving = leaving or Leaving()
    with folder.lock(ROLE):
        sock = bind(settings.orchestrator_host, settings.orchestrator_port)
        try:
            daemon.run(
                lambda stop: _run(
                    settings, folder, sock, stop, leaving, is_background=is_background, fabric=fabric
                )
            )
        finally:
            sock.close()
            if leaving.cascades or leaving.takes_agent:
                _end_agent(folder, settings.stop_grace_s + AGENT_EXTRA_S)
    return 0


async def _run(
    settings: Settings,
    folder: StateDir,
    sock: socket.socket,
    stop: asyncio.Event,
    leaving: Leaving,
    *,
    is_background: bool,
    fabric: Fabric | None,
) -> None:
    log = logs.get("arriero.orchestrator")
    clock, entropy = SystemClock(), SystemEntropy()
    sockets_dir = state_dir.orchestrator_dir(folder.home)
    # What one that was killed has left: nobody else runs with this state folder.
    shutil.rmtree(sockets_dir, ignore_errors=True)
    sockets_dir.mkdir(mode=0o700)
    database = await open_database(folder.orchestrator_db)
    if database.set_aside_as is not None:
        log.error("the database was damaged and begins anew", set_aside_as=database.set_aside_as)
    try:
        async with (
            Http(connect_timeout_s=settings.connect_timeout_s) as http,
            asyncio.TaskGroup() as group,
        ):
            node_store = await NodeStore.open(database, entropy)
            if fabric is None:
                fabric = SshFabric(
                    clock,
                    entropy,
                    sockets_dir=sockets_dir,
                    connect_timeout_s=settings.connect_timeout_s,
                )
            orchestrator = assemble(
                settings,
                http=http,
                store=TaskStore(database),
                node_store=node_store,
                fabric=fabric,
                machines=Machines(folder.home / "dist", clock),
                group=group,
                stop=stop,
                clock=clock,
                entropy=entropy,
            )
            local = LocalReach(folder, http, node_store, await LocalFabric(entropy).connect(HERE))
            orchestrator.provisioner.binds_workers = leaving.takes_workers
            group.create_task(orchestrator.provisioner.neighbours.tell_forever(), name="tell-neighbours")
            await orchestrator.membership.begin(local)
            await _serve(orchestrator, folder, sock, group, is_background=is_background)
            await orchestrator.membership.keep_seen()
            await leave(
                leaving,
                orchestrator.registry,
                orchestrator.membership,
                grace_s=settings.stop_grace_s,
                clock=clock,
            )
            # Jobs that go on without anybody waiting end here, with their tasks.
            raise _Ended
    except* _Ended:
        pass
    finally:
        folder.run_file(ROLE).unlink(missing_ok=True)
        shutil.rmtree(sockets_dir, ignore_errors=True)
        await database.close()
    log.info("ended")


class _Ended(Exception):
    """Ends the daemon's task group and all that is left in it."""


async def _serve(
    o: Orchestrator, folder: StateDir, sock: socket.socket, group: asyncio.TaskGroup, *, is_background: bool
) -> None:
    settings = o.settings
    url = _url_for_peers(sock)
    o.registry.public_url = url

    async def started() -> None:
        state_dir.write(folder.run_file(ROLE), _run_record(url, folder))
        logs.get("arriero.orchestrator").info("listening", url=url, pid=os.getpid())
        await o.tasks.resume()

    group.create_task(_end_in_time(o, settings.stop_grace_s), name="end-in-time")
    group.create_task(_keep_log_small(folder.log_file(ROLE), settings.log_bytes_max, o.clock), name="log")
    if is_background and settings.orchestrator_idle_s > 0:
        group.create_task(_leave_when_idle(o, o.clock, settings.orchestrator_idle_s), name="leave-when-idle")
    management = make_app(handlers(o), title="arriero orchestrator", openapi_path="/schema")
    app = Front(o, cast(AsgiApp, management))
    try:
        await serve(
            Guard(app, hosts=settings.hosts()),
            sock,
            stop=o.stop,
            on_started=started,
            grace_s=settings.stop_grace_s + LAST_WORDS_S,
        )
        await _drain_tasks(o)
    finally:
        o.upstreams.close()


async def _end_in_time(o: Orchestrator, grace_s: float) -> None:
    """After the grace time tell all streams that still run that it is over."""
    await o.stop.wait()
    o.tasks.stopping()
    await o.clock.sleep_s(grace_s)
    o.exchanges.abort_all(ArrieroError(ErrorCode.REQUEST_CANCELLED, "the orchestrator is stopping"))


async def _drain_tasks(o: Orchestrator) -> None:
    """Wait for tasks that nobody is connected to; `_end_in_time` ends them after the grace time."""
    while len(o.tasks):
        await o.clock.sleep_s(0.02)


async def _keep_log_small(path: Path, bytes_max: int, clock: Clock) -> None:
    while True:
        await asyncio.to_thread(rotate, path, bytes_max)
        await clock.sleep_s(LOG_LOOK_S)


async def _leave_when_idle(o: Orchestrator, clock: Clock, idle_s: float) -> None:
    last_work_s = clock.monotonic_s()
    while True:
        await clock.sleep_s(idle_s / _IDLE_CHECKS)
        now_s = clock.monotonic_s()
        if o.is_working:
            last_work_s = now_s
        elif now_s - max(last_work_s, o.exchanges.last_end_s) >= idle_s:
            logs.get("arriero.orchestrator").info("leaving", idle_s=idle_s)
            o.stop.set()
            return


def _url_for_peers(sock: socket.socket) -> str:
    """Return the address that programs of this machine reach us at, also where we listen on all."""
    return url_of(sock).replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def _run_record(url: str, folder: StateDir) -> RunRecord:
    pid = os.getpid()
    known = processes.identity(pid)
    assert known is not None
    return RunRecord(
        pid=pid,
        url=url,
        version=__version__,
        started=SystemClock().wall_s(),
        pid_start_ticks=known.start_ticks,
        boot_id=known.boot_id,
        log_path=str(folder.log_file(ROLE)),
    )


def _end_agent(folder: StateDir, timeout_s: float) -> None:
    """End the local agent, that very process, and wait for it."""
    record = folder.running("agent")
    if record is None:
        return
    known = run_identity(record)
    if processes.signal_process(known, signal.SIGTERM):
        processes.wait_gone(known, timeout_s)
