"""What a worker's end means."""

import pytest

from arriero.contracts.errors import ErrorCode
from arriero.contracts.records import WorkerExit
from arriero.contracts.states import WorkerState as S
from arriero.domain.worker_exits import Evidence, judge


def evidence(
    state: S = S.IDLE, exit_code: int | None = 0, signal: str | None = None, **more: object
) -> Evidence:
    return Evidence(state_before=state, exit_code=exit_code, signal=signal, **more)  # type: ignore[arg-type]  # Fields by name, for short tests.


OOM_WORDS = WorkerExit(
    exit_code=137, signal="SIGKILL", code="OUT_OF_MEMORY", message="engine", log_tail=["e"]
)


@pytest.mark.parametrize(
    ("seen", "state", "code"),
    [
        (evidence(), S.STOPPED, None),
        (evidence(exit_code=1, was_asked=True), S.STOPPED, None),
        (evidence(exit_code=137, signal="SIGKILL", was_asked=True), S.STOPPED, None),
        (evidence(S.STARTING, 1), S.FAILED, ErrorCode.WORKER_START_FAILED),
        (evidence(S.LOADING, 139, "SIGSEGV"), S.FAILED, ErrorCode.WORKER_START_FAILED),
        (evidence(S.STARTING, 124), S.FAILED, ErrorCode.WORKER_READY_TIMEOUT),
        (evidence(S.LOADING, 124), S.FAILED, ErrorCode.LOADING_TIMEOUT),
        (evidence(S.BUSY, 1), S.FAILED, ErrorCode.WORKER_LOST),
        (evidence(S.IDLE, 137, "SIGKILL"), S.FAILED, ErrorCode.WORKER_LOST),
        (evidence(S.IDLE, 137, "SIGKILL", has_oom_proof=True), S.FAILED, ErrorCode.OUT_OF_MEMORY),
        (evidence(S.LOADING, 137, "SIGKILL", has_oom_proof=True), S.FAILED, ErrorCode.OUT_OF_MEMORY),
        # The count rose, but this process ended otherwise: that was somebody else.
        (evidence(S.IDLE, 1, has_oom_proof=True), S.FAILED, ErrorCode.WORKER_LOST),
        (evidence(S.BUSY, 137, own_words=OOM_WORDS), S.FAILED, ErrorCode.OUT_OF_MEMORY),
        (evidence(S.DRAINING, None), S.STOPPED, None),
        (evidence(S.BUSY, None), S.FAILED, ErrorCode.WORKER_LOST),
        (evidence(S.BUSY, None, was_watched=False), S.STOPPED, None),
        (evidence(S.BUSY, None, was_watched=False, own_words=OOM_WORDS), S.FAILED, ErrorCode.OUT_OF_MEMORY),
    ],
)
def test_state_and_code(seen: Evidence, state: S, code: ErrorCode | None) -> None:
    found, told = judge(seen)
    assert (found, told.code) == (state, code)


def test_why_we_killed_it_counts_more_than_how_it_ended() -> None:
    verdict = WorkerExit(code="WORKER_READY_TIMEOUT", message="no callback")
    state, told = judge(evidence(S.STARTING, 137, "SIGKILL", verdict=verdict, has_oom_proof=True))
    assert (state, told.code, told.message) == (S.FAILED, "WORKER_READY_TIMEOUT", "no callback")
    assert (told.exit_code, told.signal) == (137, "SIGKILL")


def test_its_own_words_and_log_are_kept() -> None:
    _, told = judge(evidence(S.BUSY, 137, own_words=OOM_WORDS, log_tail=("its log",)))
    assert (told.message, told.log_tail, told.signal) == ("engine", ["e"], "SIGKILL")
    _, told = judge(evidence(S.BUSY, 1, log_tail=("its log",)))
    assert told.log_tail == ["its log"]


def test_an_exit_code_nobody_saw_comes_from_what_it_wrote() -> None:
    words = WorkerExit(exit_code=0, message="lease over")
    state, told = judge(evidence(S.IDLE, None, was_watched=False, own_words=words))
    assert (state, told.exit_code, told.message) == (S.STOPPED, 0, "lease over")
