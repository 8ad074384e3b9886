"""What is kept on disk of a file that is not whole yet, and how does a later attempt go on with it?

Two files: `NAME.part` with the bytes, holes where none came yet, and `NAME.journal`: a first line
that says which remote file they are of, then a line for each piece that was written, with its crc32.
A line is appended after its bytes, so a killed process leaves none without them; a power cut may,
and then the crc tells.  So nothing needs an fsync before the end.  (docs/adr/0008)
"""

import contextlib
import errno
import functools
import hashlib
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

import msgspec

from arriero.agent.files import begin_writing_out, disk_error, in_thread
from arriero.domain.parts import Parts

#: Room for the lines of 16 TiB.
JOURNAL_BYTES_MAX: Final = 256 * 1024 * 1024
#: No file is longer; what a line tells of beyond cannot even be asked for.
FILE_BYTES_MAX: Final = 2**60
#: A part's first so many bytes are worth a line of their own, so that a kill costs less than a part.
_LINES_A_PART: Final = 4
#: One step in a thread: long enough to be worth it, short enough to be waited for.
_STEP_BYTES: Final = 2 * 1024 * 1024
#: The kernel takes no more pieces in one write.
_PIECES_MAX: Final = 1024


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """Which remote file the bytes are of."""

    url: str = ""
    #: A strong ETag, empty if the server gave none.
    etag: str = ""
    size_bytes: int | None = None
    #: What the source says the hash must be in the end, where it says so.
    sha256: str | None = None

    @property
    def is_proof(self) -> bool:
        """Whether bytes of two answers can be told to be of the same file."""
        return bool(self.etag or self.sha256)

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


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    """The journal's first line."""

    mark: Mark
    part_bytes: int


