"""What is kept on disk of a file that is not whole yet, and how does a later attempt go on with it?

Two files: `NAME.part` with the bytes, and `NAME.mark` that says which remote file they are of.
The mark is on disk before the first byte, so bytes without a mark are never gone on with.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec

from arriero.agent.files import READ_BYTES, disk_error, in_thread

MARK_BYTES_MAX = 65_536


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """Which remote file the bytes are of."""

    url: str = ""
    #: A strong ETag, empty if the server gave none.
    etag: str = ""
    size_bytes: int | None = None
    #: What the source says the hash must be in the end, where it says so.
    sha256: str | None = None

    def is_same_file(self, other: "Mark") -> bool:
        """Return whether bytes marked with this may be continued with bytes of `other`."""
        if (
            self.size_bytes is not None
            and other.size_bytes is not None
            and self.size_bytes != other.size_bytes
        ):
            return False
        if self.sha256 is not None and other.sha256 is not None:
            return self.sha256 == other.sha256
        if not (self.etag and self.url == other.url):
            return False
        return not other.etag or self.etag == other.etag


class Partial:
    """The bytes so far, with their hash.  Make it with `await Partial.open(…)`, end it with `close()`.

    Raises INSUFFICIENT_DISK and STATE_DIR_UNUSABLE; what was written before is kept.
    """

    def __init__(self, path: Path) -> None:
        """Open nothing yet; for `open` alone."""
        self.path = path
        self._mark_path = path.with_suffix(".mark")
        self._descriptor = -1
        self._hasher = hashlib.sha256()
        self.offset = 0
        self.mark = Mark()

    @classmethod
    async def open(
        cls, folder: Path, name: str, wanted: Mark, on_hashed: Callable[[int], None] = lambda _: None
    ) -> Self:
        """Open or create the part of `name`; what is there is kept if its mark fits `wanted`, and hashed."""
        partial = cls(folder / f"{name}.part")
        try:
            await in_thread(lambda: partial._open(wanted))
            while await in_thread(partial._hash_more):
                on_hashed(partial.offset)
        except OSError as error:
            partial.close()
            raise disk_error(error, "a partial file was opened") from error
        except BaseException:
            partial.close()
            raise
        return partial

    async def restart(self, mark: Mark) -> None:
        """Throw the bytes away; those that follow are of `mark`."""
        await self._run(lambda: self._restart(mark), "a partial file was begun")

    async def write(self, block: bytes | bytearray) -> None:
        """Append and hash."""
        await self._run(lambda: self._write(block), f"{self.path.stem} was written")

    async def finish(self) -> str:
        """Make the bytes last and return their hash."""
        await self._run(lambda: os.fsync(self._descriptor), f"{self.path.stem} was written")
        return self._hasher.hexdigest()

    def close(self) -> None:
        """Close the file; safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    async def _run(self, work: Callable[[], None], doing: str) -> None:
        try:
            await in_thread(work)
        except OSError as error:
            raise disk_error(error, doing) from error

    # --- In a thread --------------------------------------------------------------------------

    def _open(self, wanted: Mark) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Never through a link: what is written stays in the folder.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self.path, flags, 0o644)
        mark = self._read_mark()
        if mark is not None and mark.is_same_file(wanted):
            self.mark = mark
        else:
            os.ftruncate(self._descriptor, 0)

    def _read_mark(self) -> Mark | None:
        try:
            with self._mark_path.open("rb") as file:
                return msgspec.json.decode(file.read(MARK_BYTES_MAX), type=Mark)
        except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def _hash_more(self) -> bool:
        block = os.read(self._descriptor, READ_BYTES)
        self._hasher.update(block)
        self.offset += len(block)
        return bool(block)

    def _restart(self, mark: Mark) -> None:
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._hasher = hashlib.sha256()
        self.offset = 0
        self.mark = mark
        fresh = self._mark_path.with_suffix(".mark-new")
        fresh.write_bytes(msgspec.json.encode(mark))
        fresh.replace(self._mark_path)

    def _write(self, block: bytes | bytearray) -> None:
        rest = memoryview(block)
        while rest:
            count = os.write(self._descriptor, rest)
            self._hasher.update(rest[:count])
            self.offset += count
            rest = rest[count:]
