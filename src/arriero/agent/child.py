"""How is a worker's process started, and how is its end seen?

The worker reads its spec from stdin only after its run record is on disk: an agent that dies in
between leaves an end of file there, and the worker ends.  So no worker lives without a record.
"""

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import WorkerSpec
from arriero.runtime import processes
from arriero.runtime.clock import Clock
from arriero.runtime.processes import Identity

#: Where the system has no pidfd: how often a process is looked at.
_LOOK_S: Final = 0.1


def worker_argv(command: str) -> list[str]:
    """Return the program that becomes a worker: `command` split as a shell would, or our own."""
    return shlex.split(command) if command else [sys.executable, "-m", "arriero", "worker"]


class Child:
    """A worker's process: one that we started (`popen`), or one that an earlier agent did."""

    def __init__(self, identity: Identity, popen: subprocess.Popen[bytes] | None = None) -> None:
        self.identity = identity
        self._popen = popen

    @property
    def pid(self) -> int:
        """Its pid, which is its process group's too."""
        return self.identity.pid

    def hand_over(self, spec: WorkerSpec) -> None:
        """Write the spec to its stdin and close it; nothing if the process is gone already."""
        assert self._popen is not None, "an adopted worker has its spec"
        assert self._popen.stdin is not None, "a worker is started with a pipe as stdin"
        # A spec is far smaller than a pipe: this never blocks.
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.write(msgspec.json.encode(spec) + b"\n")
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()

    async def wait_ended(self, clock: Clock) -> None:
        """Wait, without a limit, until the process has ended; sweep what is left of its group."""
        if not await self._wait_by_descriptor():
            # Nothing tells of the end here: it has to be looked for.
            while not self._has_ended():
                await clock.sleep_s(_LOOK_S)
        if self._popen is not None and self._popen.returncode is None:
            # Before the process is reaped its group's number cannot belong to anybody else.
            processes.signal_group(self.pid, signal.SIGKILL)
            self._popen.wait(timeout=processes.KILLED_WAIT_S)

    def kill(self) -> None:
        """Send SIGKILL to the process and all it started in its group; nothing if it has ended."""
        if not self._has_ended():
            processes.signal_group(self.pid, signal.SIGKILL)

    def terminate(self) -> None:
        """Ask the process itself to end."""
        if not self._has_ended():
            processes.signal_process(self.identity, signal.SIGTERM)

    def result(self) -> tuple[int | None, str | None]:
        """Return exit code and signal of the ended process, (None, None) where nobody saw them."""
        if self._popen is None or self._popen.returncode is None:
            return None, None
        return processes.exit_code_of(self._popen.returncode)

    def abandon(self) -> None:
        """Kill a process that was started and is not handed its spec."""
        assert self._popen is not None, "an adopted worker has its spec"
        assert self._popen.stdin is not None, "a worker is started with a pipe as stdin"
        self._popen.stdin.close()
        self.kill()
        self._popen.wait(timeout=processes.KILLED_WAIT_S)

    def _has_ended(self) -> bool:
        if self._popen is not None:
            return self._popen.returncode is not None or not processes.is_alive(self.identity)
        return not processes.is_alive(self.identity)

    async def _wait_by_descriptor(self) -> bool:
        """Return True once the process has ended; False where the system has no pidfd."""
        if not hasattr(os, "pidfd_open"):
            return False
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def on_readable() -> None:
            if not ended.done():
                ended.set_result(None)

        try:
            # Only now is it certain whose descriptor this is: a pid may have been used again.
            if not processes.is_alive(self.identity):
                return True
            loop.add_reader(descriptor, on_readable)
            try:
                await ended
            finally:
                loop.remove_reader(descriptor)
        finally:
            os.close(descriptor)
        return True


def start(argv: Sequence[str], *, log_path: Path, env: dict[str, str]) -> Child:
    """Start `argv` in a session of its own, its output appended to `log_path`, stdin a pipe.

    Raises WORKER_BINARY_NOT_FOUND if the program does not exist or may not be run.
    """
    log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        popen = subprocess.Popen(
            list(argv),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            close_fds=True,
            cwd="/",
            env=env,
        )
    except OSError as error:
        name = Path(argv[0]).name if argv else ""
        raise ArrieroError(
            ErrorCode.WORKER_BINARY_NOT_FOUND,
            f"the worker's program {name[:80]!r} cannot be run: {error.strerror}",
            program=name[:80],
        ) from error
    finally:
        os.close(log)
    ticks = processes.start_ticks(popen.pid)
    # A child that is dead already is a zombie without a start time; it is ours all the same.
    return Child(Identity(popen.pid, ticks or 0, processes.boot_id()), popen)
