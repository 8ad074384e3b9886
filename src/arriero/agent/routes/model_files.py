"""How is a model's file sent to another machine of the pool, whole or in ranges?"""

import asyncio
import contextlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from litestar.types import ASGIApp

from arriero.agent.catalog import CatalogEntry
from arriero.agent.files import in_thread
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.runtime.asgi import Receive, Scope, Send, error_bytes

#: Measured: smaller blocks cost twice the CPU, larger ones bring nothing.
BLOCK_BYTES: Final = 1024 * 1024
_RANGE: Final = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{1,18})?|-([0-9]{1,18}))", re.IGNORECASE)


def parse_range(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """Return the first byte and the one after the last that a Range header asks for.

    None for the whole file: no header, several ranges, or a form nobody knows.  Raises ValueError
    if the range has no byte of the file.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None:
        return None
    if match[3] is not None:
        start, end = max(size_bytes - int(match[3]), 0), size_bytes
    else:
        start = int(match[1])
        end = size_bytes if match[2] is None else min(int(match[2]) + 1, size_bytes)
        if match[2] is not None and int(match[2]) < start:
            return None
    if start >= end:
        raise ValueError(f"no byte of {size_bytes}")
    return start, end


def file_answer(entry: CatalogEntry, name: str, headers: Mapping[str, str]) -> ASGIApp:
    """Return what sends one file of a model.  Raises NOT_FOUND unless `name` is one of its files."""
    for file, path in zip(entry.files, entry.paths, strict=True):
        if file.name == name:
            etag = f'"{file.sha256}"'
            wanted = headers.get("range")
            if headers.get("if-range") not in (None, etag):
                wanted = None
            is_ours = not entry.record.is_external
            return cast("ASGIApp", _FileAnswer(path, file.size_bytes, etag, wanted, is_ours=is_ours))
    raise ArrieroError(ErrorCode.NOT_FOUND, f"{entry.record.model_id} has no file {name[:80]!r}")


class _FileAnswer:
    """An ASGI application that sends a part of a file."""

    def __init__(self, path: Path, size_bytes: int, etag: str, wanted: str | None, *, is_ours: bool) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._etag = etag
        self._wanted = wanted
        # No link is followed out of our own folder; another program's file may be one.
        self._flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_NOFOLLOW if is_ours else 0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; ends early when the client is gone."""
        try:
            part = parse_range(self._wanted, self._size_bytes)
        except ValueError:
            await self._refuse(scope, send)
            return
        descriptor = await in_thread(self._open)
        try:
            start, end = part or (0, self._size_bytes)
            headers = [(b"content-length", str(end - start).encode())]
            if part is not None:
                headers.append((b"content-range", f"bytes {start}-{end - 1}/{self._size_bytes}".encode()))
            await self._begin(send, 200 if part is None else 206, headers)
            await _send_part(send, descriptor, start, end)
        finally:
            os.close(descriptor)

    def _open(self) -> int:
        """Return the open file.  Raises MODEL_CORRUPTED, before the first byte, if it is not as it was."""
        try:
            descriptor = os.open(self._path, self._flags)
        except OSError as error:
            raise ArrieroError(ErrorCode.MODEL_CORRUPTED, "the file cannot be read any more") from error
        seen = os.fstat(descriptor)
        if not stat.S_ISREG(seen.st_mode) or seen.st_size != self._size_bytes:
            os.close(descriptor)
            raise ArrieroError(ErrorCode.MODEL_CORRUPTED, "the file is another one than was verified")
        return descriptor

    async def _refuse(self, scope: Scope, send: Send) -> None:
        error = ArrieroError(
            ErrorCode.INVALID_REQUEST,
            f"the range has no byte of {self._size_bytes}",
            param="Range",
        )
        body = error_bytes(error, path=scope["path"])
        headers = [
            (b"content-range", f"bytes */{self._size_bytes}".encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await self._begin(send, 416, headers, b"application/json")
        await send({"type": "http.response.body", "body": body})

    async def _begin(
        self,
        send: Send,
        status: int,
        headers: list[tuple[bytes, bytes]],
        kind: bytes = b"application/octet-stream",
    ) -> None:
        common: list[tuple[bytes, Any]] = [
            (b"content-type", kind),
            (b"accept-ranges", b"bytes"),
            (b"etag", self._etag.encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": [*common, *headers]})


async def _send_part(send: Send, descriptor: int, start: int, end: int) -> None:
    """Send a part of a file; the next block is read while one is sent."""
    loop = asyncio.get_running_loop()

    def read(offset: int) -> asyncio.Future[bytes]:
        size = min(BLOCK_BYTES, end - offset)
        return loop.run_in_executor(None, os.pread, descriptor, size, offset)

    offset = start
    coming = read(offset)
    try:
        while offset < end:
            block = await asyncio.shield(coming)
            if not block:
                # The length is promised: a connection that breaks is the only honest end.
                raise RuntimeError("a model's file became shorter while it was sent")
            offset += len(block)
            if offset < end:
                coming = read(offset)
            await send({"type": "http.response.body", "body": block, "more_body": offset < end})
    finally:
        # The file is closed next: whoever still reads it is waited for, also when cancelled again.
        while not coming.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({coming})
        coming.exception()  # Nobody else asks for it where the client is gone.
