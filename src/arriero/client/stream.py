"""How are the event streams of the daemons read from a plain, blocking program?"""

import contextlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Final, TypeAlias, TypeVar

import msgspec

from arriero.client.connection import Exchange, FailureCodes, Limits, Target
from arriero.contracts.errors import ArrieroError, ErrorCode, ErrorResponse, from_body
from arriero.contracts.events import (
    CheckFrame,
    DoneFrame,
    DownloadFrame,
    LoadingFrame,
    PromptFrame,
    QueuedFrame,
    StartedFrame,
    TaskEvent,
    TaskFailed,
    TokenFrame,
)
from arriero.runtime.sse import CONTENT_TYPE, SseEvent, SseParser

SSE_CODES: Final = FailureCodes(
    ErrorCode.SSE_CONNECTION_ERROR, ErrorCode.SSE_CONNECTION_TIMEOUT, ErrorCode.SSE_CONNECTION_FAILED
)
PROGRESS_CODES: Final = FailureCodes(
    ErrorCode.PROGRESS_STREAM_ERROR, ErrorCode.PROGRESS_STREAM_TIMEOUT, ErrorCode.PROGRESS_STREAM_FAILED
)
TOKEN_CODES: Final = FailureCodes(
    ErrorCode.TOKEN_STREAM_ERROR, ErrorCode.TOKEN_STREAM_TIMEOUT, ErrorCode.TOKEN_STREAM_FAILED
)
#: A person's request: it shows the server's own error, and REQUEST_TIMEOUT where time runs out.
TASK_CODES: Final = FailureCodes(ErrorCode.TOKEN_STREAM_ERROR, ErrorCode.REQUEST_TIMEOUT)

T = TypeVar("T")
InferenceFrame: TypeAlias = StartedFrame | QueuedFrame | PromptFrame | TokenFrame | DoneFrame


class EventStream:
    """One event stream, iterated as it comes: `with client.stream(…) as stream: for event in stream`.

    The iteration ends with `[DONE]`, or with the connection where `needs_done` is False; it raises
    the chosen error codes where the stream breaks, falls silent or is out of time.  Comments are
    events too (`comment` set).  `close` ends it from any thread: the iteration then just ends.
    """

    def __init__(self, exchange: Exchange, *, needs_done: bool = True) -> None:
        self._exchange = exchange
        self._needs_done = needs_done
        #: Whether the stream said that it ended well.
        self.is_done = False
        #: The id of the last event, for `Last-Event-ID`.
        self.last_event_id = ""

    def __enter__(self) -> "EventStream":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def headers(self) -> Mapping[str, str]:
        """The answer's headers, names in lower case."""
        return self._exchange.headers

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._exchange.is_closed

    def close(self) -> None:
        """End the stream; the server sees the connection close.  Safe from any thread, and twice."""
        self._exchange.close()

    def __iter__(self) -> Iterator[SseEvent]:
        parser = SseParser()
        while True:
            try:
                chunk = self._exchange.read_some()
            except ArrieroError:
                if self.is_closed:
                    return
                raise
            if not chunk:
                break
            try:
                events = parser.feed(chunk)
            except ValueError as error:
                raise self._exchange.broken(str(error)) from error
            for event in events:
                self.last_event_id = event.event_id or self.last_event_id
                if event.is_done:
                    self.is_done = True
                    return
                yield event
        if self._needs_done and not self.is_closed:
            raise self._exchange.broken("the stream broke before its end")


def open_stream(
    target: Target,
    method: str,
    path: str,
    *,
    limits: Limits,
    codes: FailureCodes,
    body: object = None,
    headers: Mapping[str, str] | None = None,
    needs_done: bool = True,
) -> EventStream:
    """Return an event stream whose head has come and says 2xx and `text/event-stream`.

    Raises the chosen codes otherwise; an answer that is no event stream counts as a wrong status.
    """
    exchange = Exchange(target, limits=limits, codes=codes)
    try:
        exchange.send(method, path, body, {"Accept": CONTENT_TYPE, **(headers or {})})
        exchange.raise_for_status()
        kind = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != CONTENT_TYPE:
            raise ArrieroError(
                codes.status or codes.unreachable,
                f"{target.netloc} answered with {kind or 'no content type'}, not with an event stream",
                status=exchange.status,
                content_type=kind,
            )
    except BaseException:
        exchange.close()
        raise
    return EventStream(exchange, needs_done=needs_done)


def raise_error_event(event: SseEvent) -> None:
    """Raise the error that an `event: error` carries; do nothing for any other event."""
    if event.event != "error":
        return
    try:
        raise from_body(msgspec.json.decode(event.data, type=ErrorResponse).error)
    except msgspec.DecodeError as error:
        raise ArrieroError(ErrorCode.INTERNAL_ERROR, "an error event that is none of ours") from error


def inference_frame(event: SseEvent) -> InferenceFrame | None:
    """Return a worker's native token-stream frame; None for comments.  Raises an error event's error."""
    if event.comment is not None:
        return None
    raise_error_event(event)
    content = _object(event)
    if "error" in content:
        raise_error_event(SseEvent(event.data, "error"))
    for field, kind in _INFERENCE_FRAMES:
        if field in content:
            return _convert(content, kind)
    raise ArrieroError(ErrorCode.VERSION_MISMATCH, "a frame of a token stream that is none of ours")


def loading_frame(event: SseEvent) -> LoadingFrame | None:
    """Return a frame of a worker's loading progress; None for comments."""
    if event.comment is not None:
        return None
    raise_error_event(event)
    return _convert(_object(event), LoadingFrame)


def download_frame(event: SseEvent) -> DownloadFrame | None:
    """Return a frame of a download's progress; None for comments."""
    if event.comment is not None:
        return None
    raise_error_event(event)
    return _convert(_object(event), DownloadFrame)


def check_frame(event: SseEvent, answer: type[T]) -> CheckFrame | T:
    """Return a frame of work that reads through files, or what came of it: its last event."""
    raise_error_event(event)
    content = _object(event)
    return _convert(content, CheckFrame) if "bytes_read" in content else _convert(content, answer)


def task_event(event: SseEvent) -> TaskEvent | None:
    """Return an event of a task; None for comments.  An error event becomes `TaskFailed`."""
    if event.comment is not None:
        return None
    if event.event == "error":
        try:
            return TaskFailed(error=msgspec.json.decode(event.data, type=ErrorResponse).error)
        except msgspec.DecodeError as error:
            raise ArrieroError(ErrorCode.INTERNAL_ERROR, "an error event that is none of ours") from error
    try:
        decoded: TaskEvent = msgspec.json.decode(event.data, type=TaskEvent)
        return decoded
    except msgspec.DecodeError as error:
        raise ArrieroError(
            ErrorCode.VERSION_MISMATCH, f"a task event that is none of ours: {error}"
        ) from error


_INFERENCE_FRAMES: Final[tuple[tuple[str, type[InferenceFrame]], ...]] = (
    ("token", TokenFrame),
    ("done", DoneFrame),
    ("queued", QueuedFrame),
    ("prompt_processed", PromptFrame),
    ("started", StartedFrame),
)


def _object(event: SseEvent) -> dict[str, Any]:
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.decode(event.data, type=dict[str, Any])
    raise ArrieroError(ErrorCode.VERSION_MISMATCH, "an event that is no JSON object")


def _convert(content: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise ArrieroError(ErrorCode.VERSION_MISMATCH, f"an event that is none of ours: {error}") from error