class Partial:
    """The bytes so far, with their hash.  Make it with `await Partial.open(…)`, end it with `close()`.

    Writes come from one task, `hash_more` from one other.
    Raises INSUFFICIENT_DISK and STATE_DIR_UNUSABLE; what was written before is kept.
    """

    def __init__(self, path: Path, part_bytes: int) -> None:
        """Open nothing yet; for `open` alone."""
        self.path = path
        self.mark = Mark()
        self.parts = Parts(part_bytes)
        self._wanted_part_bytes = part_bytes
        self._journal_path = path.with_suffix(".journal")
        self._descriptor = -1
        self._journal = -1
        #: For each part with bytes that no line tells yet or that is not full: the crc so far.
        self._crcs: dict[int, int] = {}
        self._told_bytes: dict[int, int] = {}
        self._hasher = hashlib.sha256()
        self._hashed_bytes = 0
        self._hashing = threading.Lock()

    @classmethod
    async def open(
        cls,
        folder: Path,
        name: str,
        wanted: Mark,
        part_bytes: int,
        on_checked: Callable[[int], None] = lambda _: None,
    ) -> Self:
        """Open or create the part of `name`.

        What is there is kept if its mark fits `wanted`: each piece is read and compared with its crc.
        """
        partial = cls(folder / f"{name}.part", part_bytes)
        try:
            lines = await in_thread(lambda: partial._open(wanted))
            for part, (count, crc) in sorted(lines.items()):
                await in_thread(functools.partial(partial._check, part, count, crc))
                on_checked(partial.parts.done_bytes)
            await in_thread(partial._rewrite_journal)
        except OSError as error:
            await partial.close()
            raise disk_error(error, "a partial file was opened") from error
        except BaseException:
            await partial.close()
            raise
        return partial

    async def restart(self, mark: Mark) -> None:
        """Throw the bytes away; those that follow are of `mark`."""
        await self.write([], mark=mark)

    async def write(
        self,
        pieces: list[tuple[int, list[bytes]]],
        *,
        mark: Mark | None = None,
        size_bytes: int | None = None,
    ) -> None:
        """Write pieces (offset and bytes), each of which goes on where its part ends so far.

        With a `mark` what is there is thrown away before; with a size the length is noted.  All of
        it is done even if the caller is cancelled.
        """
        done: list[tuple[int, int]] = []

        def work() -> None:
            if mark is not None:
                self._restart(mark)
            if size_bytes is not None and self.mark.size_bytes is None:
                self._learn_size(size_bytes)
            self._write(pieces, done)

        try:
            await self._run(work, f"{self.path.stem} was written")
        finally:
            for offset, count in done:
                self.parts.add(offset, count)

    async def hash_more(self) -> bool:
        """Hash the next bytes of what is there without a hole; return False if there are none."""
        before_bytes = self._hashed_bytes
        if self.parts.prefix_bytes == before_bytes:
            return False
        await self._run(self._hash, f"{self.path.stem} was read back")
        return self._hashed_bytes != before_bytes

    async def finish(self) -> str:
        """Make the bytes last and return the hash of all."""
        while await self.hash_more():
            pass
        await self._run(self._finish, f"{self.path.stem} was written")
        assert self._hashed_bytes == self.parts.size_bytes, "finished before it was whole"
        return self._hasher.hexdigest()

    async def close(self) -> None:
        """Note what came of parts that are not full and close the files; safe to call twice."""
        if self._descriptor >= 0:
            await in_thread(self._close)

    async def _run(self, work: Callable[[], None], doing: str) -> None:
        try:
            await in_thread(work)
        except OSError as error:
            raise disk_error(error, doing) from error

    # --- In a thread --------------------------------------------------------------------------

    def _open(self, wanted: Mark) -> dict[int, tuple[int, int]]:
        """Open the file; return what the journal says of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Never through a link: what is written stays in the folder.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self.path, flags, 0o644)
        head, lines = self._read_journal()
        if head is None or not head.mark.is_same_file(wanted):
            os.ftruncate(self._descriptor, 0)
            return {}
        self.mark = head.mark
        self.parts = Parts(head.part_bytes, head.mark.size_bytes)
        return lines

    def _read_journal(self) -> tuple[_Head | None, dict[int, tuple[int, int]]]:
        try:
            descriptor = os.open(self._journal_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None, {}
        with open(descriptor, "rb") as file:  # noqa: PTH123  An open descriptor has no path.
            first, *rest = file.read(JOURNAL_BYTES_MAX).split(b"\n")
        try:
            head = msgspec.json.decode(first, type=_Head)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None, {}
        if not 0 < head.part_bytes <= 1 << 40:
            return None, {}
        lines: dict[int, tuple[int, int]] = {}
        for line in rest:
            fields = line.split()
            if len(fields) != 3 or not all(field.isdigit() and len(field) <= 18 for field in fields):
                continue  # The last line of a process that was killed, or zeros after a power cut.
            part, count, crc = (int(field) for field in fields)
            if 0 < count <= head.part_bytes and part * head.part_bytes <= FILE_BYTES_MAX:
                lines[part] = (count, crc)
        return head, lines

    def _check(self, part: int, count: int, crc: int) -> None:
        """Take a piece for there if its bytes are those that were written."""
        offset = part * self.parts.part_bytes
        if self.mark.size_bytes is not None and offset + count > self.mark.size_bytes:
            return
        found_crc = 0
        hasher = self._hasher.copy() if offset == self._hashed_bytes else None
        for start in range(offset, offset + count, _STEP_BYTES):
            block = os.pread(self._descriptor, min(_STEP_BYTES, offset + count - start), start)
            found_crc = zlib.crc32(block, found_crc)
            if hasher is not None:
                hasher.update(block)
        if found_crc != crc:
            return
        self._crcs[part] = crc
        self.parts.add(offset, count)
        if hasher is not None:
            self._hasher = hasher
            self._hashed_bytes = offset + count

    def _restart(self, mark: Mark) -> None:
        with self._hashing:
            os.ftruncate(self._descriptor, 0)
            self._hasher = hashlib.sha256()
            self._hashed_bytes = 0
            self._crcs.clear()
            self.mark = mark
            self.parts = Parts(self._wanted_part_bytes, mark.size_bytes)
        self._rewrite_journal()

    def _learn_size(self, size_bytes: int) -> None:
        parts = Parts(self.parts.part_bytes, size_bytes)
        for part, count in self.parts:
            parts.add(part * parts.part_bytes, count)
        self.parts = parts
        self.mark = msgspec.structs.replace(self.mark, size_bytes=size_bytes)
        self._rewrite_journal()

    def _rewrite_journal(self) -> None:
        """Write the journal anew, without lines that nothing follows from."""
        fresh = self._journal_path.with_suffix(".journal-new")
        head = msgspec.json.encode(_Head(mark=self.mark, part_bytes=self.parts.part_bytes))
        self._told_bytes = dict(self.parts)
        lines = [head, *(_line(part, count, self._crcs[part]) for part, count in self.parts)]
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        journal = os.open(fresh, flags, 0o644)
        try:
            _write_all(journal, b"\n".join([*lines, b""]))
            fresh.replace(self._journal_path)
        except BaseException:
            os.close(journal)
            raise
        if self._journal >= 0:
            os.close(self._journal)
        self._journal = journal

    def _write(self, pieces: list[tuple[int, list[bytes]]], done: list[tuple[int, int]]) -> None:
        filled: dict[int, int] = {}
        for offset, blocks in pieces:
            for part, start, views in _by_part(offset, blocks, self.parts.part_bytes):
                at = start
                while views:
                    count = os.pwritev(self._descriptor, views[:_PIECES_MAX], at)
                    crc = self._crcs.get(part, 0)
                    for view in _cut(views, count):
                        crc = zlib.crc32(view, crc)
                    self._crcs[part] = crc
                    done.append((at, count))
                    at += count
                    filled[part] = at - part * self.parts.part_bytes
        self._tell(filled)

    def _tell(self, filled: dict[int, int], least_bytes: int | None = None) -> None:
        """Append lines for parts that are full or have come a good way since their last line."""
        size = self.parts.size_bytes
        if least_bytes is None:
            least_bytes = self.parts.part_bytes // _LINES_A_PART
        lines = b""
        for part, count in filled.items():
            is_full = count == self.parts.part_bytes or part * self.parts.part_bytes + count == size
            new_bytes = count - self._told_bytes.get(part, 0)
            if new_bytes and (is_full or new_bytes >= least_bytes):
                lines += _line(part, count, self._crcs[part]) + b"\n"
                self._told_bytes[part] = count
        if lines:
            _write_all(self._journal, lines)

    def _hash(self) -> None:
        with self._hashing:  # Not while the file is begun anew.
            count = min(self.parts.prefix_bytes - self._hashed_bytes, _STEP_BYTES)
            block = os.pread(self._descriptor, count, self._hashed_bytes)
            self._hasher.update(block)
            begin_writing_out(self._descriptor, self._hashed_bytes, len(block))
            self._hashed_bytes += len(block)
        if len(block) < count:
            raise OSError(errno.EIO, "the partial file became shorter")

    def _finish(self) -> None:
        size = self.parts.size_bytes
        assert size is not None, "finished before its length was known"
        if os.fstat(self._descriptor).st_size > size:
            os.ftruncate(self._descriptor, size)  # What a cut left behind the end.
        os.fsync(self._descriptor)

    def _close(self) -> None:
        if self._journal >= 0:
            # On a full disk there may be no room for these lines; their bytes are fetched again then.
            with contextlib.suppress(OSError):
                self._tell(dict(self.parts), least_bytes=1)
            os.close(self._journal)
        os.close(self._descriptor)
        self._descriptor = self._journal = -1


def _line(part: int, count: int, crc: int) -> bytes:
    return b"%d %d %d" % (part, count, crc)


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _by_part(offset: int, blocks: list[bytes], part_bytes: int) -> list[tuple[int, int, list[memoryview]]]:
    """Return the blocks cut at the borders of parts: part, offset and views of each piece."""
    found: list[tuple[int, int, list[memoryview]]] = []
    for block in blocks:
        rest = memoryview(block)
        while rest:
            part = offset // part_bytes
            count = min(len(rest), (part + 1) * part_bytes - offset)
            if not found or found[-1][0] != part:
                found.append((part, offset, []))
            found[-1][2].append(rest[:count])
            rest = rest[count:]
            offset += count
    return found


def _cut(views: list[memoryview], count: int) -> list[memoryview]:
    """Take the first `count` bytes off `views` and return them."""
    taken: list[memoryview] = []
    while count:
        view = views.pop(0)
        if len(view) > count:
            views.insert(0, view[count:])
            view = view[:count]
        taken.append(view)
        count -= len(view)
    return taken
