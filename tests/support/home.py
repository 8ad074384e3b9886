"""A state folder with whatever runs in it, driven by commands alone; nothing of it may remain."""

import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
from tests.support import cli

from arriero.runtime import processes
from arriero.runtime.state_dir import StateDir

T = TypeVar("T")


def until(what: str, look: Callable[[], T | None], timeout_s: float = 90.0) -> T:
    """Return the first answer of `look` that is not None, False or empty."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)
    return found


class Home:
    """One pool's state folder on free ports; `with Home() as home`."""

    def __init__(self, **settings: Any) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="arr-"))
        self._sockets = self._folder / "x"
        self._sockets.mkdir(mode=0o700)
        self.state = StateDir(self._folder / "home")
        chosen = {
            "orchestrator_port": 0,
            "agent_port": 0,
            "worker_port_base": random.randrange(20_000, 32_000, 40),
            "node_name": "box",
            "engine_threads": 1,
            "stop_grace_s": 5,
            **settings,
        }
        self.env = cli.environment(
            self.state.home,
            XDG_RUNTIME_DIR=str(self._sockets),
            **{
                f"ARRIERO_{name.upper()}": _text(value) for name, value in chosen.items() if value is not None
            },
        )

    def __enter__(self) -> "Home":
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            # The last resort of a test that failed half-way; one that passed has nothing left for it.
            for process in self.processes():
                process.kill()
            psutil.wait_procs(self.processes(), 60)
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, *arguments: str, content: str | None = None, **env: str) -> cli.Done:
        """Run a command with this state folder."""
        return cli.run(*arguments, env=self.env | env, content=content)

    def start(self, *arguments: str, **env: str) -> Any:
        """Start a command with this state folder."""
        return cli.start(*arguments, env=self.env | env)

    def up(self) -> dict[str, Any]:
        """Bring the pool up; return what `up --json` says."""
        done = self.run("up", "--json", "-q")
        assert done.code == 0, done
        found: dict[str, Any] = done.json
        return found

    def workers(self) -> list[dict[str, Any]]:
        """Return the workers as `ps` shows them."""
        found: list[dict[str, Any]] = self.run("ps", "--json").json["workers"]
        return found

    def pid(self, role: str) -> int:
        """Return the pid of a daemon that runs."""
        record = self.state.running(role)
        assert record is not None, f"no {role} runs"
        return record.pid

    def url(self) -> str:
        """Return the orchestrator's address."""
        record = self.state.running("orchestrator")
        assert record is not None, "no orchestrator runs"
        return record.url

    def kill(self, pid: int) -> None:
        """SIGKILL a process and wait for its end."""
        known = processes.identity(pid)
        assert known is not None
        os.kill(pid, signal.SIGKILL)
        assert processes.wait_gone(known, 60)

    def processes(self) -> list[psutil.Process]:
        """Return every process that has this state folder, or its sockets, in its environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get("ARRIERO_HOME") == str(
                    self.state.home
                ):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def assert_clean(self) -> None:
        """Fail if a process, a socket or a run file is left."""
        until("all processes have ended", lambda: not self.processes(), 60)
        run_files = [
            path.name for path in self.state.run.rglob("*") if path.is_file() and path.suffix != ".lock"
        ]
        assert run_files == []
        assert [path for path in self._sockets.rglob("*") if path.name != f"arriero-{os.getuid()}"] == []


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
