"""The real orchestrator with a herd's nodes: `python -m arriero.testing.herd_orchestrator FOLDER`.

Its settings come from the environment, as always; what the herd has for it to know is put into its
database first.  See `testing.herd`.
"""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from arriero.client.api import Orchestrator
from arriero.contracts.records import RunRecord
from arriero.contracts.states import NodeState
from arriero.orchestrator import app
from arriero.orchestrator.store import open_database
from arriero.orchestrator.store.nodes import NodeEntry, NodeStore
from arriero.runtime import settings
from arriero.runtime.entropy import SystemEntropy
from arriero.runtime.state_dir import StateDir
from arriero.testing.agents import wait_for
from arriero.testing.herd import Herd, HerdFabric

START_TIMEOUT_S: Final = 60.0
END_TIMEOUT_S: Final = 30.0


class HerdOrchestrator:
    """An orchestrator's process whose registered machines are a herd; its state lies in `home`."""

    def __init__(self, herd: Herd, home: Path) -> None:
        self._herd = herd
        self._state = StateDir(home)
        self.process: subprocess.Popen[bytes] | None = None
        self.run: RunRecord | None = None

    def __enter__(self) -> Self:
        self._state.prepare()
        asyncio.run(_register(self._state, self._herd.entries()))
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def client(self) -> Orchestrator:
        """A client of it."""
        assert self.run is not None
        return Orchestrator(self.run.url)

    def start(self) -> None:
        """Start it and wait until it answers."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ARRIERO_")}
        own = {"ARRIERO_HOME": str(self._state.home), "ARRIERO_ORCHESTRATOR_PORT": "0"}
        with self._state.log_file("orchestrator").open("ab") as log:
            self.process = process = subprocess.Popen(
                [sys.executable, "-m", "arriero.testing.herd_orchestrator", str(self._herd.folder)],
                env={**kept, **own}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

        def answers() -> RunRecord | None:
            assert process.poll() is None, self.log[-3000:]
            run = self._state.running("orchestrator")
            return run if run is not None and run.pid == process.pid else None

        self.run = wait_for(answers, "the orchestrator answers", limit_s=START_TIMEOUT_S)

    def end(self) -> None:
        """End it and wait for it.  Safe to call twice."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._state.log_file("orchestrator").read_text("utf-8", "replace")

    def settled_s(self, *, since_s: float, limit_s: float) -> float:
        """Wait until all nodes are held and ready; return how long after `since_s` (monotonic) that was."""
        nodes = len(self._herd.names)
        wait_for(lambda: self._herd.count().streams == nodes, "all agents are held", limit_s=limit_s)
        wait_for(lambda: len(self.ready()) == nodes, "all nodes are ready", limit_s=limit_s)
        return time.monotonic() - since_s

    def ready(self) -> set[str]:
        """Return the names of the nodes that take work."""
        return {node.name for node in self.client.nodes() if node.status is NodeState.READY}


async def _register(state: StateDir, entries: list[NodeEntry]) -> None:
    database = await open_database(state.orchestrator_db)
    try:
        store = await NodeStore.open(database, SystemEntropy())
        for entry in entries:
            await store.save(entry)
    finally:
        await database.close()


if __name__ == "__main__":
    sys.exit(app.main(settings.load(), fabric=HerdFabric(Path(sys.argv[1]), SystemEntropy())))
