"""How are large files read, hashed and measured without blocking the event loop?"""

import asyncio
import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from arriero.contracts.errors import ArrieroError, ErrorCode

T = TypeVar("T")

#: One read in a thread: short enough to be waited for when its caller is cancelled.
READ_BYTES: Final = 8 * 1024 * 1024
_SYNC_FILE_RANGE_WRITE: Final = 2
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


async def in_thread(work: Callable[[], T]) -> T:
    """Run short blocking `work` in a thread; a cancelled caller still waits until it is done.

    So the file that `work` uses may be closed right afterwards.
    """
    running = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            try:
                await asyncio.wait({running})
            except asyncio.CancelledError:
                continue  # Cancelled again; we raise as soon as the thread lets go of the file.
        raise


def is_text(path: Path) -> bool:
    """Return whether a path can be written down: in the catalog, in a message, in a worker's order."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def disk_error(error: OSError, doing: str) -> ArrieroError:
    """Return `error` of our own folder as an expected failure: INSUFFICIENT_DISK or STATE_DIR_UNUSABLE."""
    if error.errno in _FULL:
        return ArrieroError(ErrorCode.INSUFFICIENT_DISK, f"the disk became full while {doing}")
    return ArrieroError(
        ErrorCode.STATE_DIR_UNUSABLE,
        f"the models folder failed while {doing}: {os.strerror(error.errno or 0)}",
    )


def mib(size_bytes: int) -> int:
    """Return MiB, rounded up."""
    return -(-size_bytes // (1024 * 1024))


def size_text(size_bytes: int) -> str:
    """Return a size as people read it."""
    if size_bytes < 1024 * 1024 * 1024:
        return f"{size_bytes / (1024 * 1024):.1f} MiB"
    return f"{size_bytes / (1024 * 1024 * 1024):.1f} GiB"


def no_room(needed_bytes: int, free_bytes: int, others_bytes: int = 0) -> ArrieroError:
    """Return INSUFFICIENT_DISK; `others_bytes` of what is free are spoken for by other downloads."""
    available_bytes = max(free_bytes - others_bytes, 0)
    short_bytes = max(needed_bytes - available_bytes, 0)
    others = f", {size_text(others_bytes)} of it for other downloads" if others_bytes else ""
    return ArrieroError(
        ErrorCode.INSUFFICIENT_DISK,
        f"the download needs {size_text(needed_bytes)} more, the disk has {size_text(free_bytes)}{others}: "
        f"{size_text(short_bytes)} too little",
        required_mb=mib(needed_bytes),
        available_mb=available_bytes // (1024 * 1024),
        shortfall_mb=mib(short_bytes),
    )


async def free_mb(folder: Path) -> int:
    """Return the room on the disk of `folder` in MiB; 0 if it cannot be looked at."""
    try:
        return (await in_thread(lambda: shutil.disk_usage(folder))).free // (1024 * 1024)
    except OSError:
        return 0


def allocated_bytes(path: Path) -> int:
    """Return what a file takes on the disk: a sparse one takes nothing for its holes."""
    return path.stat().st_blocks * 512


async def sha256_of(path: Path, on_read: Callable[[int], None] | None = None) -> str:
    """Return the hash of a whole file; `on_read` is told the bytes read so far.

    Raises OSError as reading does.
    """
    hasher = hashlib.sha256()
    total = 0
    file = await in_thread(lambda: path.open("rb", buffering=0))
    try:
        while True:
            count = await in_thread(lambda: _hash_next(file.read, hasher.update))
            if not count:
                return hasher.hexdigest()
            total += count
            if on_read is not None:
                on_read(total)
    finally:
        file.close()


def _hash_next(read: Callable[[int], bytes | None], update: Callable[[bytes], None]) -> int:
    block = read(READ_BYTES) or b""
    update(block)
    return len(block)


def begin_writing_out(descriptor: int, offset: int, count: int) -> None:
    """Have the kernel begin to bring a piece of a file to the disk, so that a later fsync has little to do.

    Promises nothing and drops nothing from the page cache.  Does not wait, but for a full queue.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).sync_file_range(
            descriptor, ctypes.c_int64(offset), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE
        )


def sync_folder(folder: Path) -> None:
    """Make what was renamed or created in `folder` last over a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
