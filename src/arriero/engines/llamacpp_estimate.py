"""How much memory will loading take?

llama.cpp itself reckons it, without reading weights, and prints a table; a short-lived child is
started for that and killed once the table is out.  Where no table comes, the file's size and the
cache's arithmetic have to do.
"""

import asyncio
import contextlib
import os
import re
import tempfile
from pathlib import Path
from typing import Final

from arriero.engines.base import EngineSpec, Estimate
from arriero.engines.child import EngineChild
from arriero.engines.gguf import GgufHeader
from arriero.engines.llamacpp_params import (
    SOCKET_NAME,
    batch_of,
    context_of,
    environment_of,
    line_of,
    options_of,
)

TIME_MAX_S: Final = 10.0
#: Python, the library and what malloc keeps: measured 27–45 MiB beyond llama.cpp's own table.
PROCESS_MB: Final = 48
_ROW: Final = re.compile(r"\|\s+- (?P<name>[^|]*?\S)\s*\|(?P<numbers>[^|]*)\|")
_HEAD: Final = "memory breakdown"
_GUESSED_COMPUTE_MB: Final = 128


class MemoryTable:
    """Reads the table from log lines: `| - Host | total = model + context + compute |`."""

    def __init__(self) -> None:
        self.host_mb: int | None = None
        self.device_mb = 0
        self.is_complete = False
        self._is_inside = False

    def take(self, line: str) -> None:
        """Take one line of the log; lines outside of the table are passed over."""
        if self.is_complete:
            return
        match = _ROW.search(line)
        if match is None:
            if self._is_inside and self.host_mb is not None:
                self.is_complete = True
            self._is_inside = _HEAD in line
            return
        if not self._is_inside:
            return
        # A device's row has its own use in parentheses: total = free + (self = …) + unaccounted.
        numbers = match["numbers"]
        found = re.search(r"\d+", numbers.partition("(")[2] or numbers)
        if found is None:
            return
        if match["name"] == "Host":
            self.host_mb = int(found.group())
        else:
            self.device_mb += int(found.group())


async def estimate(spec: EngineSpec, header: GgufHeader, *, threads: int) -> Estimate:
    """Return what loading will take.

    Raises what `line_of` raises; an engine that tells nothing is no error.
    """
    context = context_of(spec, header)
    table = await _ask(spec, header, threads=threads)
    cache_mb = options_of(spec).cache_ram_mib
    if table.host_mb is None:
        return _reckoned(spec, header, context, cache_mb)
    return Estimate(table.host_mb + PROCESS_MB + cache_mb, table.device_mb, context)


async def _ask(spec: EngineSpec, header: GgufHeader, *, threads: int) -> MemoryTable:
    table = MemoryTable()
    seen = asyncio.Event()

    def take(line: str) -> None:
        table.take(line)
        if table.is_complete:
            seen.set()

    with tempfile.TemporaryDirectory(prefix="arriero-") as folder:
        line = line_of(spec, header, Path(folder) / SOCKET_NAME, threads=threads, is_estimate=True)
        child = await EngineChild.start(
            "arriero.engines.llamacpp_child",
            line,
            env=environment_of(spec),
            on_line=lambda _: None,
            on_log=take,
            hidden=(f"{spec.model_path.parent}{os.sep}",),
        )
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TIME_MAX_S), asyncio.TaskGroup() as group:
                    waits = [
                        group.create_task(seen.wait(), name="estimate-table"),
                        group.create_task(child.wait_ended(TIME_MAX_S), name="estimate-end"),
                    ]
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    for wait in waits:
                        wait.cancel()
        finally:
            child.kill()
            await child.stop(0.0)
    return table


def _reckoned(spec: EngineSpec, header: GgufHeader, context: int, cache_mb: int) -> Estimate:
    """Return the weights, a cache of 16-bit keys and values, and a guess for the rest."""
    per_token = 2 * header.heads_kv_sum * (header.key_length + header.value_length)
    cache = spec.slots * context * per_token
    batch = batch_of(spec, header, options_of(spec))
    compute = batch * 4 * max(header.facts.vocabulary_size, 4 * header.embedding_length)
    model_mb = (header.facts.file_bytes + cache + compute) // (1 << 20) + _GUESSED_COMPUTE_MB
    if spec.backend == "cpu":
        return Estimate(model_mb + PROCESS_MB + cache_mb, 0, context)
    return Estimate(_GUESSED_COMPUTE_MB + PROCESS_MB + cache_mb, model_mb, context)
