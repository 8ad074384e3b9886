"""A thousand nodes on one machine: how does real orchestrator code get simulated agents to hold?

    with Herd(folder, nodes=1000) as herd:
        herd.entries()  # for the orchestrator's `NodeStore`
        HerdFabric(folder, entropy)  # in the place of SSH: each name leads to its agent
        herd.drop()

The agents live in one process beside (`testing.herd_agents`) and speak the wire of real ones.
"""

import secrets
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from arriero.contracts.records import RunRecord
from arriero.contracts.version import __version__
from arriero.fabrics.base import INSTALL_PATH, Connection, NodeAddress, OnHeard, OnRetry
from arriero.fabrics.local import LocalFabric
from arriero.orchestrator.store.nodes import NodeEntry
from arriero.runtime import processes, state_dir
from arriero.runtime.entropy import Entropy
from arriero.testing.herd_agents import Agent, Count, Order

END_TIMEOUT_S: Final = 60.0


class Herd:
    """`nodes` agents with `workers_each` workers; what it writes lies in `folder`."""

    def __init__(self, folder: Path, *, nodes: int = 1000, workers_each: int = 5) -> None:
        self.folder = folder
        self.names = [f"herd-{number:04}" for number in range(nodes)]
        self.workers_each = workers_each
        self.process: subprocess.Popen[str] | None = None
        self.runs: list[RunRecord] = []

    def __enter__(self) -> Self:
        tokens = [secrets.token_hex(16) for _ in self.names]
        self.folder.mkdir(parents=True, exist_ok=True)
        named = self.folder / "agents.json"
        named.write_bytes(msgspec.json.encode(list(zip(self.names, tokens, strict=True))))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "arriero.testing.herd_agents", str(named), str(self.workers_each)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        port = int(self.process.stdout.readline())
        known = processes.identity(self.process.pid)
        assert known is not None
        for name, token in zip(self.names, tokens, strict=True):
            run = RunRecord(
                pid=known.pid,
                url=f"http://127.0.0.1:{port}",
                version=__version__,
                started=0.0,
                token=token,
                pid_start_ticks=known.start_ticks,
                boot_id=known.boot_id,
            )
            self.runs.append(run)
            path = self.folder / name / INSTALL_PATH / "home/run/agent.json"
            path.parent.mkdir(parents=True)
            state_dir.write(path, run)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def entries(self) -> list[NodeEntry]:
        """Return what an orchestrator keeps of these machines once they were added."""
        return [
            NodeEntry(
                name=name,
                ssh=f"herd@{name}",
                install_path=INSTALL_PATH,
                capabilities=Agent(number, name, self.workers_each).capabilities,
            )
            for number, name in enumerate(self.names)
        ]

    def count(self) -> Count:
        """Return how many streams are held, and how many beats were sent so far."""
        return self._order("count")

    def drop(self) -> Count:
        """End all connections at once."""
        return self._order("drop")

    def silence(self, count: int) -> Count:
        """Let the first `count` agents say nothing more; their connections stay."""
        return self._order("silence", count)

    def speak(self) -> Count:
        """Let all agents speak again."""
        return self._order("speak")

    def _order(self, order: str, count: int = 0) -> Count:
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(Order(order=order, count=count)).decode() + "\n")
        self.process.stdin.flush()
        return msgspec.json.decode(self.process.stdout.readline(), type=Count)


class HerdFabric:
    """The machines of a herd's `folder`, by their names: all are this one, each with a home of its own."""

    def __init__(self, folder: Path, entropy: Entropy) -> None:
        self._folder = folder
        self._entropy = entropy

    async def connect(
        self, address: NodeAddress, on_retry: OnRetry | None = None, on_heard: OnHeard | None = None
    ) -> Connection:
        """Return a connection to a machine."""
        return await LocalFabric(self._entropy, home=self._folder / address.host).connect(address, on_retry)
