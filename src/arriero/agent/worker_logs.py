"""How are workers' logs kept few, and read while they grow?

A worker writes to its log by itself, so that it goes on when its agent dies (see `runtime.log_files`).
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Collection
from pathlib import Path
from typing import Final

from arriero.runtime import processes
from arriero.runtime.asgi import Receive, Scope, Send

FOLLOW_LOOK_S: Final = 0.2
READ_BYTES: Final = 65_536
#: Logs of ended workers that are kept, the newest.
ENDED_LOGS_MAX: Final = 50


def prune(folder: Path, live: Collection[Path], *, kept_max: int = ENDED_LOGS_MAX) -> int:
    """Remove the logs of the workers that ended longest ago; returns how many."""
    try:
        ended = [path for path in folder.glob("w-*.log") if path not in live]
        ended.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return 0
    for path in ended[kept_max:]:
        path.unlink(missing_ok=True)
        path.with_suffix(".log.1").unlink(missing_ok=True)
    return len(ended[kept_max:])


async def follow(path: Path, ended: asyncio.Event, *, lines: int) -> AsyncGenerator[bytes, None]:
    """Yield the last `lines` of a log, then what is written to it, until `ended` and read to its end."""
    shown, offset = await asyncio.to_thread(_start, path, lines)
    if shown:
        yield shown
    while True:
        is_last = ended.is_set()
        block, offset = await asyncio.to_thread(_read_from, path, offset)
        if block:
            yield block
        elif is_last:
            return
        else:
            await _either(ended, FOLLOW_LOOK_S)


async def last_lines(path: Path, lines: int) -> AsyncGenerator[bytes, None]:
    """Yield the last lines of a log, in one piece."""
    yield (await asyncio.to_thread(_start, path, lines))[0]


def _start(path: Path, lines: int) -> tuple[bytes, int]:
    """Return the last lines, and where the next byte will be."""
    try:
        size = path.stat().st_size
    except OSError:
        return b"", 0
    found = processes.tail(path, lines, bytes_max=max(READ_BYTES, lines * 1024)) if lines else []
    return "".join(f"{line}\n" for line in found).encode(), size


def _read_from(path: Path, offset: int) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < offset:
                offset = 0  # It was rotated.
            file.seek(offset)
            block = file.read(READ_BYTES)
    except OSError:
        return b"", offset
    return block, offset + len(block)


async def _either(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return


class TextStream:
    """An ASGI application that sends plain text as it comes, until it ends or the client is gone."""

    def __init__(self, blocks: AsyncGenerator[bytes, None], stop: asyncio.Event) -> None:
        self._blocks = blocks
        self._stop = stop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the text."""
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"cache-control", b"no-store")]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async with asyncio.TaskGroup() as group:
                ends = {
                    group.create_task(self._pump(send), name="log-pump"),
                    group.create_task(_disconnected(receive), name="log-watch"),
                    group.create_task(_wait(self._stop), name="log-stop"),
                }
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for task in ends:
                    task.cancel()
        finally:
            await self._blocks.aclose()
        await send({"type": "http.response.body", "body": b""})

    async def _pump(self, send: Send) -> None:
        async for block in self._blocks:
            await send({"type": "http.response.body", "body": block, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _wait(event: asyncio.Event) -> None:
    await event.wait()
