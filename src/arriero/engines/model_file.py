"""How is a model's file opened so that only a regular file is read, and no folder is told of?"""

import os
import stat
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from arriero.contracts.errors import ArrieroError, ErrorCode


@dataclass(frozen=True, slots=True)
class ModelFile:
    """An open file: what messages call it, its size when it was opened, and its bytes, unbuffered."""

    name: str
    size_bytes: int
    file: BinaryIO

    def read_at(self, offset: int, count: int) -> bytes:
        """Return up to `count` bytes, fewer where the file ends."""
        self.file.seek(offset)
        parts = bytearray()
        while len(parts) < count and (part := self.file.read(count - len(parts))):
            parts += part
        return bytes(parts)


@contextmanager
def opened(path: Path) -> Generator[ModelFile, None, None]:
    """Open a file for reading; raises INVALID_MODEL_PATH if it is none or may not be read."""
    name = shown_name(path)
    try:
        # Not blocking: a FIFO put there meanwhile must not hold us.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ArrieroError(ErrorCode.INVALID_MODEL_PATH, f"{name}: no such file", file=name) from error
    except PermissionError as error:
        raise ArrieroError(
            ErrorCode.INVALID_MODEL_PATH, f"{name}: no rights to read it", file=name
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path.
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise ArrieroError(ErrorCode.INVALID_MODEL_PATH, f"{name}: {reason}", file=name) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ArrieroError(ErrorCode.INVALID_MODEL_PATH, f"{name}: not a regular file", file=name)
        with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
            yield ModelFile(name, status.st_size, file)
    finally:
        os.close(descriptor)


def shown_name(path: Path) -> str:
    """Return the file's name as it may be told: no folder, no bytes that JSON cannot hold."""
    name = path.name.encode("utf-8", "replace").decode()
    return name if name.isprintable() else repr(name)
