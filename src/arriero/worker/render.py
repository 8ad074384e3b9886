"""Which bytes does an engine's event become on the native routes?

A renderer turns one request's events into an answer.  A stream's renderer returns frames as they
come; an answer's renderer keeps everything and returns the body at the end.
"""

from typing import Final, Protocol

import msgspec

from arriero.contracts.events import (
    DoneFrame,
    InferenceAnswer,
    PromptFrame,
    QueuedFrame,
    StartedFrame,
)
from arriero.engines.base import (
    PromptProgress,
    ReasoningDelta,
    StreamEvent,
    StreamFinished,
    TextDelta,
    ToolCallDelta,
)
from arriero.runtime import sse

encode: Final = msgspec.json.Encoder().encode
#: The id of a token that the engine does not tell.
UNKNOWN_ID: Final = -1
DONE_FRAME: Final = b"data: [DONE]\n\n"


class Renderer(Protocol):
    """One request's answer in the making."""

    is_stream: bool

    def opening(self) -> bytes:
        """Return what goes out before everything else."""
        ...

    def queued(self, position: int) -> bytes:
        """Return what is said when the place in the queue has changed."""
        ...

    def event(self, event: StreamEvent) -> bytes:
        """Return what an engine's event becomes; empty if nothing goes out for it."""
        ...

    def closing(self, duration_ms: int) -> bytes:
        """Return the stream's last frames, or the whole body of an answer at once."""
        ...


class NativeStream:
    """`/v1/inference/stream`: one frame a token, known by its fields."""

    is_stream = True

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._event_id = 0
        self._finished: StreamFinished | None = None
        self._index = 0

    def _frame(self, value: object) -> bytes:
        frame = sse.encode(encode(value), self._event_id)
        self._event_id += 1
        return frame

    def opening(self) -> bytes:
        """Return the frame `started`."""
        return self._frame(StartedFrame(request_id=self._request_id))

    def queued(self, position: int) -> bytes:
        """Return the frame of a place in the queue."""
        return self._frame(QueuedFrame(position=position))

    def event(self, event: StreamEvent) -> bytes:
        """Return a frame for each token; a prompt's progress is a frame as well."""
        if isinstance(event, TextDelta):
            ids = event.token_ids
            if len(ids) == 1:
                return self._token(event.text, ids[0])
            return self._tokens(event.text, ids)
        if isinstance(event, StreamFinished):
            self._finished = event
            return b""
        if isinstance(event, PromptProgress):
            return self._frame(PromptFrame(prompt_processed=event.processed, prompt_total=event.total))
        if isinstance(event, ReasoningDelta):
            return self._tokens(event.text, event.token_ids)
        return b""

    def _tokens(self, text: str, ids: tuple[int, ...]) -> bytes:
        if not ids:
            return self._token(text, UNKNOWN_ID) if text else b""
        return b"".join(self._token("", token_id) for token_id in ids[:-1]) + self._token(text, ids[-1])

    def _token(self, text: str, token_id: int) -> bytes:
        # Written by hand: a struct and an encoder's call for each token cost twice as much.
        frame = b'id: %d\ndata: {"token":%b,"id":%d,"index":%d}\n\n' % (
            self._event_id,
            encode(text),
            token_id,
            self._index,
        )
        self._event_id += 1
        self._index += 1
        return frame

    def closing(self, duration_ms: int) -> bytes:
        """Return the frame `done`, and `[DONE]`."""
        finished = self._finished
        assert finished is not None, "an engine's stream ends with StreamFinished"
        done = DoneFrame(
            total_tokens=self._index,
            duration_ms=duration_ms,
            finish_reason=finished.finish_reason,
            prompt_tokens=finished.prompt_tokens,
            cached_tokens=finished.cached_tokens,
        )
        return self._frame(done) + DONE_FRAME


class NativeAnswer:
    """`/v1/inference`: everything at once."""

    is_stream = False

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._text: list[str] = []
        self._ids: list[int] = []
        self._finished: StreamFinished | None = None

    def opening(self) -> bytes:
        """Return nothing."""
        return b""

    def queued(self, position: int) -> bytes:
        """Return nothing."""
        return b""

    def event(self, event: StreamEvent) -> bytes:
        """Keep text and ids."""
        if isinstance(event, TextDelta | ReasoningDelta):
            if event.text:
                self._text.append(event.text)
            self._ids.extend(event.token_ids or ((UNKNOWN_ID,) if event.text else ()))
        elif isinstance(event, StreamFinished):
            self._finished = event
        return b""

    def closing(self, duration_ms: int) -> bytes:
        """Return the body."""
        finished = self._finished
        assert finished is not None, "an engine's stream ends with StreamFinished"
        return encode(
            InferenceAnswer(
                request_id=self._request_id,
                text="".join(self._text),
                token_ids=self._ids,
                total_tokens=len(self._ids),
                prompt_tokens=finished.prompt_tokens,
                duration_ms=duration_ms,
                finish_reason=finished.finish_reason,
            )
        )


def tokens_of(event: StreamEvent) -> int:
    """Return how many tokens an event brings, reckoning one where the engine does not tell ids."""
    if isinstance(event, TextDelta | ReasoningDelta):
        return len(event.token_ids) or (1 if event.text else 0)
    return 1 if isinstance(event, ToolCallDelta) else 0
