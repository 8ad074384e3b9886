"""How does everything of one state folder end, whatever has died before?

Orchestrator and agent end by SIGTERM (the agent stops its workers itself); workers whose agent is
gone are ended here, with what is left of their process groups; then their sockets and stale run
files go.  Processes are known by pid, start time and boot, so that a reused pid is never touched.
"""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from arriero.contracts.records import WorkerRunRecord
from arriero.runtime import processes, state_dir
from arriero.runtime.processes import Identity
from arriero.runtime.state_dir import StateDir, run_identity, worker_identity

#: What an agent needs besides its workers' own grace.
_AGENT_MARGIN_S: Final = 10.0
_Job: TypeAlias = tuple[str, Identity, float, str | None]
ROLES: Final = ("orchestrator", "agent")


class Stopped(msgspec.Struct, frozen=True, kw_only=True):
    """One process that was ended."""

    #: orchestrator, agent, worker, or leftover (a process a dead worker left behind).
    kind: str
    pid: int
    worker_id: str | None = None
    #: Whether it had to be killed.
    was_killed: bool = False


class Report(msgspec.Struct, kw_only=True):
    """What `down` did."""

    stopped: list[Stopped] = []
    #: Names of run files and socket folders that dead processes had left.
    removed: list[str] = []
    #: Processes that live on, which should never be.
    remaining: list[Stopped] = []


def down(
    state: StateDir, *, grace_s: float, tell: Callable[[str], None], roles: Collection[str] = ROLES
) -> Report:
    """End all processes of a state folder within about `grace_s` plus 10 s, and remove what is stale.

    Nothing happens where nothing runs; safe to call twice, and while daemons are half-way up.  Without
    `agent` among the `roles` workers are left alone too.
    """
    report = Report()
    lock = threading.Lock()

    def end(kind: str, known: Identity, limit_s: float, worker_id: str | None = None) -> None:
        in_time = processes.end(known, grace_s=limit_s)
        done = Stopped(kind=kind, pid=known.pid, worker_id=worker_id, was_killed=not in_time)
        with lock:
            (report.remaining if processes.is_alive(known) else report.stopped).append(done)
        name = f"{kind} {worker_id}" if worker_id else kind
        tell(f"{name} (pid {known.pid}) {'ended' if in_time else 'killed: it did not end in time'}")

    has_workers = "agent" in roles
    runs = state.worker_runs() if has_workers else []
    daemons = {role: found for role in roles if (found := _daemon(state, role)) is not None}
    agent_limit_s = grace_s + _AGENT_MARGIN_S
    # An agent that lives stops its workers itself, and better: it drains them and records how they ended.
    first: list[_Job] = [(role, known, agent_limit_s, None) for role, known in daemons.items()]
    if "agent" not in daemons:
        first += _living(runs, grace_s)
    with_agent = _living(runs, grace_s) if "agent" in daemons else []
    _in_parallel(end, first)
    for kind, known, _, worker_id in with_agent:
        if not processes.is_alive(known):
            report.stopped.append(Stopped(kind=kind, pid=known.pid, worker_id=worker_id))
            tell(f"{kind} {worker_id} (pid {known.pid}) ended by its agent")
    # Looked at again: the agent may have started one meanwhile, or died on its way.
    known_runs = (
        list({run.record.worker_id: run for run in [*runs, *state.worker_runs()]}.values())
        if has_workers
        else []
    )
    _in_parallel(end, _living(known_runs, grace_s))
    for run in known_runs:
        for left in leftovers(run):
            processes.signal_process(left, signal.SIGKILL)
            processes.wait_gone(left, processes.KILLED_WAIT_S)
            report.stopped.append(
                Stopped(kind="leftover", pid=left.pid, worker_id=run.record.worker_id, was_killed=True)
            )
    report.removed += _remove_stale(state, known_runs)
    return report


def _living(runs: list[WorkerRunRecord], grace_s: float) -> list[_Job]:
    return [
        ("worker", worker_identity(run), grace_s, run.record.worker_id)
        for run in runs
        if processes.is_alive(worker_identity(run))
    ]


def _daemon(state: StateDir, role: str) -> Identity | None:
    """Return the daemon of a role: by its run file, or by its lock while it has not written one."""
    record = state.recorded(role)
    if record is not None and processes.is_alive(run_identity(record)):
        return run_identity(record)
    holder = _lock_holder(state.run / f"{role}.lock")
    return None if holder is None else processes.identity(holder)


def _lock_holder(path: Path) -> int | None:
    """Return the process that holds a lock file, as the kernel tells it; None where none does."""
    try:
        status = path.stat()
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in lines:
        fields = line.split()
        if len(fields) >= 6 and fields[1] == "FLOCK" and fields[5] == wanted and fields[4].isdigit():
            pid = int(fields[4])
            return pid if pid > 0 and pid != os.getpid() else None
    return None


def leftovers(run: WorkerRunRecord) -> list[Identity]:
    """Return what lives on of a dead worker's process group: nothing, unless it was killed badly."""
    leader = worker_identity(run)
    if leader.boot_id != processes.boot_id() or processes.start_ticks(leader.pid) is not None:
        return []
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = path.read_bytes().rpartition(b")")[2].split()
            pid = int(path.parent.name)
            in_group = int(fields[2]) == leader.pid and fields[0] not in (b"Z", b"X")
            # The group's number may be another program's by now: only later starts of our own count.
            if in_group and int(fields[19]) >= leader.start_ticks and _is_ours(pid):
                found.append(Identity(pid, int(fields[19]), leader.boot_id))
    return found


def _is_ours(pid: int) -> bool:
    return b"arriero" in Path(f"/proc/{pid}/cmdline").read_bytes()


def _in_parallel(
    end: Callable[[str, Identity, float, str | None], None],
    jobs: list[_Job],
) -> None:
    threads = [threading.Thread(target=end, args=job, name=f"end-{job[0]}-{job[1].pid}") for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _remove_stale(state: StateDir, runs: list[WorkerRunRecord]) -> list[str]:
    """Remove what the dead have left; return its names."""
    removed = []
    for role in ROLES:
        record = state.recorded(role)
        path = state.run_file(role)
        if path.exists() and (record is None or not processes.is_alive(run_identity(record))):
            path.unlink(missing_ok=True)
            removed.append(path.name)
    sockets = state_dir.orchestrator_dir(state.home)
    if sockets.is_dir() and state.running("orchestrator") is None:
        shutil.rmtree(sockets, ignore_errors=True)
        removed.append(sockets.name)
    alive = {run.record.worker_id for run in runs if processes.is_alive(worker_identity(run))}
    worker_ids = {run.record.worker_id for run in runs} | {path.stem for path in state.worker_files()}
    for worker_id in sorted(worker_ids - alive):
        path = state.worker_file(worker_id)
        if path.exists():
            path.unlink(missing_ok=True)
            removed.append(path.name)
        folder = state_dir.socket_dir(worker_id)
        if folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
    if not any(state.running(role) for role in ROLES):
        # Written by somebody who was killed before the file was whole.
        for half in [*state.run.glob(".*.json.*"), *state.workers.glob(".*.json.*")]:
            half.unlink(missing_ok=True)
            removed.append(half.name)
    return removed
