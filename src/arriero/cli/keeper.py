"""How is an agent kept running where no service manager does it?  (`arriero keep-agent`)

For machines behind SSH.  It starts the agent again when that has crashed, ends with one that was told to
end, and passes SIGTERM on.  It imports next to nothing: it lives as long as the machine runs.
"""

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from arriero.domain.keeping import Keeping
from arriero.runtime import processes
from arriero.runtime.log_files import rotate

#: The agent gives its workers 30 s; one that hangs is killed then.
END_TIMEOUT_S: Final = 45.0
LOG_BYTES_MAX: Final = 10_000_000
_STOPS: Final = (signal.SIGTERM, signal.SIGINT)


def main() -> int:
    """Keep the agent of ARRIERO_HOME running until it or we are told to end; return the exit code."""
    home = Path(os.environ["ARRIERO_HOME"])
    run = home / "run"
    run.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(run / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        _tell("keeper_not_needed")
        return 0
    record = run / "keeper.json"
    _write_record(record)
    try:
        with _woken() as signals:
            _keep(signals, home / "logs" / "agent.log")
    finally:
        record.unlink(missing_ok=True)
    return 0


def _keep(signals: "_Signals", log: Path) -> None:
    keeping = Keeping()
    while not signals.is_stopped():
        # One that lives looks after its log by itself; one that ends at once each time does not come to it.
        rotate(log, LOG_BYTES_MAX)
        started_s = time.monotonic()
        agent = subprocess.Popen([sys.executable, "-m", "arriero", "agent"], stdin=subprocess.DEVNULL)
        while agent.poll() is None and not signals.is_stopped():
            signals.wait(None)
        if signals.is_stopped():
            _end(agent, signals)
            return
        lived_s = time.monotonic() - started_s
        code, name = processes.exit_code_of(agent.returncode)
        if code == 0:
            _tell("keeper_ended", exit_code=code)
            return
        keeping = keeping.ended(lived_s)
        _tell(
            "agent_missing",
            exit_code=code,
            signal=name,
            lived_s=round(lived_s, 1),
            again_in_s=keeping.delay_s,
        )
        until_s = time.monotonic() + keeping.delay_s
        # Whoever asks for the agent says so by SIGHUP: then it need not wait.
        while not signals.is_stopped() and (left_s := until_s - time.monotonic()) > 0:
            if signals.wait(left_s):
                break


def _end(agent: "subprocess.Popen[bytes]", signals: "_Signals") -> None:
    if agent.poll() is None:
        agent.terminate()
    until_s = time.monotonic() + END_TIMEOUT_S
    while agent.poll() is None and (left_s := until_s - time.monotonic()) > 0:
        signals.wait(left_s)
    if agent.poll() is None:
        agent.kill()
        agent.wait(processes.KILLED_WAIT_S)
    _tell("keeper_ended", exit_code=processes.exit_code_of(agent.returncode)[0])


class _Signals:
    """Signals as something to wait for: none is missed between a look and a wait."""

    def __init__(self, reader: int) -> None:
        self._is_stopped = False
        self._reader = reader

    def is_stopped(self) -> bool:
        """Return whether one came that stops us."""
        return self._is_stopped

    def wait(self, timeout_s: float | None) -> bool:
        """Wait for the next signal, also that of a child that ended; return whether it was SIGHUP."""
        ready, _, _ = select.select([self._reader], [], [], timeout_s)
        numbers = os.read(self._reader, 4096) if ready else b""
        self._is_stopped = self._is_stopped or any(number in _STOPS for number in numbers)
        return signal.SIGHUP in numbers


@contextlib.contextmanager
def _woken() -> Iterator[_Signals]:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # A handler of Python's own, so that the signal is written to the pipe and does nothing else.
    for number in (*_STOPS, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield _Signals(reader)
    finally:
        signal.set_wakeup_fd(-1)
        os.close(reader)
        os.close(writer)


def _write_record(path: Path) -> None:
    me = processes.identity(os.getpid())
    assert me is not None, "this process lives"
    record = {"pid": me.pid, "pid_start_ticks": me.start_ticks, "boot_id": me.boot_id}
    temporary = path.with_name(f".{path.name}.{me.pid}")
    temporary.write_text(json.dumps(record))
    temporary.chmod(0o600)
    temporary.replace(path)


def _tell(event: str, **facts: Any) -> None:
    # Past Python's buffer, which would try again at the end; a full disk must not end who keeps an agent.
    line = json.dumps({"event": event, "role": "keeper", **facts}) + "\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode())
