"""Which bytes does an engine's event become on OpenAI's routes?

Shapes: OpenAI's API reference, objects `chat.completion`, `chat.completion.chunk` and
`text_completion`.  Besides them every frame has an `id:` line, and places in the queue are comments.
"""

from collections.abc import Callable
from typing import Any

from arriero.engines.base import ReasoningDelta, StreamEvent, StreamFinished, TextDelta, ToolCallDelta
from arriero.runtime import sse
from arriero.worker.render import DONE_FRAME, encode
from arriero.worker.tool_choice import ForcedCall

MakeId = Callable[[], str]


class Usage:
    """Tokens of one request, summed over its choices."""

    def __init__(self) -> None:
        self.prompt = 0
        self.completion = 0
        self.cached = 0

    def add(self, finished: StreamFinished) -> None:
        """Add one choice's."""
        self.prompt += finished.prompt_tokens
        self.completion += finished.completion_tokens
        self.cached += finished.cached_tokens

    def shape(self) -> dict[str, Any]:
        """Return OpenAI's object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class _Stream:
    """What both kinds of streams do."""

    is_stream = True

    def __init__(self, head: dict[str, Any], *, include_usage: bool) -> None:
        self._head = head
        self._include_usage = include_usage
        self._event_id = 0
        self._usage = Usage()
        # A chunk is written by hand: everything around the delta is the same for each token.
        self._lead = encode(head)[:-1] + b',"choices":[{"index":'
        self._trail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def opening(self) -> bytes:
        """Return nothing: the first chunk comes with the first event."""
        return b""

    def queued(self, position: int) -> bytes:
        """Return a comment: strict clients see nothing."""
        return sse.comment(f"queued position={position}")

    def _chunk(self, choice: bytes) -> bytes:
        """Return a frame; `choice` is what follows `{"index":` in its one choice."""
        frame = b"id: %d\ndata: %b%b%b" % (self._event_id, self._lead, choice, self._trail)
        self._event_id += 1
        return frame

    def closing(self, duration_ms: int) -> bytes:
        """Return the chunk of usage where it was asked for, and `[DONE]`."""
        if not self._include_usage:
            return DONE_FRAME
        last = {**self._head, "choices": [], "usage": self._usage.shape()}
        return sse.encode(encode(last), self._event_id) + DONE_FRAME


class ChatStream(_Stream):
    """`chat.completion.chunk`s."""

    def __init__(
        self, head: dict[str, Any], *, include_usage: bool, make_id: MakeId, forced: ForcedCall | None = None
    ) -> None:
        super().__init__({**head, "object": "chat.completion.chunk"}, include_usage=include_usage)
        self._make_id = make_id
        self._forced = forced
        self._has_role = False

    def event(self, event: StreamEvent) -> bytes:
        """Return the chunks of an event; the first one says the role."""
        if self._forced is not None:
            return b"".join([self._event(seen) for seen in self._forced.events(event)])
        return self._event(event)

    def _event(self, event: StreamEvent) -> bytes:
        if isinstance(event, TextDelta):
            if not event.text and not event.logprobs:
                return self._role()
            logprobs = encode({"content": event.logprobs, "refusal": None}) if event.logprobs else b"null"
            return self._role() + self._delta(b'{"content":%b}' % encode(event.text), logprobs)
        if isinstance(event, ReasoningDelta):
            if not event.text:
                return self._role()
            return self._role() + self._delta(b'{"reasoning_content":%b}' % encode(event.text))
        if isinstance(event, ToolCallDelta):
            return self._role() + self._delta(encode({"tool_calls": [self._call(event)]}))
        if isinstance(event, StreamFinished):
            self._usage.add(event)
            end = b'0,"delta":{},"logprobs":null,"finish_reason":%b}' % encode(event.finish_reason)
            return self._role() + self._chunk(end)
        return b""

    def _call(self, event: ToolCallDelta) -> dict[str, Any]:
        call: dict[str, Any] = {"index": event.index}
        function: dict[str, Any] = {"arguments": event.arguments}
        if event.name is not None:
            call |= {"id": event.call_id or f"call_{self._make_id()}", "type": "function"}
            function = {"name": event.name, **function}
        elif event.call_id:
            call["id"] = event.call_id
        return {**call, "function": function}

    def _role(self) -> bytes:
        if self._has_role:
            return b""
        self._has_role = True
        return self._delta(b'{"role":"assistant","content":""}')

    def _delta(self, delta: bytes, logprobs: bytes = b"null") -> bytes:
        return self._chunk(b'0,"delta":%b,"logprobs":%b,"finish_reason":null}' % (delta, logprobs))


class ChatAnswer:
    """A `chat.completion`."""

    is_stream = False

    def __init__(self, head: dict[str, Any], *, make_id: MakeId, forced: ForcedCall | None = None) -> None:
        self._head = {**head, "object": "chat.completion"}
        self._make_id = make_id
        self._forced = forced
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: list[dict[str, Any]] = []
        self._usage = Usage()
        self._finish_reason = ""

    def opening(self) -> bytes:
        """Return nothing."""
        return b""

    def queued(self, position: int) -> bytes:
        """Return nothing."""
        return b""

    def event(self, event: StreamEvent) -> bytes:
        """Keep what came."""
        for seen in [event] if self._forced is None else self._forced.events(event):
            self._keep(seen)
        return b""

    def _keep(self, event: StreamEvent) -> None:
        if isinstance(event, TextDelta):
            self._text.append(event.text)
            self._logprobs.extend(event.logprobs)
        elif isinstance(event, ReasoningDelta):
            self._reasoning.append(event.text)
        elif isinstance(event, ToolCallDelta):
            call = self._calls.setdefault(
                event.index,
                {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
            )
            call["id"] = call["id"] or event.call_id or f"call_{self._make_id()}"
            call["function"]["name"] += event.name or ""
            call["function"]["arguments"] += event.arguments
        elif isinstance(event, StreamFinished):
            self._usage.add(event)
            self._finish_reason = event.finish_reason

    def closing(self, duration_ms: int) -> bytes:
        """Return the body."""
        text = "".join(self._text)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["content"] = text or None
            message["tool_calls"] = [self._calls[index] for index in sorted(self._calls)]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": {"content": self._logprobs, "refusal": None} if self._logprobs else None,
            "finish_reason": self._finish_reason,
        }
        return encode({**self._head, "choices": [choice], "usage": self._usage.shape()})


class _LegacyLogprobs:
    """Turns chat's entries into the parallel lists of `text_completion`."""

    def __init__(self) -> None:
        self._offset = 0

    def shape(self, entries: tuple[dict[str, Any], ...], text: str) -> dict[str, Any]:
        """Return the lists of some tokens, and go on behind their text."""
        shape: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self._offset
        for entry in entries:
            token = entry.get("token", "")
            shape["tokens"].append(token)
            shape["token_logprobs"].append(entry.get("logprob"))
            shape["top_logprobs"].append(
                {top.get("token", ""): top.get("logprob") for top in entry.get("top_logprobs") or ()}
            )
            shape["text_offset"].append(offset)
            offset += len(token)
        self._offset += len(text)
        return shape


