"""How do orchestrator and agent come up in the background, and what if one does not?"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from arriero.client.api import Agent, Orchestrator
from arriero.client.connection import Limits
from arriero.contracts.errors import KINDS, ArrieroError, ErrorBody, ErrorCode, from_body
from arriero.contracts.records import RunRecord
from arriero.contracts.states import NodeState
from arriero.runtime import processes
from arriero.runtime.state_dir import StateDir, run_identity

START_TIMEOUT_S: Final = 60.0
STOP_AT_FAILURE_S: Final = 5.0
_POLL_S: Final = 0.02
_LOOK_TIMEOUT_S: Final = 2.0
_LOG_LINES: Final = 10
#: Another start in the same folder is waited for so long.
_TURN_TIMEOUT_S: Final = 90.0

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """One daemon to start: its role, its flags, and what its environment has besides ours."""

    role: str
    flags: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    #: Take any free port where the configured one is taken.
    any_port: bool = False


@dataclass(frozen=True, slots=True)
class Started:
    """A daemon that answers."""

    role: str
    record: RunRecord
    #: False: somebody else had started it.
    is_ours: bool


class Launch:
    """Daemons being started; `wait` returns them when all answer, and leaves none behind otherwise."""

    def __init__(self, state: StateDir, *, tell: Tell, log_to_stderr: bool = False) -> None:
        self._state = state
        self._tell = tell
        self._log_to_stderr = log_to_stderr
        self._running: dict[str, tuple[Plan, subprocess.Popen[bytes], int]] = {}

    def begin(self, plan: Plan) -> None:
        """Start one daemon as a process that outlives us."""
        log = self._state.log_file(plan.role)
        offset = log.stat().st_size if log.exists() else 0
        argv = [sys.executable, "-m", "arriero", plan.role, *plan.flags]
        # Bytecode paths and the like come from our own environment; a URL of another pool must not.
        env = {
            name: value
            for name, value in os.environ.items()
            if name not in ("ARRIERO_URL", "ARRIERO_API_KEY")
        }
        env |= {"ARRIERO_HOME": str(self._state.home), **plan.env}
        if self._log_to_stderr:
            process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, env=env, start_new_session=True)
        else:
            process = processes.spawn_detached(argv, log_path=log, env=env)
        self._running[plan.role] = (plan, process, offset)

    def wait(self, timeout_s: float) -> dict[str, Started]:
        """Wait until all that were begun answer, and the orchestrator knows this machine's agent.

        Raises the error a daemon ended with (DAEMON_START_FAILED if it said none, or does not answer
        within `timeout_s`); then, and on any interruption, nothing that was begun is left running.
        """
        deadline = time.monotonic() + timeout_s
        answering: dict[str, Started] = {}
        try:
            while waiting := [role for role in self._running if role not in answering]:
                for role in waiting:
                    found = self._look(role)
                    if found is not None:
                        answering[role] = found
                if time.monotonic() > deadline:
                    role = waiting[0]
                    raise self._too_late(role, f"does not answer after {timeout_s:g} s")
                time.sleep(_POLL_S)
            while not _has_joined(self._state):
                if time.monotonic() > deadline:
                    raise self._too_late("orchestrator", f"did not reach the agent within {timeout_s:g} s")
                time.sleep(_POLL_S)
        except BaseException:
            self.end()
            raise
        return answering

    def end(self) -> None:
        """End all that were begun; safe to call twice."""
        for _, process, _ in self._running.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + STOP_AT_FAILURE_S
        for _, process, _ in self._running.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                processes.signal_group(process.pid, 9)
                process.wait(processes.KILLED_WAIT_S)

    def children(self) -> dict[str, subprocess.Popen[bytes]]:
        """Return the processes by role."""
        return {role: process for role, (_, process, _) in self._running.items()}

    def _look(self, role: str) -> Started | None:
        """Return the daemon if it answers, None if not yet."""
        plan, process, offset = self._running[role]
        code = process.poll()
        record = self._state.running(role)
        if code is None:
            if record is not None and record.pid == process.pid and answers(role, record):
                return Started(role, record, is_ours=True)
            return None
        error = _error_in(self._state.log_file(role), offset)
        if error is None:
            raise self._died(role, code)
        if error.code is ErrorCode.ALREADY_RUNNING:
            # Somebody else was quicker: theirs is as good, once it answers.
            if record is not None and answers(role, record):
                return Started(role, record, is_ours=False)
            return None
        if error.code is ErrorCode.PORT_IN_USE and plan.any_port:
            self._tell(f"{error.message}: the {role} takes a free one")
            flags = [*plan.flags, "--port", "0"]
            self.begin(Plan(plan.role, flags, plan.env))
            return None
        raise error

    def _too_late(self, role: str, what: str) -> ArrieroError:
        tail = processes.tail(self._state.log_file(role), _LOG_LINES)
        return ArrieroError(ErrorCode.DAEMON_START_FAILED, f"the {role} {what}", role=role, log_tail=tail)

    def _died(self, role: str, returncode: int) -> ArrieroError:
        code, signal_name = processes.exit_code_of(returncode)
        how = f"was ended by {signal_name}" if signal_name else f"ended with exit code {code}"
        return ArrieroError(
            ErrorCode.DAEMON_START_FAILED,
            f"the {role} {how} before it answered",
            role=role,
            exit_code=code,
            log_tail=processes.tail(self._state.log_file(role), _LOG_LINES),
        )


@contextlib.contextmanager
def turn(state: StateDir) -> Iterator[None]:
    """Hold the right to start daemons in a state folder; commands at the same time wait for each other.

    Raises DAEMON_START_FAILED if another holds it for more than 90 s.
    """
    deadline = time.monotonic() + _TURN_TIMEOUT_S
    fd = os.open(state.run / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ArrieroError(
                        ErrorCode.DAEMON_START_FAILED,
                        f"another command has been starting daemons here for {_TURN_TIMEOUT_S:g} s",
                    ) from error
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)


def answers(role: str, record: RunRecord, *, timeout_s: float = _LOOK_TIMEOUT_S) -> bool:
    """Return whether a daemon answers its health route."""
    limits = Limits(connect_s=timeout_s, total_s=timeout_s)
    kind = Agent if role == "agent" else Orchestrator
    try:
        kind(record.url, record.token, limits=limits).health()
    except ArrieroError:
        return False
    return True


def _has_joined(state: StateDir) -> bool:
    """Return whether the orchestrator has a connection to the agent; True where not both run.

    Raises VERSION_MISMATCH if they do not fit.
    """
    orchestrator, agent = state.running("orchestrator"), state.running("agent")
    if orchestrator is None or agent is None:
        return True
    limits = Limits(connect_s=_LOOK_TIMEOUT_S, total_s=_LOOK_TIMEOUT_S)
    try:
        nodes = Orchestrator(orchestrator.url, orchestrator.token, limits=limits).nodes()
    except ArrieroError:
        return False
    # By whatever name: a machine that was added may have that of the agent here.
    here = [node for node in nodes if not node.is_remote]
    for node in here:
        if node.error is not None and node.error.code == ErrorCode.VERSION_MISMATCH:
            raise from_body(node.error)
    # An orchestrator that lives on still shows the node of the agent before this one.
    return any(
        node.status in (NodeState.READY, NodeState.DRAINING) and node.last_connected_unix >= agent.started
        for node in here
    )


def with_us() -> list[str]:
    """Return the flags of a daemon that must not outlive this command, even when it is killed."""
    return ["--with-pid", f"{os.getpid()}:{processes.start_ticks(os.getpid())}"]


def ended(state: StateDir, started: Started) -> bool:
    """Return whether a daemon that answered has ended since."""
    return not processes.is_alive(run_identity(started.record))


def _error_in(log: Path, offset: int) -> ArrieroError | None:
    """Return the error that a daemon's last words in its log tell; None if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            lines = file.read(1_000_000).splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError, msgspec.ValidationError):
            content: Any = json.loads(line)
            if isinstance(content, dict) and "error" in content and content.get("event") == "ended":
                return from_body(msgspec.convert(content["error"], ErrorBody))
        # Or in words, as a daemon's own main tells it: `CODE: message. What to do.`
        code, separator, message = line.decode("utf-8", "replace").partition(": ")
        if separator and code in ErrorCode.__members__:
            found = ErrorCode[code]
            return ArrieroError(found, message.removesuffix(KINDS[found].what_to_do).rstrip(". "))
    return None
