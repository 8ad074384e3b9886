"""A machine behind a real sshd that belongs to a pool already: an agent of the fake engine, in a moment."""

import asyncio
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arriero.contracts.states import NodeState
from arriero.orchestrator.store import open_database
from arriero.orchestrator.store.nodes import NodeEntry, NodeStore
from arriero.runtime.entropy import SystemEntropy
from arriero.testing.agents import AgentProcess
from arriero.testing.pool import Pool, eventually
from arriero.testing.sshd import SshServer

FAKE = {"engine": "fake", "stop_grace_s": "2"}


@contextmanager
def other_agent() -> Iterator[AgentProcess]:
    """Run the agent of the other machine."""
    with tempfile.TemporaryDirectory(prefix="arr-") as folder:
        # As an installation would leave it: what has no such file is not ours to end.
        Path(folder, "installed-by-arriero.json").write_text('{"made": []}')
        settings = {**FAKE, "node_timeout_s": "0.4", "node_name": "there"}
        with AgentProcess(Path(folder) / "home", settings) as running:
            yield running


@contextmanager
def pool_with(there: AgentProcess, server: SshServer) -> Iterator[Pool]:
    """Have a pool to which that machine belongs; nothing runs here yet."""
    with Pool({**FAKE, "node_name": "here"}) as made:
        made.state.prepare()
        entry = NodeEntry(
            name="there",
            ssh=server.target,
            key_path=str(server.key),
            host_key=server.fingerprint(),
            install_path=str(there.home.parent),
            capabilities=there.client.capabilities(),
        )
        asyncio.run(_register(made, entry))
        yield made


async def _register(pool: Pool, entry: NodeEntry) -> None:
    database = await open_database(pool.state.orchestrator_db)
    try:
        await (await NodeStore.open(database, SystemEntropy())).save(entry)
    finally:
        await database.close()


@contextmanager
def orchestrator(pool: Pool, *flags: str) -> Iterator[subprocess.Popen[str]]:
    """Run an orchestrator that has reached the other machine."""
    daemon = pool.begin("orchestrator", *flags)
    try:
        eventually("the other machine is there", lambda: status(pool) is NodeState.READY)
        yield daemon
    finally:
        daemon.kill()
        daemon.communicate()


def status(pool: Pool) -> NodeState | None:
    """Return what the other machine's state is for the pool."""
    if pool.state.running("orchestrator") is None:
        return None
    return {node.name: node.status for node in pool.orchestrator.nodes()}.get("there")
