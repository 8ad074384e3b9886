"""What does the tiny Hub send: which bytes, from memory or from a file, and which part of them?"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: Sent at a time: small where a rate is to be kept, large where none is.
BLOCK_BYTES: Final = 65_536
FAST_BLOCK_BYTES: Final = 1024 * 1024
_RANGE: Final = re.compile(r"bytes=(?:(\d+)-(\d*)|-(\d+))")


@dataclass(frozen=True, slots=True)
class Stored:
    """One file: in memory, or on the disk where it is large."""

    content: bytes | Path
    size_bytes: int
    sha256: str

    @contextlib.contextmanager
    def opened(self) -> Iterator[Callable[[int, int], bytes]]:
        """Yield what returns so many bytes from an offset on."""
        if isinstance(self.content, bytes):
            content = self.content
            yield lambda offset, size: content[offset : offset + size]
            return
        descriptor = os.open(self.content, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield lambda offset, size: os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)


def store(content: bytes | Path) -> Stored:
    """Return `content` with its size and checksum; a file is read once, in blocks."""
    if isinstance(content, bytes):
        return Stored(content, len(content), hashlib.sha256(content).hexdigest())
    with content.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Stored(content, content.stat().st_size, digest)


def part_of(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """Return the first byte and the one after the last that a Range header asks for; None for all.

    The first is not before the second where the file has no such byte.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None:
        return None
    if match[3]:
        return max(size_bytes - int(match[3]), 0), size_bytes
    start = int(match[1])
    return start, min(int(match[2]) + 1, size_bytes) if match[2] else size_bytes
