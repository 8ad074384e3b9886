"""Runs every test, two at a time, in three runs: a failure in one hides none in the next.

Tests that failed are run once more, alone, to tell the unsteady from the broken: the run has failed
all the same.  One summary line closes it all: `N passed, N failed, N skipped`.
"""

import re
import subprocess
import sys
from pathlib import Path

PYTEST = str(Path(sys.executable).parent / "pytest")
RUNS = [
    ["tests/unit", "tests/conformance"],
    ["tests/integration", "tests/chaos"],
    ["tests/bdd"],
]
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|error)")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


def run(arguments: list[str]) -> tuple[int, dict[str, int], list[str]]:
    """Run pytest, passing its output on; return its exit code, the counts and the names that failed."""
    process = subprocess.Popen([PYTEST, "-q", *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    code = process.wait()
    last = next((line for line in reversed(lines) if COUNTS.search(line)), "")
    counts = {what: int(number) for number, what in COUNTS.findall(last)}
    return code, counts, FAILED.findall("".join(lines))


def main() -> int:
    totals = {"passed": 0, "failed": 0, "skipped": 0}
    worst = 0
    unsteady: list[str] = []
    for folders in RUNS:
        # What takes longest begins first (tests/conftest.py); whoever is done takes over half of what is left.
        distributed = ["-n", "2", "--dist", "worksteal", "--durations=20"]
        code, counts, names = run([*distributed, *folders, *sys.argv[1:]])
        failed = counts.get("failed", 0) + counts.get("error", 0)
        totals["passed"] += counts.get("passed", 0)
        totals["skipped"] += counts.get("skipped", 0)
        if code == 1 and failed:
            print(f"once more, alone: {failed} that failed")
            _, again, still = run(["--last-failed", "--last-failed-no-failures=none", *folders])
            if sum(again.values()) < failed:
                print("not all of them were run to their end")
            else:
                unsteady += [name for name in names if name not in still]
        totals["failed"] += failed
        worst = max(worst, code)
    for name in unsteady:
        print(f"unsteady, failed beside others and passed alone: {name}")
    print(f"{totals['passed']} passed, {totals['failed']} failed, {totals['skipped']} skipped")
    return worst


if __name__ == "__main__":
    sys.exit(main())
