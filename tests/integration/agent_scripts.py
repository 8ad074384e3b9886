"""What the tests of an agent with scripted workers share."""

import json
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arriero.contracts.records import WorkerRecord, WorkerRunRecord
from arriero.runtime import state_dir
from arriero.runtime.processes import Identity, is_alive
from arriero.runtime.state_dir import socket_dir, worker_identity
from arriero.testing.agents import AgentProcess
from arriero.testing.gguf_writer import write_llama

WORKER = f"{sys.executable} {Path(__file__).parent / 'scripted_worker.py'}"
#: Settings that let faults show soon; limits that a loaded machine must keep stay generous.
QUICK = {"worker_command": WORKER, "health_interval_s": "0.2", "stop_grace_s": "1"}

Script = Callable[..., str]


def scripted(folder: Path, **script: Any) -> str:
    """Return the reference of a new model whose workers follow `script`."""
    path = write_llama(folder / f"model-{len(list(folder.glob('*.gguf')))}.gguf")
    path.with_name(path.name + ".json").write_text(json.dumps(script))
    return path.as_uri()


def token_of(agent: AgentProcess, worker_id: str) -> str:
    """Return a worker's token from its run record."""
    found = state_dir.read(agent.state.worker_file(worker_id), WorkerRunRecord)
    assert found is not None
    return found.token


def identity_of(agent: AgentProcess, worker_id: str) -> Identity:
    """Return a worker's process from its run record."""
    found = state_dir.read(agent.state.worker_file(worker_id), WorkerRunRecord)
    assert found is not None
    return worker_identity(found)


def tell(record: WorkerRecord, token: str, path: str, method: str = "POST") -> Any:
    """Call a worker itself."""
    request = urllib.request.Request(
        record.url + path,
        method=method,
        headers={"Authorization": f"Bearer {token}"},
        data=b"" if method == "POST" else None,
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        return json.loads(answer.read())


def has_left_nothing(agent: AgentProcess, record: WorkerRecord, identity: Identity) -> bool:
    """Return whether nothing of a worker is left but its log."""
    return not (
        is_alive(identity)
        or agent.state.worker_file(record.worker_id).exists()
        or socket_dir(record.worker_id).exists()
    )
