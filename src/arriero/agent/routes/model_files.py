"""How is a model's file sent to another machine of the pool, whole or in ranges?"""

import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from litestar.types import ASGIApp

from arriero.agent.catalog import CatalogEntry
from arriero.agent.files import in_thread
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.runtime.asgi import Receive, Scope, Send, error_bytes

BLOCK_BYTES: Final = 1024 * 1024
_RANGE: Final = re.compile(r"bytes=(?:(\d{1,18})-(\d{1,18})?|-(\d{1,18}))")


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
            return cast("ASGIApp", _FileAnswer(path, file.size_bytes, etag, wanted))
    raise ArrieroError(ErrorCode.NOT_FOUND, f"{entry.record.model_id} has no file {name[:80]!r}")


class _FileAnswer:
    """An ASGI application that sends a part of a file."""

    def __init__(self, path: Path, size_bytes: int, etag: str, wanted: str | None) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._etag = etag
        self._wanted = wanted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; ends early when the client is gone."""
        try:
            part = parse_range(self._wanted, self._size_bytes)
        except ValueError:
            await self._refuse(scope, send)
            return
        try:
            descriptor = await in_thread(lambda: os.open(self._path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise ArrieroError(ErrorCode.MODEL_CORRUPTED, "the file cannot be read any more") from error
        try:
            start, end = part or (0, self._size_bytes)
            headers = [(b"content-length", str(end - start).encode())]
            if part is not None:
                headers.append((b"content-range", f"bytes {start}-{end - 1}/{self._size_bytes}".encode()))
            await self._begin(send, 200 if part is None else 206, headers)
            await _send_part(send, descriptor, start, end)
        finally:
            os.close(descriptor)

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
    offset = start
    while offset < end:
        size = min(BLOCK_BYTES, end - offset)
        block = await in_thread(functools.partial(os.pread, descriptor, size, offset))
        if not block:
            # The length is promised: a connection that breaks is the only honest end.
            raise RuntimeError("a model's file became shorter while it was sent")
        offset += len(block)
        await send({"type": "http.response.body", "body": block, "more_body": offset < end})
