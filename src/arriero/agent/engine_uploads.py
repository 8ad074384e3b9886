"""How does a wheel come to a machine that cannot fetch it?  Piece by piece, each a small request.

So it passes every hop that passes requests at all, holds no more than a piece in memory on its way,
and goes on after a broken connection where it was.
"""

import asyncio
import errno
import shutil
from pathlib import Path
from typing import Final

from arriero.agent.engine_builds import NEW_PREFIX, folder_of
from arriero.agent.engine_wheel import WHEEL_BYTES_MAX, check_name
from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.records import UploadRecord
from arriero.domain.engine_builds import Platform

_FOLDER_NAME: Final = f"{NEW_PREFIX}uploads"


class Uploads:
    """The files that come in; those that were not used go with the agent's next start."""

    def __init__(self, home: Path, platform: Platform, version: str) -> None:
        self._folder = folder_of(home) / _FOLDER_NAME
        self._platform = platform
        self._version = version
        self._turn = asyncio.Lock()

    async def write(self, name: str, offset: int, content: bytes) -> UploadRecord:
        """Put a piece where it belongs: at the end of what is there, or at 0 to begin anew.

        Raises what `check_name` raises; INVALID_REQUEST (details: size_bytes) for another place,
        REQUEST_TOO_LARGE, INSUFFICIENT_DISK, STATE_DIR_UNUSABLE.
        """
        check_name(name, self._platform, self._version)
        if offset + len(content) > WHEEL_BYTES_MAX:
            fail(
                ErrorCode.REQUEST_TOO_LARGE,
                f"a wheel of more than {WHEEL_BYTES_MAX} bytes is not taken",
                limit_bytes=WHEEL_BYTES_MAX,
            )
        async with self._turn:
            size = await asyncio.to_thread(_append, self._folder, name, offset, content)
        return UploadRecord(name=name, size_bytes=size)

    async def size_of(self, name: str) -> UploadRecord:
        """Return how much of a file is there; 0 where nothing is.  Raises what `check_name` raises."""
        check_name(name, self._platform, self._version)
        return UploadRecord(name=name, size_bytes=await asyncio.to_thread(_size, self._folder / name))

    async def take(self, name: str, target: Path) -> None:
        """Move a file to `target`: it is no upload any more.  Raises INVALID_REQUEST if there is none."""
        check_name(name, self._platform, self._version)
        async with self._turn:
            try:
                await asyncio.to_thread((self._folder / name).rename, target)
            except FileNotFoundError as error:
                raise ArrieroError(
                    ErrorCode.INVALID_REQUEST, f"{name} was not uploaded", wheel=name
                ) from error

    async def clear(self) -> None:
        """Remove what came in."""
        async with self._turn:
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)


def _append(folder: Path, name: str, offset: int, content: bytes) -> int:
    path = folder / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        size = _size(path)
        if offset not in (0, size):
            fail(
                ErrorCode.INVALID_REQUEST,
                f"{name} has {size} bytes, a piece for {offset} does not fit",
                param="offset",
                size_bytes=size,
            )
        if offset == 0:
            # One at a time: of a file that was given up nothing may fill the disk.
            shutil.rmtree(folder)
            folder.mkdir(mode=0o700)
        with path.open("ab") as file:
            file.write(content)
        return offset + len(content)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        code = ErrorCode.INSUFFICIENT_DISK if full else ErrorCode.STATE_DIR_UNUSABLE
        raise ArrieroError(code, f"{name} cannot be written: {error.strerror}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
