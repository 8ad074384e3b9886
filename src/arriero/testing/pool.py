"""How does a test get a real pool of its own?  Real programs, real sockets, its own state folder.

Synchronous and outside: it starts programs, speaks HTTP and reads run files, as a person would.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias, TypeVar

import msgspec
import psutil

from arriero.client.api import Agent, Orchestrator
from arriero.client.connection import Limits
from arriero.contracts.errors import ArrieroError
from arriero.contracts.records import RunRecord, WorkerRecord
from arriero.runtime.processes import tail
from arriero.runtime.state_dir import StateDir
from arriero.testing import leaks

Role: TypeAlias = Literal["orchestrator", "agent"]
T = TypeVar("T")
START_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 60.0
LOOK_S: Final = 0.02
ARRIERO: Final = (sys.executable, "-m", "arriero")
#: Environment that would reach from the machine into the pool.
_NOT_OURS: Final = ("ARRIERO_", "HF_", "HUGGING", "XDG_RUNTIME_DIR")


class NeverSo(AssertionError):
    """What was waited for did not become so in time."""


def eventually(what: str, look: Callable[[], T | None], timeout_s: float = 60.0) -> T:
    """Return the first answer of `look` that is not None or False.  Raises NeverSo after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = look()
        if found is not None and found is not False:
            return found
        if time.monotonic() >= deadline:
            raise NeverSo(f"not within {timeout_s:g} s: {what}")
        time.sleep(LOOK_S)


