"""How is one HTTP/1.1 exchange written and read?  (RFC 9112, one request a connection)

The standard library's `http.client` does this too, and imports the e-mail parser for it: 40 ms
of every command.
"""

import re
from collections.abc import Callable, Mapping
from typing import Final

HEAD_BYTES_MAX: Final = 64 * 1024
_CHUNK_LINE_MAX: Final = 1024
_RECEIVE_BYTES: Final = 65536
_TARGET: Final = re.compile(r"[\x21-\x7e]+")
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: .*)?")
_HEX: Final = re.compile(rb"[0-9A-Fa-f]{1,15}")
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})


class NotHttp(Exception):
    """What came is no HTTP/1.1 answer, or one beyond its limits."""


class NoAnswer(Exception):
    """The connection closed before the first byte of an answer."""


class CutOff(Exception):
    """The connection closed in the middle of an answer."""


def request_bytes(method: str, target: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """Return a whole request.  Raises ValueError for a target or header that could break its line."""
    if not _TARGET.fullmatch(target):
        raise ValueError("a path holds a blank or a control character")
    lines = [f"{method} {target} HTTP/1.1"]
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or any(character in value for character in "\r\n\0"):
            raise ValueError(f"the header {name[:40]!r} is not well formed")
        lines.append(f"{name}: {value}")
    if body or method in _WITH_BODY:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


class Answer:
    """One answer, read from `receive(n)` (as a socket's recv: b"" at the end of the connection).

    `read_head` first, then `read_some` until b"".  Raises NotHttp, NoAnswer, CutOff.
    """

    def __init__(self, receive: Callable[[int], bytes]) -> None:
        self.status = 0
        #: Names in lower case; of a name that came twice, the last value.
        self.headers: dict[str, str] = {}
        self._receive = receive
        self._buffer = b""
        self._is_chunked = False
        #: Bytes of the body (or of the chunk under way) that are still to come; None: until the close.
        self._left: int | None = 0
        self._is_whole = False

    def read_head(self) -> None:
        """Read status and headers; interim answers (1xx) are passed over."""
        while self.status < 200:
            status_line, *lines = self._take_head().split(b"\r\n")
            match = _STATUS_LINE.fullmatch(status_line)
            if match is None:
                raise NotHttp("no status line")
            self.status = int(match[1])
            self.headers = {}
            for line in lines:
                name, colon, value = line.partition(b":")
                if not colon:
                    raise NotHttp("a header without a colon")
                self.headers[name.decode("latin-1").lower()] = value.strip().decode("latin-1")
        self._is_chunked = self.headers.get("transfer-encoding", "").lower().endswith("chunked")
        length = self.headers.get("content-length")
        if self.status in (204, 304):
            self._is_whole = True
        elif self._is_chunked:
            self._left = 0
        elif length is None:
            self._left = None
        elif length.isascii() and length.isdigit():
            self._left = int(length)
            self._is_whole = self._left == 0
        else:
            raise NotHttp("a Content-Length that is no number")

    def read_some(self) -> bytes:
        """Return the next bytes of the body as soon as there are some; b"" at its end."""
        if self._is_whole:
            return b""
        if self._is_chunked and self._left == 0:
            self._left = self._take_chunk_size()
            if self._left == 0:
                self._take_trailers()
                self._is_whole = True
                return b""
        found = self._buffer or self._receive(_RECEIVE_BYTES)
        if not found:
            if self._left is None:
                self._is_whole = True
                return b""
            raise CutOff
        if self._left is None:
            self._buffer = b""
            return found
        piece, self._buffer = found[: self._left], found[self._left :]
        self._left -= len(piece)
        if self._left == 0:
            if self._is_chunked:
                self._take_line()
            else:
                self._is_whole = True
        return piece

    def _take_head(self) -> bytes:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise NotHttp(f"a head of more than {HEAD_BYTES_MAX} bytes")
            self._more(NoAnswer if not self._buffer else CutOff)
        head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
        return head

    def _take_line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            if len(self._buffer) > _CHUNK_LINE_MAX:
                raise NotHttp(f"a line of more than {_CHUNK_LINE_MAX} bytes between chunks")
            self._more(CutOff)
        line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
        return line

    def _take_chunk_size(self) -> int:
        digits = self._take_line().partition(b";")[0].strip()
        if not _HEX.fullmatch(digits):
            raise NotHttp("a chunk size that is no number")
        return int(digits, 16)

    def _take_trailers(self) -> None:
        read = 0
        while line := self._take_line():
            read += len(line)
            if read > HEAD_BYTES_MAX:
                raise NotHttp(f"trailers of more than {HEAD_BYTES_MAX} bytes")

    def _more(self, at_end: type[Exception]) -> None:
        found = self._receive(_RECEIVE_BYTES)
        if not found:
            raise at_end
        self._buffer += found
