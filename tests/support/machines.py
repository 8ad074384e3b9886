"""A machine behind a real sshd that arriero is installed on, and arrieros to install."""

import os
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from arriero.contracts.events import NodeStep
from arriero.fabrics.base import Connection, NodeAddress
from arriero.fabrics.ssh import SshFabric
from arriero.orchestrator.machines import wheel
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SystemEntropy
from arriero.testing.sshd import SshServer

#: No package index answers there: what an installation needs has to come with it.
NO_INDEX = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
#: The smallest lock: one package, of pure Python.
ONE_PACKAGE = "sniffio"


class Told:
    """The steps that were told, to look at."""

    def __init__(self) -> None:
        self.steps: list[NodeStep] = []

    def __call__(self, step: NodeStep) -> None:
        self.steps.append(step)

    def of(self, step: str) -> str:
        """Return the messages of one kind of step, a line each."""
        return "\n".join(each.message for each in self.steps if each.step == step)


@asynccontextmanager
async def reached(server: SshServer, folder: Path) -> AsyncIterator[Connection]:
    """Yield a connection to a server; `folder` is for its sockets."""
    fabric = SshFabric(SystemClock(), SystemEntropy(), sockets_dir=folder)
    address = NodeAddress.parse(server.target, key_path=str(server.key), host_key=server.fingerprint())
    connection = await fabric.connect(address)
    try:
        yield connection
    finally:
        await connection.aclose()


def small_package(
    folder: Path, *, version: str = "0.0.1", told_version: str | None = None, needs: str = ONE_PACKAGE
) -> Path:
    """Return an arriero that needs one package alone, so that it is installed in a moment.

    `told_version` is what it says it were: a broken one.
    """
    package = folder / "arriero"
    shutil.copytree(
        wheel.PACKAGE,
        package,
        ignore=shutil.ignore_patterns("__pycache__", "*.gguf", "testing", "runtime.txt"),
    )
    file = package / "contracts" / "version.py"
    plain = file.read_text("utf-8")
    changed = re.sub("^__version__ = .*$", f'__version__ = "{version}"', plain, flags=re.MULTILINE)
    told = "" if told_version is None else f'\n__version__ = "{told_version}"\n'
    file.write_text(changed + told, "utf-8")
    whole = wheel.lock_text()
    begin = whole.index(f"\n{needs}==") + 1
    lines_of_one = []
    for line in whole[begin:].splitlines():
        lines_of_one.append(line)
        if not line.endswith("\\"):
            break
    (package / "orchestrator/machines/runtime.txt").write_text("\n".join(lines_of_one) + "\n", "utf-8")
    return package


def programs_in(folder: Path) -> list[psutil.Process]:
    """Return the processes that run a Python of an environment below a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()) and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found
