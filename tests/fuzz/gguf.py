"""Does the check of GGUF headers hold against many broken ones?

    python -m tests.fuzz.gguf --count 200000 --seed 1

checks that each is believed or refused in words (MODEL_CORRUPTED, INVALID_MODEL_PATH), in under a
second of CPU and 64 MB, and tells how many passed and what took longest.
"""

import argparse
import json
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from arriero import demo_model
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines import formats
from arriero.testing import gguf_writer
from tests.fuzz import gguf_cases
from tests.fuzz.gguf_cases import Base, Case

CPU_MAX_S = 1.0
MEMORY_MAX_BYTES = 64 * 1000 * 1000
#: Tracing memory makes a check three times as slow: so one case of so many is traced.
TRACE_EVERY = 20
REFUSALS = {ErrorCode.MODEL_CORRUPTED, ErrorCode.INVALID_MODEL_PATH}


@dataclass(slots=True)
class Outcome:
    """What became of the cases."""

    tried: int = 0
    passed: list[int] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest: int = 0
    most_bytes: int = 0
    #: Number of the case, and what was wrong with the check.
    failures: list[tuple[int, str]] = field(default_factory=list)


def bases(folder: Path) -> list[Base]:
    """Return a random Llama and the demo model, taken apart."""
    llama = gguf_writer.write_llama(folder / "base.gguf").read_bytes()
    return [
        gguf_cases.parse(llama),
        gguf_cases.parse(llama),
        gguf_cases.parse(demo_model.path().read_bytes()),
    ]


def scratch_folder() -> str | None:
    """Return where files cost no disk, None for the usual place."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def run(*, seed: int, first: int, count: int, folder: Path) -> Outcome:
    """Check `count` cases from number `first` on."""
    models = bases(folder)
    path = folder / "case.gguf"
    outcome = Outcome()
    for number in range(first, first + count):
        case = gguf_cases.make(models, seed=seed, number=number)
        case.write(path, with_data=False)
        _check(case, number, path, outcome)
    return outcome


def _check(case: Case, number: int, path: Path, outcome: Outcome) -> None:
    outcome.tried += 1
    is_traced = number % TRACE_EVERY == 0
    if is_traced:
        tracemalloc.start()
    start = time.thread_time()
    try:
        facts = formats.inspect_model(path)
    except ArrieroError as error:
        outcome.refused[error.code] += 1
        if error.code not in REFUSALS:
            outcome.failures.append((number, f"{error.code}: {error.message}"))
        json.dumps(error.details).encode()
        if len(error.message) > 600 or not error.message.isprintable():
            outcome.failures.append((number, f"cannot be shown: {error.message[:900]!r}"))
    except Exception as error:  # noqa: BLE001  Any other exception is the finding.
        outcome.failures.append((number, f"{type(error).__name__}: {error} ({case.done})"))
    else:
        outcome.passed.append(number)
        if not (1 <= facts.block_count <= 512 and facts.file_bytes == case.size_bytes):
            outcome.failures.append((number, f"facts that cannot be: {facts}"))
    spent = time.thread_time() - start
    if is_traced:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        outcome.most_bytes = max(outcome.most_bytes, most)
        if most > MEMORY_MAX_BYTES:
            outcome.failures.append((number, f"took {most} bytes"))
    elif spent > outcome.slowest_s:
        outcome.slowest_s, outcome.slowest = spent, number
    if spent > CPU_MAX_S:
        outcome.failures.append((number, f"took {spent:.2f} s of CPU"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to make one again")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="arriero-fuzz-", dir=scratch_folder()) as name:
        outcome = run(seed=options.seed, first=options.first, count=options.count, folder=Path(name))
    for number, what in outcome.failures[:50]:
        print(f"case {number}: {what}")
    print(
        f"seed {options.seed}: {outcome.tried} headers in {time.monotonic() - start:.0f} s, {len(outcome.passed)} passed, "
        f"refused {dict(outcome.refused)}, slowest {outcome.slowest_s * 1000:.1f} ms of CPU (case {outcome.slowest}), "
        f"most memory {outcome.most_bytes / 1e6:.1f} MB, {len(outcome.failures)} failures"
    )
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    sys.exit(main())
