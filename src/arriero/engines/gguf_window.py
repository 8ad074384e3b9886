"""How is the header of a GGUF file read so that no length it claims costs time or memory?

A window moves forward over the file.  What is stepped over is not read, what is read has a limit,
and a budget bounds what all files of one model cost together.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Final, NoReturn, TypeAlias

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines.gguf_types import (
    ARRAY_STRINGS_MAX,
    ARRAYS_MAX,
    HEADER_BYTES_MAX,
    KEPT_NUMBERS_MAX,
    KEPT_STRINGS_MAX,
    STRING_BYTES_MAX,
)

_WINDOW_BYTES: Final = 256 << 10
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
#: Given each token of the vocabulary: its number, and how the file writes it.
TakeToken: TypeAlias = Callable[[int, bytes], None]


@dataclass(slots=True)
class Budget:
    """What is left to be read of one model, all its files together."""

    header_bytes: int = HEADER_BYTES_MAX
    array_strings: int = ARRAY_STRINGS_MAX
    arrays: int = ARRAYS_MAX
    kept_strings: int = KEPT_STRINGS_MAX
    kept_numbers: int = KEPT_NUMBERS_MAX


class Window:
    """The bytes of one header, from its first to its last.  Raises MODEL_CORRUPTED for all that is wrong."""

    def __init__(self, file: BinaryIO, *, name: str, size: int, budget: Budget) -> None:
        self.name = name
        self.size = size
        self.budget = budget
        self.position = 0
        self._end_max = budget.header_bytes
        self._file = file
        self._bytes = b""
        self._start = 0

    def u32(self, where: str) -> int:
        """Read a number of 32 bits; `where` is for the message if the file ends here."""
        value: int = _U32.unpack(self.take(4, where))[0]
        return value

    def u64(self, where: str) -> int:
        """Read a number of 64 bits."""
        value: int = _U64.unpack(self.take(8, where))[0]
        return value

    def text(self, length_max: int, where: str) -> str:
        """Read a name: its length, then its bytes; what cannot be printed is written as an escape."""
        length = self.u64(where)
        if not 1 <= length <= length_max:
            self.corrupted(f"the name of {where} has {length} bytes, outside 1..{length_max}")
        raw = self.take(length, where)
        if b"\0" in raw:
            # The engine compares names up to their first zero byte: it would see another one.
            self.corrupted(f"the name of {where} holds a zero byte")
        text = raw.decode("utf-8", "replace")
        return text if text.isprintable() else repr(text)

    def length(self, length_max: int, key: str) -> int:
        """Read the length of a text."""
        length = self.u64(key)
        if length > length_max:
            self._too_long(length, length_max, key)
        return length

    def take(self, count: int, where: str) -> bytes:
        """Read `count` bytes; its caller has bounded them."""
        start = self.position - self._start
        if start < 0 or start + count > len(self._bytes):
            self._fill(count, where)
            start = 0
        self.position += count
        return self._bytes[start : start + count]

    def skip(self, count: int, where: str) -> None:
        """Step over `count` bytes without reading them."""
        self.position += count
        if self.position > self.size:
            self._truncated(where)
        if self.position > self._end_max:
            self.corrupted(f"the header is longer than {HEADER_BYTES_MAX} bytes, at {where}")

    def skip_strings(self, count: int, key: str) -> None:
        """Step over `count` strings: the one hot loop, hence its own copy of the window's rules."""
        unpack = _U64.unpack_from
        raw, start = self._bytes, self._start
        position = self.position
        limit = start + len(raw) - 8
        for _ in range(count):
            if position > limit:
                self.position = position
                self._fill(8, key)
                raw, start = self._bytes, self._start
                limit = start + len(raw) - 8
            length = unpack(raw, position - start)[0]
            if length > STRING_BYTES_MAX:
                self.position = position
                self._too_long(length, STRING_BYTES_MAX, key)
            position += 8 + length
        self.position = position
        self.skip(0, key)

    def finish(self) -> None:
        """Take what was read off the budget."""
        self.budget.header_bytes -= self.position

    def corrupted(self, message: str, **details: Any) -> NoReturn:
        """Raise MODEL_CORRUPTED, naming the file."""
        raise ArrieroError(ErrorCode.MODEL_CORRUPTED, f"{self.name}: {message}", file=self.name, **details)

    def _fill(self, count: int, where: str) -> None:
        """Move the window to the position; it then holds at least `count` bytes."""
        self.skip(0, where)
        wanted = max(count, _WINDOW_BYTES)
        self._file.seek(self.position)
        parts = b""
        while len(parts) < count:
            part = self._file.read(wanted - len(parts))
            if not part:
                self._truncated(where)
            parts += part
        self._bytes, self._start = parts, self.position

    def _too_long(self, length: int, length_max: int, key: str) -> NoReturn:
        self.corrupted(f"the key {shown(key)} has a text of {length} bytes, at most {length_max} can be")

    def _truncated(self, where: str) -> NoReturn:
        self.corrupted(f"the file ends at byte {self.size}, inside its header, at {where}")


def shown(value: object) -> str:
    """Return a value of the file as a message may hold it: short, and nothing a terminal acts on."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
