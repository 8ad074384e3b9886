"""How does one task become text on stdout, and what becomes of it when somebody stops it?"""

import contextlib
import os
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import Any, Final

import msgspec

from arriero.cli import render
from arriero.cli.narrator import Narrator
from arriero.cli.signals import Terminated, undisturbed
from arriero.client.api import Orchestrator, task_events
from arriero.client.stream import EventStream
from arriero.contracts import ids
from arriero.contracts.errors import ArrieroError, ErrorBody, ErrorCode, from_body
from arriero.contracts.events import (
    TaskAccepted,
    TaskDownloading,
    TaskEnd,
    TaskEvent,
    TaskFailed,
    TaskLoading,
    TaskPlacing,
    TaskQueued,
    TaskToken,
    TaskUsage,
)
from arriero.contracts.requests import TaskBody
from arriero.domain import deadlines

CANCEL_TIMEOUT_S: Final = 3.0
#: We are the last to give up, so that the error told is the one of whoever knew best.
OWN_MARGIN_S: Final = 2 * deadlines.WORD_MS / 1000


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What was computed."""

    prompt_tokens: int
    completion_tokens: int
    duration_ms: int


class Answer(msgspec.Struct, kw_only=True):
    """What came of one task: also of one that failed half-way."""

    #: As asked for, or as the orchestrator chose where nothing was.
    model: str | None
    text: str = ""
    node: str | None = None
    worker_id: str | None = None
    task_id: str | None = None
    usage: Usage | None = None
    finish_reason: str | None = None
    token_ids: list[int] = []
    error: ErrorBody | None = None


class Deadline:
    """The moment by which a command must be done; None: whenever."""

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._until = None if timeout_s is None else time.monotonic() + timeout_s

    def remaining_s(self) -> float | None:
        """Return what is left.  Raises REQUEST_TIMEOUT if nothing is."""
        if self._until is None:
            return None
        left = self._until - time.monotonic()
        if left <= 0:
            raise self.passed()
        return left

    def passed(self) -> ArrieroError:
        """Return the error of a command that was not done in time."""
        return ArrieroError(
            ErrorCode.REQUEST_TIMEOUT, f"not done within {self.timeout_s:g} s", timeout_s=self.timeout_s
        )


def run_task(
    client: Orchestrator, body: TaskBody, *, deadline: Deadline, narrator: Narrator, answer: Answer,
    write: Callable[[str], None],
) -> None:  # fmt: skip
    """Run a task and fill `answer` as it comes; each piece of text goes to `write` at once.

    Raises what the task failed with.  Ctrl-C, SIGTERM and a reader of stdout that is gone cancel it
    on the worker before they are passed on.
    """
    left_s = deadline.remaining_s()
    stream: EventStream | None = None
    try:
        stream = client.run_task(
            body,
            request_id=ids.request_id(os.urandom(12).hex()),
            remaining_ms=None if left_s is None else max(1.0, left_s * 1000),
            total_s=None if left_s is None else left_s + OWN_MARGIN_S,
        )
        _follow(stream, narrator, answer, write)
    except (KeyboardInterrupt, Terminated, BrokenPipeError):
        with undisturbed():
            _cancel(client, stream, answer)
        raise
    except ArrieroError as error:
        told = error
        if isinstance(error.__cause__, TimeoutError) and left_s is not None:
            # Our own limit has a margin that nobody asked for.
            told = deadline.passed()
        answer.error = told.body()
        raise told from error.__cause__
    finally:
        narrator.clear()
        if stream is not None:
            stream.close()


def name_model(client: Orchestrator, answer: Answer) -> None:
    """Fill in the model of a task that named none; unknown it stays where the task cannot be asked."""
    if answer.model is None and answer.task_id is not None:
        with contextlib.suppress(ArrieroError):
            answer.model = client.task(answer.task_id).model


def write_to_stdout(text: str) -> None:
    """Write a piece of an answer so that it is seen, or piped on, at once."""
    if render.is_terminal(sys.stdout):
        # A model may write anything, a hostile machine all the more; a pipe gets what was written.
        text = "".join("?" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
    sys.stdout.write(text)
    sys.stdout.flush()


def end_line(answer: Answer, narrator: Narrator) -> None:
    """End the answer's last line on stdout, unless it is ended."""
    is_ended = render.is_terminal(sys.stdout) and not narrator.is_mid_line
    if answer.text and not answer.text.endswith("\n") and not is_ended:
        with contextlib.suppress(BrokenPipeError):
            write_to_stdout("\n")


def _follow(stream: EventStream, narrator: Narrator, answer: Answer, write: Callable[[str], None]) -> None:
    pieces: list[str] = []
    is_seen = render.is_terminal(sys.stdout)
    try:
        for event in task_events(stream):
            if isinstance(event, TaskToken):
                if not pieces:
                    narrator.clear()
                pieces.append(event.token)
                answer.token_ids.append(event.id)
                if event.token:
                    write(event.token)
                    narrator.is_mid_line = is_seen and not event.token.endswith("\n")
            else:
                _tell(event, narrator)
                _take(event, answer)
    finally:
        answer.text = "".join(pieces)


def _take(event: TaskEvent, answer: Answer) -> None:
    """Keep what an event tells of the answer; raise the error it carries."""
    if isinstance(event, TaskAccepted):
        answer.task_id = event.task_id
    elif isinstance(event, TaskPlacing):
        answer.node = event.node or answer.node
        answer.worker_id = event.worker_id or answer.worker_id
    elif isinstance(event, TaskUsage):
        answer.usage = Usage(
            prompt_tokens=event.prompt_tokens,
            completion_tokens=event.completion_tokens,
            duration_ms=event.duration_ms,
        )
    elif isinstance(event, TaskEnd):
        answer.finish_reason = event.finish_reason
    elif isinstance(event, TaskFailed):
        raise from_body(event.error)


def _tell(event: Any, narrator: Narrator) -> None:
    """Tell the person what an event says besides text."""
    if isinstance(event, TaskDownloading):
        # Many events carry one sentence: where the bytes come from, or why they do not.
        narrator.say_once(event.actor or "orchestrator", event.message)
        total = event.bytes_total
        detail = render.progress_text(event.bytes_downloaded, total, event.speed_mbps, event.eta_s)
        if event.bytes_downloaded:
            narrator.advance("downloading", event.bytes_downloaded / total if total else None, detail)
    elif isinstance(event, TaskLoading):
        narrator.advance("loading", event.fraction, event.stage if event.stage != "loading" else "")
    elif isinstance(event, TaskQueued):
        narrator.say(
            event.actor or "worker", event.message or f"waiting for a slot as number {event.position}"
        )
    elif event.message and not isinstance(event, TaskFailed):
        narrator.say(event.actor or "orchestrator", event.message)


def _cancel(client: Orchestrator, stream: EventStream | None, answer: Answer) -> None:
    """Close the stream, which cancels the task, and make sure of it by name."""
    if stream is not None:
        stream.close()
    if answer.task_id is not None:
        # The closed connection has cancelled it already, as a rule; then there is nothing left to do.
        with contextlib.suppress(ArrieroError):
            client.cancel_task(answer.task_id, timeout_s=CANCEL_TIMEOUT_S)
