"""What does an agent know of one worker besides its record?"""

import asyncio
import hashlib
import hmac
import signal
from dataclasses import dataclass, field
from pathlib import Path

from arriero.agent.child import Child
from arriero.agent.oom import OomWitness
from arriero.contracts.records import WorkerExit, WorkerRecord, WorkerRunRecord
from arriero.contracts.states import WorkerState
from arriero.runtime import processes
from arriero.runtime.processes import Identity


@dataclass(slots=True, eq=False)
class Held:
    """One worker as its agent holds it, from the spawn (or the adoption) until it is forgotten."""

    run: WorkerRunRecord
    child: Child
    run_dir: Path
    oom: OomWitness
    called_back: asyncio.Event = field(default_factory=asyncio.Event)
    #: The process is gone and everything of it is cleaned up.
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    ended_at_s: float = 0.0
    #: Why it was asked to stop; None: it was not.
    stop_reason: str | None = None
    #: Why we killed it because it failed.
    verdict: WorkerExit | None = None
    #: Since when it has no work; None: it has, or is not loaded.
    idle_since_s: float | None = None
    #: When it said itself that it has failed; its process should be gone soon after.
    failed_at_s: float | None = None
    #: The process that computes for it, as it last told.
    engine: Identity | None = None
    #: Waits for its end and watches it meanwhile.
    task: asyncio.Task[None] | None = None

    def note_engine(self, pid: int | None) -> None:
        """Remember the engine's process, so that it can be ended after its worker."""
        if pid is None or self.engine is None or self.engine.pid != pid:
            self.engine = None if pid is None else processes.identity(pid)

    def kill_engine(self) -> None:
        """Kill the engine's process if its worker left it behind.

        Where the kernel tells an engine of its worker's death nothing is left to do here.
        """
        if self.engine is not None and processes.is_alive(self.engine):
            processes.signal_process(self.engine, signal.SIGKILL)

    @property
    def worker_id(self) -> str:
        """Its id."""
        return self.run.record.worker_id

    @property
    def token(self) -> str:
        """What every request to it must carry."""
        return self.run.token

    @property
    def log_path(self) -> Path:
        """Where its output goes."""
        return Path(self.run.log_path)


def callback_token(worker_token: str) -> str:
    """Return the token of a worker's ready callback.

    Made from the worker's own, so that the next agent accepts the callback of a worker that was
    started by the one before.
    """
    return hmac.new(worker_token.encode(), b"ready callback", hashlib.sha256).hexdigest()


def slots_free(state: WorkerState, *, total: int, busy: int) -> int:
    """Return how many requests a worker would begin at once."""
    return max(0, total - busy) if state in (WorkerState.IDLE, WorkerState.BUSY) else 0


def with_url(record: WorkerRecord, url: str) -> dict[str, object]:
    """Return the changes that a ready callback brings: its address, and `loading` after `starting`."""
    changes: dict[str, object] = {"url": url}
    if record.state is WorkerState.STARTING:
        changes["state"] = WorkerState.LOADING
    return changes
