"""A process that owns an engine, for tests that kill it: `engine_owner.py MODEL RUN_DIR [CGROUP]`.

Prints one JSON line an event of loading (the first with the engine's pid), then what it failed
with, or waits to be killed.
"""

import asyncio
import json
import sys
from pathlib import Path

import psutil

from arriero.contracts.errors import ArrieroError
from arriero.engines import registry
from arriero.engines.base import EngineSpec


async def own(model: Path, run_dir: Path) -> None:
    engine = registry.kind("llamacpp").create()
    try:
        async for event in engine.load(EngineSpec(model, slots=1, context_tokens=256, run_dir=run_dir)):
            pids = [child.pid for child in psutil.Process().children()]
            print(json.dumps({"event": type(event).__name__, "pids": pids}), flush=True)
    except ArrieroError as error:
        print(json.dumps({"code": error.code, "details": error.details}), flush=True)
        await engine.unload(0.0)
        return
    await asyncio.Event().wait()


if __name__ == "__main__":
    if len(sys.argv) > 3:
        Path(sys.argv[3], "cgroup.procs").write_text("0")
    asyncio.run(own(Path(sys.argv[1]), Path(sys.argv[2])))
