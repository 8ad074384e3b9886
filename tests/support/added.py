"""Machines of `arriero.testing.hosts` that a pool has added by the command, and what runs on them."""

import contextlib
import subprocess
from collections.abc import Iterable

import psutil

from arriero.contracts.records import NodeRecord
from arriero.contracts.states import NodeState
from arriero.testing.hosts import Host
from arriero.testing.pool import Pool

#: Installations at once, all packages carried: half a minute each where nothing else runs.
ADDED_LIMIT_S = 300.0


def prepare(host: Host) -> None:
    """Let a machine's engine be content with one thread: a core or two have to do for all of them."""
    host.home.joinpath(".config/arriero").mkdir(parents=True)
    host.home.joinpath(".config/arriero/config.toml").write_text("engine_threads = 1\n")


def begin_adding(pool: Pool, host: Host, *more: str) -> subprocess.Popen[str]:
    """Start the command that adds a machine under its own name."""
    given = ("--ssh", host.target, "--key", str(host.key), "--accept-host-key", host.fingerprint())
    return pool.begin("nodes", "add", host.name, *given, *more)


def add(pool: Pool, hosts: Iterable[Host]) -> None:
    """Have machines become part of a pool, all at the same time."""
    for host, adding in [(host, begin_adding(pool, host)) for host in hosts]:
        said, errors = adding.communicate(timeout=ADDED_LIMIT_S)
        assert adding.returncode == 0, f"{host.name}: {said} {errors}"


def node(pool: Pool, name: str) -> NodeRecord:
    """Return what the pool knows of a machine."""
    return next(record for record in pool.orchestrator.nodes() if record.name == name)


def status(pool: Pool, name: str) -> NodeState:
    """Return what a machine's state is for the pool."""
    return node(pool, name).status


def command_of(process: psutil.Process) -> str:
    """Return a process's arguments; nothing if it is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def worker_pids(host: Host) -> list[int]:
    """Return the processes of a machine's workers and engines."""
    return sorted(process.pid for process in host.processes() if "worker" in command_of(process))


def agents(host: Host) -> list[psutil.Process]:
    """Return a machine's agents: one, but for a moment when it is replaced."""
    return [process for process in host.processes() if command_of(process).endswith("arriero agent")]
