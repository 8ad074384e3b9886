"""How does the worker load its engine, notice its end, and let it go?"""

import asyncio
import contextlib
import os
import signal
from pathlib import Path
from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import WorkerExit
from arriero.contracts.requests import WorkerSpec
from arriero.engines.base import Engine, EngineExit, EngineSpec, LoadEvent, LoadReady
from arriero.runtime import logs
from arriero.worker.state import Lifecycle

#: A broken stream waits so long to hear how the engine ended.
_VERDICT_WAIT_S: Final = 2.0
_LOG_LINES: Final = 20


class EngineHost:
    """One engine, from `load` to `unload`."""

    def __init__(self, engine: Engine, spec: WorkerSpec, run_dir: Path, lifecycle: Lifecycle) -> None:
        self.engine: Final = engine
        self._spec = spec
        self._run_dir = run_dir
        self._lifecycle = lifecycle
        self._log = logs.get("arriero.worker")
        self._is_loaded = False
        self._failed = asyncio.Event()
        self._failure: ArrieroError | None = None
        self.pid: int | None = None
        self.load_s = 0.0
        #: The last lines an engine wrote that ended by itself.
        self.log_tail: tuple[str, ...] = ()

    async def load(self) -> None:
        """Load the model, telling the lifecycle each step.

        Raises what the engine raises, and LOADING_TIMEOUT when nothing advances for `loading_stall_s`.
        """
        spec = self._spec
        started_s = asyncio.get_running_loop().time()
        events = self.engine.load(
            EngineSpec(
                model_path=Path(spec.model_path),
                slots=spec.slots,
                context_tokens=spec.context_tokens,
                backend=spec.backend,
                device=spec.device,
                run_dir=self._run_dir,
                threads=spec.threads,
                loading_stall_s=spec.loading_stall_s,
                options=spec.engine_options,
                engine_folder=Path(spec.engine_folder) if spec.engine_folder else None,
            )
        )
        try:
            async with asyncio.timeout(spec.loading_stall_s) as limit:
                async for event in events:
                    if self._advances(event):
                        limit.reschedule(asyncio.get_running_loop().time() + spec.loading_stall_s)
                    if isinstance(event, LoadReady):
                        self.pid = event.pid
                        self._is_loaded = True
                        self.load_s = asyncio.get_running_loop().time() - started_s
                    self._lifecycle.loaded_so_far(event)
        except TimeoutError:
            raise ArrieroError(
                ErrorCode.LOADING_TIMEOUT,
                f"loading brought no progress for {spec.loading_stall_s:g} s, "
                f"at {self._lifecycle.loading.fraction:.0%}",
                timeout_s=spec.loading_stall_s,
                fraction=self._lifecycle.loading.fraction,
            ) from None
        finally:
            await events.aclose()

    def _advances(self, event: LoadEvent) -> bool:
        if isinstance(event, LoadReady):
            return True
        before = self._lifecycle.loading
        return (event.fraction, event.layers_loaded, event.memory_mb, event.stage) != (
            before.fraction,
            before.layers_loaded,
            before.memory_mb,
            before.stage,
        )

    async def watch(self) -> ArrieroError:
        """Wait, without a limit, until the engine ends by itself; return what the streams are told."""
        ended = await self.engine.wait_exited()
        error = error_of_exit(ended)
        self._log.error(
            "engine_ended", code=str(error.code), message=error.message, log_tail=ended.log_tail[-_LOG_LINES:]
        )
        self.log_tail = ended.log_tail
        self.failed(error)
        return error

    def failed(self, error: ArrieroError) -> None:
        """Note why nothing more comes from this engine; the first reason counts."""
        if self._failure is None:
            self._failure = error
            self._failed.set()

    async def explain(self, error: ArrieroError) -> ArrieroError:
        """Return what really happened behind an error that a stream met.

        A broken connection to the engine is seen before its process is: waits for that, a short while.
        """
        if error.code is not ErrorCode.WORKER_LOST:
            return error
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_VERDICT_WAIT_S):
                await self._failed.wait()
        return self._failure or error

    async def unload(self, grace_s: float) -> None:
        """Stop the engine.  Safe to call twice, and before load."""
        await self.engine.unload(grace_s)

    def memory_mb(self) -> int:
        """Return the resident memory of worker and engine in MiB, now."""
        total = resident_mb(os.getpid()) + (resident_mb(self.pid) if self.pid else 0)
        return total or self._lifecycle.loading.memory_mb


def resident_mb(pid: int) -> int:
    """Return a process's resident memory in MiB; 0 if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
    except (OSError, ValueError, IndexError):
        import psutil

        try:
            return int(psutil.Process(pid).memory_info().rss >> 20)
        except psutil.Error:
            return 0
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def error_of_exit(ended: EngineExit) -> ArrieroError:
    """Return the error that the end of an engine is to everybody who waits for it."""
    how = f"exit code {ended.exit_code}"
    if ended.signal is not None:
        how = signal_name(ended.signal)
    details = {"engine_exit_code": ended.exit_code, "engine_signal": ended.signal}
    if ended.is_out_of_memory:
        return ArrieroError(
            ErrorCode.OUT_OF_MEMORY, f"the kernel killed the engine for memory ({how})", **details
        )
    return ArrieroError(ErrorCode.WORKER_LOST, f"the engine ended by itself ({how})", **details)


def signal_name(number: int) -> str:
    """Return a signal's name, such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def exit_of(error: ArrieroError, log_tail: tuple[str, ...] = ()) -> WorkerExit:
    """Return how the worker's process ends because of `error`: the code of its row, 1 for most."""
    lines = log_tail or tuple(error.details.get("log_tail", ()))
    is_out_of_memory = error.code is ErrorCode.OUT_OF_MEMORY
    return WorkerExit(
        exit_code=int(error.kind.exit_code),
        signal="SIGKILL" if is_out_of_memory else None,
        code=str(error.code),
        message=error.message,
        log_tail=[str(line)[:500] for line in lines[-_LOG_LINES:]],
    )
