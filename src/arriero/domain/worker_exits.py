"""What does a worker's end mean: was it stopped, did it fail, and why?"""

from dataclasses import dataclass

from arriero.contracts.errors import ErrorCode
from arriero.contracts.records import WorkerExit
from arriero.contracts.states import WorkerState

SIGKILL = "SIGKILL"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a process that has ended."""

    state_before: WorkerState
    #: As a shell would say it; None if nobody saw it (an adopted worker).
    exit_code: int | None
    signal: str | None
    #: Whether an agent saw it end; its exit code may be unknown all the same (an adopted worker).
    was_watched: bool = True
    #: Whether the end was asked for (stop, idle, agent's own end).
    was_asked: bool = False
    #: Why it was asked for, or that grace had run out.
    reason: str = ""
    #: Why we killed it, where we did because it failed.
    verdict: WorkerExit | None = None
    #: What it wrote down itself (exit.json), or told in its last health.
    own_words: WorkerExit | None = None
    #: The memory cgroup's oom_kill count rose over its last moments.
    has_oom_proof: bool = False
    log_tail: tuple[str, ...] = ()


def judge(evidence: Evidence) -> tuple[WorkerState, WorkerExit]:
    """Return the final state, and the exit that records show."""
    own = evidence.own_words
    if evidence.verdict is not None:
        return _failed(evidence, evidence.verdict.code, evidence.verdict.message)
    if evidence.was_asked and not evidence.has_oom_proof:
        return _stopped(evidence, evidence.reason)
    if evidence.signal == SIGKILL and evidence.has_oom_proof:
        return _failed(evidence, ErrorCode.OUT_OF_MEMORY, "the kernel killed the worker for memory")
    if own is not None and own.code is not None:
        return _failed(evidence, own.code, own.message)
    if evidence.exit_code == 0 or evidence.was_asked or own is not None:
        return _stopped(evidence, evidence.reason or (own.message if own is not None else ""))
    if not evidence.was_watched:
        return _stopped(evidence, "it ended while no agent watched it")
    if evidence.exit_code is None and evidence.state_before is WorkerState.DRAINING:
        return _stopped(evidence, "it drained and ended")
    how = _how(evidence)
    if evidence.state_before in (WorkerState.STARTING, WorkerState.LOADING):
        if evidence.exit_code == 124:
            is_starting = evidence.state_before is WorkerState.STARTING
            code = ErrorCode.WORKER_READY_TIMEOUT if is_starting else ErrorCode.LOADING_TIMEOUT
            return _failed(evidence, code, "the worker gave up waiting")
        return _failed(evidence, ErrorCode.WORKER_START_FAILED, f"{how} before it was of use")
    return _failed(evidence, ErrorCode.WORKER_LOST, how)


def _how(evidence: Evidence) -> str:
    if evidence.signal is not None:
        return f"killed by {evidence.signal}"
    if evidence.exit_code is None:
        return "ended, nobody saw its exit code"
    return f"ended with exit code {evidence.exit_code}"


def _stopped(evidence: Evidence, message: str) -> tuple[WorkerState, WorkerExit]:
    exit_code, signal = evidence.exit_code, evidence.signal
    if exit_code is None and evidence.own_words is not None:
        exit_code, signal = evidence.own_words.exit_code, evidence.own_words.signal
    return WorkerState.STOPPED, WorkerExit(exit_code=exit_code, signal=signal, message=message)


def _failed(evidence: Evidence, code: str | None, message: str) -> tuple[WorkerState, WorkerExit]:
    own = evidence.own_words
    exit_code, signal = evidence.exit_code, evidence.signal
    if own is not None and own.exit_code is not None:
        # A worker whose engine was killed tells of the engine; its own end says less.
        exit_code, signal = own.exit_code, own.signal
    # What it wrote down are its engine's last words; its log may end with something else.
    tail = (own.log_tail if own is not None else []) or list(evidence.log_tail)
    return WorkerState.FAILED, WorkerExit(
        exit_code=exit_code,
        signal=signal,
        code=str(code) if code is not None else str(ErrorCode.WORKER_LOST),
        message=message,
        log_tail=tail,
    )
