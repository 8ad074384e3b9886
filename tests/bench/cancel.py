"""How soon is a slot free again when a client goes away?  In milliseconds, seen at the worker."""

import asyncio
import json
import statistics
import time

from tests.bench.load import Target, connect, request_bytes

RUNS = 9
LONG_PROMPT = "Count from 1 to 9. " * 60


async def slots_busy(worker: Target) -> int:
    reader, writer = await connect(worker)
    try:
        head = f"GET /v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {worker.token}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()
    return int(json.loads(answer.partition(b"\r\n\r\n")[2])["slots_busy"])


async def until_busy(worker: Target, busy: int) -> None:
    async with asyncio.timeout(30):
        while await slots_busy(worker) != busy:
            pass


async def one(target: Target, worker: Target, *, is_streaming: bool) -> float:
    await until_busy(worker, 0)
    reader, writer = await connect(target)
    prompt = "Once upon a time" if is_streaming else LONG_PROMPT
    writer.write(request_bytes(target, prompt, 800))
    if is_streaming:
        await asyncio.wait_for(reader.readuntil(b'"text":"'), 30)
    else:
        await until_busy(worker, 1)
    start = time.perf_counter()
    writer.transport.abort()
    await until_busy(worker, 0)
    return 1000 * (time.perf_counter() - start)


async def measure(targets: dict[str, Target]) -> dict[str, float]:
    """Return the median for each target, while tokens stream and while the prompt is computed."""
    worker = targets["worker"]
    found = {}
    for name in ("worker", "orchestrator"):
        for is_streaming, what in ((True, "streaming"), (False, "prompt")):
            times = [await one(targets[name], worker, is_streaming=is_streaming) for _ in range(RUNS)]
            found[f"{name}_{what}_ms"] = round(statistics.median(times), 1)
    return found
