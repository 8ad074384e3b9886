"""A pytest plugin that writes down what became of each scenario, as JSON.

pytest -p tests.bdd.recorder --bdd-record=reports/bdd.json tests/bdd
"""

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bdd-record", default=None, help="file for the record of all scenarios")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--bdd-record")
    # Workers of xdist send their reports to the one process that writes.
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(path)), "bdd-recorder")


class Recorder:
    """Collects the reports of one run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._scenarios: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take one phase of one test; what failed in any phase has failed."""
        known = self._scenarios.setdefault(
            report.nodeid, {"id": report.nodeid, "outcome": "passed", "duration_s": 0.0, "why": "", "log": ""}
        )
        known["duration_s"] = round(known["duration_s"] + report.duration, 3)
        told = getattr(report, "scenario", None)
        if told is not None:
            known.update(
                name=told["name"],
                feature=told["feature"]["name"],
                about=told["feature"]["description"],
                steps=[
                    {
                        "text": f"{step['keyword']} {step['name']}",
                        "failed": step["failed"],
                        "duration_s": step["duration"],
                    }
                    for step in told["steps"]
                ],
            )
        if report.caplog:
            known["log"] = report.caplog
        if report.outcome == "passed":
            return
        if report.outcome == "skipped":
            known["outcome"] = "skipped"
            known["why"] = (
                str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
            )
        else:
            known["outcome"] = "failed"
            known["why"] = (known["why"] + "\n" + report.longreprtext).strip()

    def pytest_sessionfinish(self) -> None:
        """Write the record."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(list(self._scenarios.values()), indent=1), "utf-8")
