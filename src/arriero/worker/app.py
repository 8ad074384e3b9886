"""How does a worker live, from the line on its stdin to its exit code?"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import WorkerExit
from arriero.contracts.requests import WorkerSpec
from arriero.contracts.states import WorkerState
from arriero.engines import registry
from arriero.engines.base import Engine
from arriero.runtime import daemon, logs, state_dir
from arriero.runtime.asgi import AsgiApp, Guard
from arriero.runtime.attention import Attention
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SystemEntropy
from arriero.runtime.serve import bind, serve, url_of
from arriero.worker import callback
from arriero.worker.core import Core
from arriero.worker.ending import Ending
from arriero.worker.engine_host import EngineHost, exit_of
from arriero.worker.fencing import Fencing
from arriero.worker.flights import Flights
from arriero.worker.lease import Lease
from arriero.worker.metrics import Metrics
from arriero.worker.routes.admin import AdminRoutes
from arriero.worker.routes.inference import InferenceRoutes
from arriero.worker.routes.openai import OpenAiRoutes
from arriero.worker.routes.status import StatusRoutes
from arriero.worker.slots import Slots
from arriero.worker.state import Lifecycle
from arriero.worker.web import Router, Signed

HOST: Final = "127.0.0.1"
PORT_TRIES: Final = 200
_SPEC_BYTES_MAX: Final = 1 << 20
#: Open streams have so long to send their last frames when everything else is over.
_HTTP_GRACE_S: Final = 2.0
#: Cancelled requests have so long to let go of the engine.
_LET_GO_S: Final = 10.0
#: An engine that is asked to stop has so long before it is killed.
_UNLOAD_GRACE_S: Final = 5.0
#: The requests' part of the grace time; the rest is for unloading, before whoever sent the signal
#: loses patience.
_DRAIN_FRACTION: Final = 0.8


def main() -> int:
    """Be a worker: read its `WorkerSpec` from stdin, serve until the end, return the exit code."""
    logs.configure(role="worker")
    try:
        spec = _read_spec()
        engine = registry.kind(spec.engine).create()
        with bind(HOST, spec.port_base, tries=PORT_TRIES) as sock, _run_dir(spec) as run_dir:
            return _live(spec, engine, sock, run_dir)
    except ArrieroError as error:
        logs.get("arriero.worker").error("worker_failed", code=str(error.code), message=error.message)
        return int(error.kind.exit_code)


def _read_spec() -> WorkerSpec:
    """Return what the agent wrote; the end of stdin means nothing afterwards."""
    line = sys.stdin.buffer.readline(_SPEC_BYTES_MAX)
    try:
        return msgspec.json.decode(line, type=WorkerSpec)
    except msgspec.DecodeError as error:
        raise ArrieroError(ErrorCode.INVALID_REQUEST, f"stdin holds no WorkerSpec: {error}") from error


@contextlib.contextmanager
def _run_dir(spec: WorkerSpec) -> Iterator[Path]:
    """Hold the worker's private folder; one that the agent made stays for the agent to read and remove."""
    if spec.run_dir:
        Path(spec.run_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        yield Path(spec.run_dir)
        return
    own = Path(tempfile.mkdtemp(prefix="w-", dir=state_dir.short_dir()))
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _live(spec: WorkerSpec, engine: Engine, sock: socket.socket, run_dir: Path) -> int:
    exit_code = 0

    async def run(stop: asyncio.Event) -> None:
        nonlocal exit_code
        worker = _Worker(spec, engine, url_of(sock), run_dir)
        exit_code = await worker.live(sock)

    daemon.run(run)
    return exit_code


class _Worker:
    """The parts put together, and the order in which they begin and end."""

    def __init__(self, spec: WorkerSpec, engine: Engine, url: str, run_dir: Path) -> None:
        clock = SystemClock()
        self._run_dir = run_dir
        self._log = logs.get("arriero.worker")
        lifecycle = Lifecycle(clock)
        self._core = Core(
            spec=spec,
            url=url,
            clock=clock,
            entropy=SystemEntropy(),
            lifecycle=lifecycle,
            slots=Slots(
                slots=spec.slots,
                queue_max=spec.queue_max,
                on_change=lambda: lifecycle.settle(self._core.slots.busy),
            ),
            flights=Flights(),
            attention=Attention(),
            host=EngineHost(engine, spec, run_dir, lifecycle),
            lease=Lease(spec.lease_s, clock, is_owned=bool(spec.callback_url)),
            fencing=Fencing(spec.fence),
            ending=Ending(),
            metrics=Metrics(),
        )

    async def live(self, sock: socket.socket) -> int:
        """Serve, load, wait for the wish to end, end; return the exit code."""
        core = self._core
        self._take_signals()
        started, http_stop = asyncio.Event(), asyncio.Event()

        async def on_started() -> None:
            started.set()

        async with asyncio.TaskGroup() as group:
            serving = serve(self._app(), sock, stop=http_stop, on_started=on_started, grace_s=_HTTP_GRACE_S)
            group.create_task(serving, name="http")
            await started.wait()
            self._log.info("listening", url=core.url, worker_id=core.spec.worker_id, pid=os.getpid())
            core.lifecycle.go(WorkerState.LOADING)
            engine_task = group.create_task(self._run_engine(), name="engine")
            side = [engine_task, group.create_task(self._keep_lease(), name="lease")]
            if core.spec.callback_url:
                side.append(group.create_task(self._call_back(), name="ready-callback"))
            try:
                await core.ending.requested()
                if core.ending.error is None:
                    await self._drain()
            finally:
                for task in side:
                    task.cancel()
                await asyncio.wait(side, timeout=_LET_GO_S)
                unload_s = core.spec.stop_grace_s * (1 - _DRAIN_FRACTION) / 2
                await core.host.unload(min(_UNLOAD_GRACE_S, unload_s))
            await self._finish()
            http_stop.set()
        exit_code = core.lifecycle.exit.exit_code if core.lifecycle.exit else None
        return exit_code or 0

    def _app(self) -> AsgiApp:
        core = self._core
        routes = {
            **StatusRoutes(core).table(),
            **InferenceRoutes(core).table(),
            **OpenAiRoutes(core).table(),
            **AdminRoutes(core).table(),
        }
        names = [
            (b"x-arriero-node", core.spec.node.encode("latin-1", "replace")),
            (b"x-arriero-worker", core.spec.worker_id.encode("latin-1", "replace")),
        ]
        return Signed(Guard(Router(routes, core.now_s, core.fencing), token=core.spec.token), names)

    def _take_signals(self) -> None:
        """SIGTERM and SIGINT drain with the grace time; the second one ends at once."""
        core, is_signalled = self._core, False

        def on_signal(name: str) -> None:
            nonlocal is_signalled
            core.end(name, grace_s=0.0 if is_signalled else core.spec.stop_grace_s * _DRAIN_FRACTION)
            is_signalled = True

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number.name)

    # --- what runs beside the requests ---------------------------------------------------------

    async def _run_engine(self) -> None:
        """Load, then watch; the engine's failure is the worker's."""
        core = self._core
        try:
            await core.host.load()
            error = await core.host.watch()
        except ArrieroError as met:
            core.host.failed(met)
            error = met
        core.ending.fail(error)

    async def _keep_lease(self) -> None:
        core = self._core
        await core.lease.wait_over()
        self._log.warning("lease_over", lease_s=core.spec.lease_s)
        # A lease of 0 s is a pool that is to vanish with its agent; otherwise nobody waits for us.
        core.end("lease over", grace_s=core.spec.stop_grace_s if core.spec.lease_s == 0 else None)

    async def _call_back(self) -> None:
        core = self._core
        try:
            await callback.deliver(core.spec, core.url, core.lease, core.clock, core.entropy)
        except ArrieroError as error:
            core.ending.fail(error)

    # --- the end -------------------------------------------------------------------------------

    async def _drain(self) -> None:
        """Let the requests finish, or time run out, or the engine fail."""
        core = self._core
        async with asyncio.TaskGroup() as group:
            ends = {
                group.create_task(core.flights.wait_empty(), name="drained"),
                group.create_task(core.ending.out_of_grace(), name="out-of-grace"),
            }
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            for task in ends:
                task.cancel()
        if core.ending.error is None:
            core.flights.interrupt_all(
                ArrieroError(ErrorCode.WORKER_LOST, f"the worker ends: {core.ending.reason}", reason="ending")
            )
            await self._let_go()

    async def _let_go(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LET_GO_S):
                await self._core.flights.wait_empty()

    async def _finish(self) -> None:
        """Write down how it ended, tell whoever listens, end what still runs."""
        core, error = self._core, self._core.ending.error
        ended = (
            WorkerExit(exit_code=0, message=core.ending.reason)
            if error is None
            else exit_of(error, core.host.log_tail)
        )
        core.lifecycle.exit = ended
        with contextlib.suppress(OSError):  # The folder may be gone with its agent: then nobody reads it.
            await asyncio.to_thread(state_dir.write, self._run_dir / "exit.json", ended)
        if error is None:
            core.lifecycle.go(WorkerState.STOPPED, reason=core.ending.reason)
            return
        self._log.error("worker_failed", code=str(error.code), message=error.message)
        core.lifecycle.failure = error
        core.lifecycle.go(WorkerState.FAILED, code=str(error.code))
        core.flights.interrupt_all(error)
        await self._let_go()
