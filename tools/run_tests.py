"""Runs every test, two at a time, in three runs: a failure in one hides none in the next.

One summary line closes the run: `N passed, N failed, N skipped`.
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


def main() -> int:
    totals = {"passed": 0, "failed": 0, "skipped": 0}
    worst = 0
    for arguments in RUNS:
        command = [PYTEST, "-q", "-n", "2", "--durations=10", *arguments, *sys.argv[1:]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
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
