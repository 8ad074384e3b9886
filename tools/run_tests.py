"""Runs every test: the quick ones and the scenarios two at a time, the rest one after another.

One summary line closes the run: `N passed, N failed, N skipped`.
"""

import re
import subprocess
import sys
from pathlib import Path

PYTEST = str(Path(sys.executable).parent / "pytest")
RUNS = [
    ["-n", "2", "tests/unit", "tests/conformance"],
    ["tests/integration", "tests/chaos"],
    ["-n", "2", "tests/bdd"],
]
COUNTS = re.compile(r"(\d+) (passed|failed|skipped|error)")


def main() -> int:
    totals = {"passed": 0, "failed": 0, "skipped": 0}
    worst = 0
    for arguments in RUNS:
        process = subprocess.Popen(
            [PYTEST, "-q", "-n", "2", "--durations=10", *arguments, *sys.argv[1:]], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line if COUNTS.search(line) else last
        worst = max(worst, process.wait())
        for number, what in COUNTS.findall(last):
            totals["failed" if what == "error" else what] += int(number)
    print(f"{totals['passed']} passed, {totals['failed']} failed, {totals['skipped']} skipped")
    return worst


if __name__ == "__main__":
    sys.exit(main())
