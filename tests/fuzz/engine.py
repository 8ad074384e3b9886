"""What does the real engine make of broken headers that the check lets pass?

    python -m tests.fuzz.engine --count 1000 --seed 1

gives each to an engine process of its own, has it load, tokenise and generate, and tells how often
it worked, refused in words, or died; the deaths with their case and the engine's last words.
"""

import argparse
import asyncio
import logging
import re
import signal
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import Sampling
from arriero.engines import formats, registry
from arriero.engines.base import EngineRequest, EngineSpec
from tests.fuzz import gguf, gguf_cases
from tests.fuzz.gguf_cases import Base, Case

#: A hole of many gigabytes is no more to the engine than one of some megabytes.
SIZE_MAX_BYTES = 64 << 20
TIME_MAX_S = 30.0
#: A chat template may loop for ever; the engine tries it while it loads.
STALL_S = 3.0
EXPECTED = {
    ErrorCode.WORKER_START_FAILED,
    ErrorCode.LOADING_TIMEOUT,
    ErrorCode.MODEL_CORRUPTED,
    ErrorCode.WORKER_LOST,
    ErrorCode.INVALID_REQUEST,
    ErrorCode.CONTEXT_LENGTH_EXCEEDED,
    ErrorCode.BACKEND_UNAVAILABLE,
    ErrorCode.TOKEN_STREAM_ERROR,
    ErrorCode.OUT_OF_MEMORY,
}


@dataclass(slots=True)
class Verdict:
    """How one engine took one file."""

    number: int
    #: "works", an error code, or "died".
    how: str
    why: str = ""


@dataclass(slots=True)
class Tally:
    """How all of them did."""

    how: Counter[str] = field(default_factory=Counter)
    deaths: list[Verdict] = field(default_factory=list)
    #: What is no end that an owner of an engine may see.
    failures: list[Verdict] = field(default_factory=list)

    def add(self, verdict: Verdict) -> None:
        self.how[verdict.how] += 1
        if verdict.how == "died":
            self.deaths.append(verdict)
        elif verdict.how not in ("works", *map(str, EXPECTED)):
            self.failures.append(verdict)


def passing(models: list[Base], *, seed: int, first: int, count: int, folder: Path) -> list[tuple[int, Case]]:
    """Return `count` cases that the check lets pass, of those from number `first` on."""
    found: list[tuple[int, Case]] = []
    path = folder / "look.gguf"
    number = first
    while len(found) < count:
        case = gguf_cases.make(models, seed=seed, number=number)
        if case.size_bytes <= SIZE_MAX_BYTES:
            case.write(path, with_data=False)
            try:
                formats.inspect_model(path)
            except ArrieroError:
                pass
            else:
                found.append((number, case))
        number += 1
    return found


async def judge(number: int, case: Case, folder: Path) -> Verdict:
    """Give one file to one engine."""
    path = folder / f"m{number}.gguf"
    case.write(path, with_data=True)
    engine = registry.kind("llamacpp").create()
    spec = EngineSpec(
        path, slots=1, context_tokens=256, run_dir=folder / "run", threads=1, loading_stall_s=STALL_S
    )
    try:
        async with asyncio.timeout(TIME_MAX_S):
            async for _ in engine.load(spec):
                pass
            if not engine.abilities.chat:
                await engine.embed(["Count from 5 to 25."])
            else:
                sampling = Sampling(max_tokens=4, temperature=0.0)
                async for _ in engine.stream(EngineRequest("r", prompt="Count from 5", sampling=sampling)):
                    pass
                await engine.tokenize("Count from 5 to 25. Ünï <|im_start|>")
    except ArrieroError as error:
        told = error.details.get("signal")
        words = [
            line
            for line in error.details.get("log_tail", [])
            if re.search(r"assert|terminate|what|error", line, re.I)
        ]
        why = f"{error.message[:160]} {words[-2:]}"
        if told is not None:
            return Verdict(number, "died", f"{signal.Signals(told).name} {why} {case.done}")
        return Verdict(number, str(error.code), why)
    except TimeoutError:
        return Verdict(number, "hung", str(case.done))
    finally:
        await engine.unload(0.0)
        path.unlink()
    return Verdict(number, "works")


async def run(*, seed: int, first: int, count: int, folder: Path, parallel: int = 2) -> Tally:
    """Judge `count` passing cases."""
    (folder / "run").mkdir(exist_ok=True)
    waiting = passing(gguf.bases(folder), seed=seed, first=first, count=count, folder=folder)
    tally = Tally()

    async def work() -> None:
        while waiting:
            number, case = waiting.pop()
            tally.add(await judge(number, case, folder))

    async with asyncio.TaskGroup() as group:
        for index in range(parallel):
            group.create_task(work(), name=f"engine-fuzz-{index}")
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="arriero-fuzz-", dir=gguf.scratch_folder()) as name:
        tally = asyncio.run(
            run(seed=options.seed, first=options.first, count=options.count, folder=Path(name))
        )
    for verdict in (*tally.deaths, *tally.failures):
        print(f"case {verdict.number}: {verdict.how}: {verdict.why}")
    print(f"seed {options.seed}: {dict(tally.how)}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
