"""How are server-sent events written and read?

Format: WHATWG HTML, "Server-sent events".  Writer and parser are without I/O; the response that
sends them is in `runtime.asgi`, the async reader in `runtime.http`.
"""

from typing import Final

import msgspec

CONTENT_TYPE: Final = "text/event-stream"
DONE: Final = b"[DONE]"
#: A longer line is no stream of ours; the parser refuses it instead of growing.
LINE_BYTES_MAX: Final = 16 * 1024 * 1024
#: Nor is an event of more characters, on however many lines.
EVENT_CHARS_MAX: Final = 2 * LINE_BYTES_MAX


class SseEvent(msgspec.Struct, frozen=True):
    """One event, or one comment line (`comment` set, the rest empty)."""

    data: str = ""
    event: str = "message"
    event_id: str = ""
    comment: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether this is the `[DONE]` of a stream that ended well."""
        return self.data == "[DONE]"


def encode(data: bytes, event_id: int | str | None = None, event: str | None = None) -> bytes:
    """Return one event's bytes; `data` may hold line breaks."""
    head = b""
    if event_id is not None:
        head += b"id: %s\n" % str(event_id).encode()
    if event is not None:
        head += b"event: %s\n" % event.encode()
    if b"\n" in data or b"\r" in data:
        body = b"".join(b"data: %s\n" % line for line in data.splitlines())
    else:
        body = b"data: %s\n" % data
    return b"%s%s\n" % (head, body)


def comment(text: str) -> bytes:
    """Return a comment line's bytes: strict clients see nothing."""
    return b": %s\n\n" % text.replace("\r", " ").replace("\n", " ").encode()


class SseParser:
    """Incremental parser: feed bytes as they come, get the events they complete."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._chars = 0
        self._event = ""
        self._id = ""

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """Return the events and comments that `chunk` completes.

        Raises ValueError if a line is longer than 16 MiB, or an event than twice that.
        """
        buffer = self._rest + chunk
        # A carriage return at the end may be the first half of CRLF: keep it for the next chunk.
        held = b"\r" if buffer.endswith(b"\r") else b""
        if held:
            buffer = buffer[:-1]
        if b"\r" in buffer:
            buffer = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = buffer.split(b"\n")
        self._rest = rest + held
        if len(self._rest) > LINE_BYTES_MAX:
            raise ValueError(f"a line of the event stream is longer than {LINE_BYTES_MAX} bytes")
        found: list[SseEvent] = []
        for line in lines:
            self._line(line, found)
        return found

    def _line(self, line: bytes, found: list[SseEvent]) -> None:
        if not line:
            if self._data:
                found.append(SseEvent("\n".join(self._data), self._event or "message", self._id))
            self._data = []
            self._chars = 0
            self._event = ""
            return
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if name == "":
            found.append(SseEvent(comment=value))
        elif name == "data":
            # Of a line without content, its break.
            self._chars += len(value) + 1
            if self._chars > EVENT_CHARS_MAX:
                raise ValueError(f"an event of the stream is longer than {EVENT_CHARS_MAX} characters")
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value