class CompletionStream(_Stream):
    """`text_completion` chunks; a choice for each prompt, one after the other."""

    def __init__(self, head: dict[str, Any], *, include_usage: bool) -> None:
        super().__init__({**head, "object": "text_completion"}, include_usage=include_usage)
        self._index = 0
        self._logprobs = _LegacyLogprobs()

    def event(self, event: StreamEvent) -> bytes:
        """Return the chunk of an event."""
        if isinstance(event, TextDelta | ReasoningDelta):
            entries = event.logprobs if isinstance(event, TextDelta) else ()
            logprobs = encode(self._logprobs.shape(entries, event.text)) if entries else b"null"
            if not event.text and not entries:
                return b""
            return self._text(event.text, logprobs, b"null")
        if isinstance(event, StreamFinished):
            self._usage.add(event)
            frame = self._text("", b"null", encode(event.finish_reason))
            self._index += 1
            self._logprobs = _LegacyLogprobs()
            return frame
        return b""

    def _text(self, text: str, logprobs: bytes, finish_reason: bytes) -> bytes:
        return self._chunk(
            b'%d,"text":%b,"logprobs":%b,"finish_reason":%b}'
            % (self._index, encode(text), logprobs, finish_reason)
        )


class CompletionAnswer:
    """A `text_completion`."""

    is_stream = False

    def __init__(self, head: dict[str, Any]) -> None:
        self._head = {**head, "object": "text_completion"}
        self._text: list[str] = []
        self._entries: list[dict[str, Any]] = []
        self._choices: list[dict[str, Any]] = []
        self._usage = Usage()

    def opening(self) -> bytes:
        """Return nothing."""
        return b""

    def queued(self, position: int) -> bytes:
        """Return nothing."""
        return b""

    def event(self, event: StreamEvent) -> bytes:
        """Keep what came; the end of a generation ends a choice."""
        if isinstance(event, TextDelta | ReasoningDelta):
            self._text.append(event.text)
            if isinstance(event, TextDelta):
                self._entries.extend(event.logprobs)
        elif isinstance(event, StreamFinished):
            text = "".join(self._text)
            logprobs = _LegacyLogprobs().shape(tuple(self._entries), text) if self._entries else None
            self._choices.append(
                {
                    "index": len(self._choices),
                    "text": text,
                    "logprobs": logprobs,
                    "finish_reason": event.finish_reason,
                }
            )
            self._usage.add(event)
            self._text, self._entries = [], []
        return b""

    def closing(self, duration_ms: int) -> bytes:
        """Return the body."""
        return encode({**self._head, "choices": self._choices, "usage": self._usage.shape()})
