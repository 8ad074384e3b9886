"""A real agent in a process of its own, with a state folder of its own, for tests and demos."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

import msgspec

from arriero.client.api import Agent
from arriero.contracts.records import RunRecord, WorkerRecord
from arriero.contracts.requests import SpawnBody
from arriero.contracts.states import WorkerState
from arriero.runtime import processes
from arriero.runtime.state_dir import StateDir, socket_dir, worker_identity

T = TypeVar("T")
START_LIMIT_S: Final = 90.0
WAIT_LIMIT_S: Final = 60.0
_LOOK_S: Final = 0.02


def wait_for(look: Callable[[], T], what: str, *, limit_s: float = WAIT_LIMIT_S) -> T:
    """Return what `look` returns once that is true (or something, or not empty).

    Raises AssertionError after the limit.
    """
    deadline_s = time.monotonic() + limit_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {limit_s:g} s: {what}")
        time.sleep(_LOOK_S)


class AgentProcess:
    """One agent process.  Used as `with AgentProcess(home) as agent`; everything it left is removed.

    `home` is kept, so that a second agent can follow the first; `env` are settings without the
    prefix, such as `{"lease_s": "0"}`.
    """

    def __init__(self, home: Path, env: Mapping[str, str] | None = None) -> None:
        self.home = home
        self.state = StateDir(home)
        self._env = dict(env or {})
        self.process: subprocess.Popen[bytes] | None = None
        self.run: RunRecord | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.clean_up()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clean_up()

    @property
    def client(self) -> Agent:
        """A client of the agent that runs now."""
        assert self.run is not None, "the agent is not started"
        return Agent(self.run.url, self.run.token)

    @property
    def log(self) -> str:
        """What the agent has logged so far."""
        path = self.state.log_file("agent")
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def launch(self) -> subprocess.Popen[bytes]:
        """Start the process and return at once."""
        self.state.logs.mkdir(parents=True, exist_ok=True)
        self.process = processes.spawn_detached(
            [sys.executable, "-m", "arriero", "agent"],
            log_path=self.state.log_file("agent"),
            env=self._environment(),
        )
        return self.process

    def start(self) -> RunRecord:
        """Start the agent and wait until it answers."""
        process = self.launch()

        def answers() -> RunRecord | None:
            if process.poll() is not None:
                raise AssertionError(f"the agent ended with {process.returncode}: {self.log[-3000:]}")
            run = self.state.running("agent")
            return run if run is not None and run.pid == process.pid else None

        run = wait_for(answers, "the agent answers", limit_s=START_LIMIT_S)
        assert run is not None, "waited for"
        self.run = run
        return run

    def terminate(self, *, limit_s: float = 60.0) -> int:
        """Send SIGTERM, wait for the end, return the exit code."""
        assert self.process is not None, "the agent is not started"
        self.process.terminate()
        return self.process.wait(limit_s)

    def kill(self) -> None:
        """Send SIGKILL and wait for the end; its workers live on."""
        assert self.process is not None, "the agent is not started"
        self.process.kill()
        self.process.wait(30)

    def spawn(self, model_ref: str = "demo", **fields: object) -> WorkerRecord:
        """Start a worker."""
        return self.client.spawn(msgspec.convert({"model_ref": model_ref, **fields}, SpawnBody))

    def wait_worker(
        self, worker_id: str, *states: WorkerState, limit_s: float = WAIT_LIMIT_S
    ) -> WorkerRecord:
        """Wait until a worker is in one of `states`; an end that was not waited for fails at once."""
        client = self.client

        def arrived() -> WorkerRecord | None:
            record = client.worker(worker_id)
            if record.state in states:
                return record
            if record.state in (WorkerState.FAILED, WorkerState.STOPPED):
                raise AssertionError(f"{worker_id} is {record.state}, not {states}: {record.exit}")
            return None

        record = wait_for(arrived, f"{worker_id} becomes {states}", limit_s=limit_s)
        assert record is not None, "waited for"
        return record

    def clean_up(self) -> None:
        """End the agent and every worker of its state folder, whatever happened before."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(30)
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(30)
        for run in self.state.worker_runs():
            identity = worker_identity(run)
            if processes.is_alive(identity):
                processes.signal_group(identity.pid, signal.SIGKILL)
                processes.wait_gone(identity, 30)
            shutil.rmtree(socket_dir(run.record.worker_id), ignore_errors=True)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ARRIERO_")}
        given = {f"ARRIERO_{name.upper()}": value for name, value in self._env.items() if name.islower()}
        others = {name: value for name, value in self._env.items() if not name.islower()}
        return {
            **kept,
            "ARRIERO_HOME": str(self.home),
            "ARRIERO_AGENT_PORT": "0",
            "ARRIERO_WORKER_PORT_BASE": "23001",
            "PYTHONWARNINGS": "default",
            **given,
            **others,
        }


@contextlib.contextmanager
def agent(env: Mapping[str, str] | None = None) -> Iterator[AgentProcess]:
    """Run an agent with a temporary state folder."""
    with (
        tempfile.TemporaryDirectory(prefix="arriero-", ignore_cleanup_errors=True) as folder,
        AgentProcess(Path(folder), env) as running,
    ):
        yield running
