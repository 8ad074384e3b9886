"""A load of token streams from bare sockets: cheap enough not to be what is measured."""

import asyncio
import json
import statistics
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """Where streams are asked for; a unix socket where `socket_path` is given."""

    name: str
    host: str = ""
    port: int = 0
    socket_path: str = ""
    token: str = ""
    model: str = "demo"


@dataclass(frozen=True)
class Round:
    """What one round of streams brought."""

    tokens: int
    seconds: float
    first_token_ms: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def request_bytes(target: Target, prompt: str, tokens_max: int) -> bytes:
    body = json.dumps(
        {"model": target.model, "prompt": prompt, "max_tokens": tokens_max, "temperature": 0, "stream": True}
    ).encode()
    auth = f"Authorization: Bearer {target.token}\r\n" if target.token else ""
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n{auth}Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def connect(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if target.socket_path:
        return await asyncio.open_unix_connection(target.socket_path)
    return await asyncio.open_connection(target.host, target.port)


async def one_stream(target: Target, prompt: str, tokens_max: int) -> tuple[int, float]:
    """Read a stream to `[DONE]`; return the number of text chunks and the seconds to the first."""
    start = time.perf_counter()
    reader, writer = await connect(target)
    first = 0.0
    chunks = 0
    tail = b""
    try:
        writer.write(request_bytes(target, prompt, tokens_max))
        while chunk := await asyncio.wait_for(reader.read(65536), 60):
            found = (tail + chunk).count(b'"text":"') - tail.count(b'"text":"')
            if found and not first:
                first = time.perf_counter() - start
            chunks += found
            tail = (tail + chunk)[-16:]
            if b"data: [DONE]" in tail + chunk:
                break
        else:
            raise RuntimeError(f"{target.name}: the stream ended without [DONE]: {tail!r}")
    finally:
        writer.close()
    return chunks, first


async def one_round(target: Target, *, streams: int, prompt: str, tokens_max: int) -> Round:
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one_stream(target, prompt, tokens_max)) for _ in range(streams)]
    seconds = time.perf_counter() - start
    results = [task.result() for task in tasks]
    return Round(sum(n for n, _ in results), seconds, 1000 * statistics.median(first for _, first in results))
