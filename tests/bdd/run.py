"""Runs the behaviour suite: `python -m tests.bdd.run [--update-baseline] [pytest options]`.

Prints how many scenarios passed and failed, the pass rate, and what changed since the last run and
since the committed baseline; writes reports/bdd.html and a line to reports/bdd-history.jsonl.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.bdd.page import page

ROOT = Path(__file__).resolve().parents[2]
REPORTS = ROOT / "reports"
RECORD = REPORTS / "bdd.json"
HISTORY = REPORTS / "bdd-history.jsonl"
HTML = REPORTS / "bdd.html"
#: Tests of the suite itself, not counted as scenarios.
CHECKS = "test_coverage.py"
BASELINE = Path(__file__).with_name("baseline.json")


@dataclass(frozen=True)
class Run:
    """One run of the suite."""

    at: str
    commit: str
    passed: int
    failed: int
    skipped: int
    duration_s: float
    failing: list[str]

    @property
    def rate(self) -> float:
        """Passed of those that ran, in percent."""
        ran = self.passed + self.failed
        return 100.0 * self.passed / ran if ran else 0.0


def main(arguments: list[str]) -> int:
    is_new_baseline = "--update-baseline" in arguments
    given = [argument for argument in arguments if argument != "--update-baseline"]
    is_whole = not any(not argument.startswith("-") for argument in given) and "-k" not in given
    before = last_run(HISTORY)
    began_s = time.monotonic()
    code = run_scenarios(given)
    recorded: list[dict[str, Any]] = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else []
    checks = [test for test in recorded if CHECKS in test["id"]]
    scenarios = [test for test in recorded if CHECKS not in test["id"]]
    run = summary(scenarios, time.monotonic() - began_s)
    baseline = read_run(json.loads(BASELINE.read_text("utf-8"))) if BASELINE.exists() else None
    changes = [*tell("last run", before, run), *tell("baseline", baseline, run)]
    lines = [
        f"{run.passed} scenarios passed, {run.failed} failed, {run.skipped} skipped: "
        f"pass rate {run.rate:.1f} % in {run.duration_s:.0f} s",
        *changes,
        *(
            f"a check of the suite itself failed: {test['id']}"
            for test in checks
            if test["outcome"] == "failed"
        ),
    ]
    HTML.write_text(
        page([*scenarios, *(test for test in checks if test["outcome"] == "failed")], run.rate, lines),
        "utf-8",
    )
    if is_whole:
        # A part of the suite says nothing about the next whole run.
        with HISTORY.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")
    if is_new_baseline:
        BASELINE.write_text(json.dumps(asdict(run), indent=2) + "\n", "utf-8")
    print("\n".join(lines))
    print(f"report: {HTML.relative_to(ROOT)}")
    return code if scenarios else code or 1


def run_scenarios(given: list[str]) -> int:
    """Run pytest and return its exit code."""
    REPORTS.mkdir(exist_ok=True)
    RECORD.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        "2",
        "-p",
        "tests.bdd.recorder",
        f"--bdd-record={RECORD}",
    ]
    paths = [] if any("tests/bdd" in argument for argument in given) else ["tests/bdd"]
    return subprocess.run([*command, *paths, *given], cwd=ROOT).returncode


def summary(scenarios: list[dict[str, Any]], duration_s: float) -> Run:
    counts = {
        what: sum(1 for s in scenarios if s["outcome"] == what) for what in ("passed", "failed", "skipped")
    }
    return Run(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit(),
        duration_s=round(duration_s, 1),
        failing=sorted(s["id"] for s in scenarios if s["outcome"] == "failed"),
        **counts,
    )


def tell(name: str, before: Run | None, now: Run) -> list[str]:
    """Return what changed since `before`, in words."""
    if before is None:
        return [f"against the {name}: there is none yet"]
    broken = sorted(set(now.failing) - set(before.failing))
    mended = sorted(set(before.failing) - set(now.failing))
    what = f"against the {name} ({before.at}, {before.commit}): "
    what += f"{now.passed - before.passed:+d} passed, {now.failed - before.failed:+d} failed, "
    what += f"{now.rate - before.rate:+.1f} points"
    return [what, *(f"  newly failing: {name}" for name in broken), *(f"  mended: {name}" for name in mended)]


def last_run(history: Path) -> Run | None:
    lines = history.read_text("utf-8").splitlines() if history.exists() else []
    return read_run(json.loads(lines[-1])) if lines else None


def read_run(content: dict[str, Any]) -> Run:
    return Run(**content)


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "no commit"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
