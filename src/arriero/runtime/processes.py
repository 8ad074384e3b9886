"""Which process is that, does it still live, and how is it ended with all it started?

A pid alone proves nothing: it is used again.  A process is known by pid, start time and boot id.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import subprocess

KILLED_WAIT_S: Final = 10.0
# A variable, since a type checker takes the comparison itself for settled.
_HAS_PROC: Final[bool] = Path("/proc/self/stat").exists()


@dataclass(frozen=True, slots=True)
class Identity:
    """One process of one boot."""

    pid: int
    #: Start time in clock ticks since boot (Linux) or hundredths of a second since 1970 (elsewhere).
    start_ticks: int
    boot_id: str


def boot_id() -> str:
    """Return what is different after each boot of the machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        import psutil

        return str(int(psutil.boot_time()))


def machine_id() -> str:
    """Return what programs have in common that share a machine's memory, in containers too; not secret."""
    import hashlib

    # All of one kernel know the same boot; elsewhere its second, which another machine may share.
    whose = boot_id() if _HAS_PROC else f"{boot_id()} {os.uname().nodename}"
    return hashlib.sha256(f"arriero machine {whose}".encode()).hexdigest()[:16]


def start_ticks(pid: int) -> int | None:
    """Return when `pid` started; None if there is no such process, or it is a zombie."""
    if _HAS_PROC:
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        # The name in parentheses may hold anything: fields begin after the last one.
        fields = stat.rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else int(process.create_time() * 100)
    except psutil.Error:
        return None


def identity(pid: int) -> Identity | None:
    """Return who `pid` is now; None if it does not live."""
    ticks = start_ticks(pid)
    return None if ticks is None else Identity(pid, ticks, boot_id())


def is_alive(known: Identity) -> bool:
    """Return whether that very process still lives."""
    return known.pid > 0 and known.boot_id == boot_id() and start_ticks(known.pid) == known.start_ticks


def signal_group(pid: int, number: int) -> None:
    """Send a signal to the process group that `pid` leads; nothing if it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def signal_process(known: Identity, number: int) -> bool:
    """Send a signal to that very process; False if it does not live."""
    if not is_alive(known):
        return False
    try:
        os.kill(known.pid, number)
    except ProcessLookupError:
        return False
    return True


def wait_gone(known: Identity, timeout_s: float) -> bool:
    """Wait, blocking, until the process has ended; False if it lives on after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    if hasattr(os, "pidfd_open"):
        try:
            fd = os.pidfd_open(known.pid)
        except OSError:
            return not is_alive(known)
        try:
            if is_alive(known):
                select.select([fd], [], [], max(0.0, timeout_s))
        finally:
            os.close(fd)
        return not is_alive(known)
    while is_alive(known):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def end(known: Identity, *, grace_s: float, is_leader: bool = True) -> bool:
    """End a process, blocking: SIGTERM, wait `grace_s`, then SIGKILL for its whole group.

    Returns whether it ended within the grace time.
    """
    has_ended = True
    if signal_process(known, signal.SIGTERM):
        has_ended = wait_gone(known, grace_s)
    if not has_ended:
        if is_leader:
            signal_group(known.pid, signal.SIGKILL)
        else:
            signal_process(known, signal.SIGKILL)
        wait_gone(known, KILLED_WAIT_S)
    return has_ended


def spawn_detached(
    argv: Sequence[str], *, log_path: Path, env: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start a program that outlives us: its own session, output appended to `log_path` (0600)."""
    # Few commands start anything, and all of them import this module.
    import subprocess

    log_path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=fd,
            stderr=fd,
            start_new_session=True,
            close_fds=True,
            env=None if env is None else dict(env),
            cwd="/",
        )
    finally:
        os.close(fd)


def tail(path: Path, lines: int, *, bytes_max: int = 65_536) -> list[str]:
    """Return the last lines of a text file; [] if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - bytes_max))
            return file.read().decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        return []


def exit_code_of(returncode: int) -> tuple[int, str | None]:
    """Return what a shell would say of a subprocess's return code, and the signal's name if one killed it."""
    if returncode >= 0:
        return returncode, None
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    return 128 - returncode, name
