"""A machine behind a real sshd, on which arriero is installed in a moment.

Its environment has this one's packages, and the files of the arriero that is to run there; so adding
such a machine does all that adding does but pip's work, which has tests of its own.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import psutil
from tests.support import cli
from tests.support.home import Home, until

import arriero
from arriero.contracts.records import Capabilities
from arriero.contracts.version import API_VERSION, __version__
from arriero.orchestrator.store import open_database
from arriero.orchestrator.store.nodes import NodeEntry, NodeStore
from arriero.runtime.entropy import SystemEntropy
from arriero.testing.sshd import SshServer

PACKAGE = Path(str(arriero.__file__)).parent
_TAG = "import sys; from pathlib import Path; from arriero.orchestrator.machines import wheel; print(wheel.pack(Path(sys.argv[1])).tag)"


def other_version(folder: Path, version: str) -> Path:
    """Return a folder that holds arriero in another version, for PYTHONPATH."""
    shutil.copytree(PACKAGE, folder / "arriero", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "arriero/contracts/version.py"
    text = re.sub(r'^__version__ = ".*"$', f'__version__ = "{version}"', file.read_text(), flags=re.MULTILINE)
    file.write_text(text)
    return folder


def register(home: Home, name: str, ssh: str) -> None:
    """Have the next orchestrator of a pool know a machine as if it had been added once."""
    has = Capabilities(
        name=name, version=__version__, api_version=API_VERSION, backends=["cpu"], devices=[], engines={},
        ram_mb=8000, ram_free_mb=4000, disk_free_mb=9000, cpu_cores=2, os="linux", arch="x86_64",
    )  # fmt: skip

    async def save() -> None:
        home.state.prepare()
        database = await open_database(home.state.orchestrator_db)
        try:
            store = await NodeStore.open(database, SystemEntropy())
            await store.save(NodeEntry(name=name, ssh=ssh, install_path="arr", capabilities=has))
        finally:
            await database.close()

    asyncio.run(save())


class Remote:
    """One machine: its sshd, its install path, and what runs there; `with Remote(folder) as remote`."""

    def __init__(self, folder: Path, **env: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.server = SshServer(
            folder,
            env={
                "ARRIERO_CONFIG": str(folder / "config.toml"),
                "ARRIERO_STOP_GRACE_S": "5",
                # Nothing answers there: what this machine has comes through the pool.
                "HF_ENDPOINT": "http://127.0.0.1:9",
                **env,
            },
        )
        self.folder = folder
        self.path = folder / "arr"
        (folder / "config.toml").write_text("engine_threads = 1\n")

    def __enter__(self) -> Self:
        self.server.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        try:
            # What a test that failed left; keepers first, or they would start agents anew.
            for process in sorted(self.processes(), key=lambda p: "keep-agent" not in p.cmdline()):
                process.kill()
            psutil.wait_procs(self.processes(), 60)
        finally:
            self.server.__exit__(*exc)

    def prepare(self, source: Path | None = None) -> str:
        """Put an environment there as an installation would leave it; return its tag."""
        package = source or PACKAGE.parent
        env = {**os.environ, "PYTHONPATH": str(package)}
        done = subprocess.run(
            [sys.executable, "-c", _TAG, str(self.folder / "dist")], env=env, capture_output=True, check=True
        )
        tag = done.stdout.decode().strip()
        environment = self.path / "envs" / tag
        packages = environment / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
        packages.mkdir(parents=True)
        site = next(path for path in map(Path, sys.path) if path.name == "site-packages")
        (packages / "here.pth").write_text(f"{package}\n{site}\n")
        (environment / "bin").mkdir()
        (environment / "bin/python").symlink_to(Path(sys.executable).resolve())
        (environment / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
        (environment / "arriero-environment.json").write_text(json.dumps({"version": tag.split("-")[0]}))
        if not (self.path / "installed-by-arriero.json").exists():
            (self.path / "installed-by-arriero.json").write_text(json.dumps({"made": [str(self.path)]}))
        return tag

    def add(self, home: Home, name: str, *more: str, **env: str) -> cli.Done:
        """Have a pool add it."""
        return home.run(
            "nodes", "add", name, "--ssh", self.server.target, "--key", str(self.server.key),
            "--accept-host-key", self.server.fingerprint(), "--install-path", str(self.path), *more,
            **env,
        )  # fmt: skip

    def run_record(self) -> dict[str, Any]:
        """Return the agent's run file."""
        found: dict[str, Any] = json.loads((self.path / "home/run/agent.json").read_text())
        return found

    def kill_agent(self) -> int:
        """SIGKILL the agent, and return which pid it had."""
        pid: int = self.run_record()["pid"]
        os.kill(pid, signal.SIGKILL)
        return pid

    def processes(self) -> list[psutil.Process]:
        """Return every process that was started from there."""
        found = []
        for process in psutil.process_iter():
            try:
                home = process.environ().get("ARRIERO_HOME", "")
                if process.pid != os.getpid() and home.startswith(str(self.path)):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def assert_quiet(self) -> None:
        """Fail if anything still runs there."""
        until("all processes there have ended", lambda: not self.processes(), 60)