class Pool:
    """One machine's pool with its own state folder, used as `with Pool(…) as pool`.

    Nothing runs until `start`.  Leaving the `with` ends everything that belongs to the folder;
    what should not have been there any more after a clean stop is told by `stop`.
    """

    def __init__(self, settings: Mapping[str, object] | None = None) -> None:
        # Short: sockets live below it, and their paths end at 107 bytes.
        self.home = Path(tempfile.mkdtemp(prefix="arr-"))
        self.state = StateDir(self.home / "home")
        self.socket_dirs = self.home / "x"
        self.socket_dirs.mkdir(mode=0o700)
        self._settings: dict[str, object] = {
            "node_name": "here",
            "orchestrator_port": 0,
            "agent_port": 0,
            "worker_port_base": random.randrange(20_000, 32_000, 50),
            "engine_threads": 1,
            **(settings or {}),
        }
        self._variables: dict[str, str] = {}
        self._daemons: dict[Role, subprocess.Popen[bytes]] = {}
        self._was_killed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    # --- Programs ---------------------------------------------------------------------------------

    @property
    def env(self) -> dict[str, str]:
        """The environment of every program of this pool."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_OURS)}
        own = {f"ARRIERO_{name.upper()}": _text(value) for name, value in self._settings.items()}
        return {
            **kept,
            **own,
            **self._variables,
            "ARRIERO_HOME": str(self.state.home),
            "XDG_RUNTIME_DIR": str(self.socket_dirs),
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
        }

    def setting(self, name: str, value: object) -> None:
        """Change a setting; programs that run already do not hear of it."""
        self._settings[name] = value

    def variable(self, name: str, value: str) -> None:
        """Set an environment variable that is no setting of ours, for programs started from now on."""
        self._variables[name] = value

    def start(self, *roles: Role, prefix: Sequence[str] = ()) -> None:
        """Start daemons (both without `roles`) and wait until they answer.

        `prefix`: a command that runs the daemon's.  Raises NeverSo with the log's end otherwise.
        """
        wanted: tuple[Role, ...] = roles or ("agent", "orchestrator")
        for role in wanted:
            log = self.home / f"{role}.out"
            with log.open("ab") as out:
                self._daemons[role] = subprocess.Popen(
                    [*prefix, *ARRIERO, role],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env=self.env,
                    start_new_session=True,
                )
        for role in wanted:
            self._await_answer(role)
        if {"agent", "orchestrator"} <= set(self._daemons):
            eventually("the orchestrator knows this node", self._has_node, START_TIMEOUT_S)

    def process(self, role: Role) -> subprocess.Popen[bytes]:
        """Return a daemon's process."""
        return self._daemons[role]

    def kill(self, role: Role) -> None:
        """End a daemon by SIGKILL."""
        process = self._daemons.pop(role)
        self._was_killed = True
        process.kill()
        process.wait(STOP_TIMEOUT_S)

    def run(
        self, *arguments: str, timeout_s: float = 120.0, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run `arriero …` against this pool to its end."""
        return subprocess.run(
            [*ARRIERO, *arguments],
            input=stdin,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def begin(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `arriero …` against this pool; the caller ends it."""
        return subprocess.Popen(
            [*ARRIERO, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.env,
            text=True,
        )

    # --- Clients ----------------------------------------------------------------------------------

    def record(self, role: Role) -> RunRecord:
        """Return a daemon's run record.  Raises NeverSo if it does not run."""
        return eventually(f"the {role} runs", lambda: self.state.running(role), START_TIMEOUT_S)

    @property
    def agent(self) -> Agent:
        """A client of the agent."""
        record = self.record("agent")
        return Agent(record.url, record.token, limits=Limits(total_s=60.0))

    @property
    def orchestrator(self) -> Orchestrator:
        """A client of the orchestrator."""
        record = self.record("orchestrator")
        return Orchestrator(record.url, record.token, limits=Limits(total_s=60.0))

    def workers(self) -> list[WorkerRecord]:
        """Return the agent's workers, by start."""
        return self.agent.workers()

    def worker_log(self, worker_id: str) -> str:
        """Return the log of a worker."""
        path = self.state.log_file(f"workers/{worker_id}")
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def daemon_log(self, role: Role) -> str:
        """Return what a daemon wrote on stdout and stderr."""
        return (self.home / f"{role}.out").read_text("utf-8", "replace")

    # --- The end ----------------------------------------------------------------------------------

    def stop(self) -> list[str]:
        """End the daemons by SIGTERM, and return what is left behind of them.

        Where one was killed, `arriero down` has to tidy up first.
        """
        if self._was_killed:
            self.run("down")
        for process in self._daemons.values():
            process.terminate()
        for process in self._daemons.values():
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_TIMEOUT_S)
        self._daemons.clear()
        return leaks.left_behind(self.state.home, socket_dirs=self._own_sockets())

    def destroy(self) -> None:
        """End, by force, everything that belongs to the state folder, and remove the folder."""
        for process in self._daemons.values():
            process.kill()
        found = leaks.processes(self.state.home)
        for left in found:
            with contextlib.suppress(psutil.Error):
                left.send_signal(signal.SIGKILL)
        psutil.wait_procs(found, timeout=STOP_TIMEOUT_S)
        for process in self._daemons.values():
            process.wait(STOP_TIMEOUT_S)
        self._daemons.clear()
        shutil.rmtree(self.home, ignore_errors=True)

    def _own_sockets(self) -> Path:
        return self.socket_dirs / f"arriero-{os.getuid()}"

    def _await_answer(self, role: Role) -> None:
        process = self._daemons[role]

        def look() -> bool:
            if process.poll() is not None:
                raise NeverSo(f"the {role} ended with {process.returncode}")
            record = self.state.running(role)
            return record is not None and record.pid == process.pid

        try:
            eventually(f"the {role} answers", look, START_TIMEOUT_S)
        except NeverSo as error:
            raise NeverSo(f"{error}; {self._words(role)}") from error

    def _has_node(self) -> bool:
        try:
            return any(str(node.status) == "ready" for node in self.orchestrator.nodes())
        except ArrieroError:
            return False

    def _words(self, role: Role) -> str:
        return "\n".join(tail(self.home / f"{role}.out", 3))


def _text(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
