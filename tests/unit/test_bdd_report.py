"""Does the behaviour suite's report say what changed, and show it safely?"""

from html.parser import HTMLParser
from pathlib import Path

from tests.bdd.page import page
from tests.bdd.run import Run, last_run, summary, tell


def run(**changes: object) -> Run:
    known = {
        "at": "then",
        "commit": "abc",
        "passed": 9,
        "failed": 1,
        "skipped": 0,
        "duration_s": 1.0,
        "failing": ["a"],
    }
    return Run(**{**known, **changes})  # type: ignore[arg-type]  # Fields by name, for short tests.


def test_the_rate_is_of_those_that_ran() -> None:
    assert run(passed=9, failed=1, skipped=5).rate == 90.0
    assert run(passed=0, failed=0).rate == 0.0


def test_what_broke_and_what_was_mended_is_named() -> None:
    lines = tell("last run", run(failing=["a"]), run(passed=8, failed=2, failing=["b", "c"]))
    assert lines[0].endswith("-1 passed, +1 failed, -10.0 points")
    assert lines[1:] == ["  newly failing: b", "  newly failing: c", "  mended: a"]


def test_the_first_run_has_nothing_to_compare_with(tmp_path: Path) -> None:
    assert last_run(tmp_path / "none.jsonl") is None
    assert tell("last run", None, run()) == ["against the last run: there is none yet"]


def test_scenarios_are_counted_by_outcome() -> None:
    outcomes = ["passed", "passed", "failed", "skipped"]
    found = summary([{"id": f"t{n}", "outcome": o} for n, o in enumerate(outcomes)], 3.0)
    assert (found.passed, found.failed, found.skipped, found.failing) == (2, 1, 1, ["t2"])


class Balance(HTMLParser):
    """Checks that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_escapes_what_it_shows() -> None:
    step = {"text": "Given <b>bold</b>", "failed": True, "duration_s": 0.1}
    failed = {
        "id": "x", "outcome": "failed", "duration_s": 1.0, "why": "<script>alert(1)</script>", "log": "a < b",
        "name": "A & B", "feature": "F", "about": "words", "steps": [step, {**step, "failed": False}],
    }  # fmt: skip
    mute = {"id": "y", "outcome": "failed", "duration_s": 0.0, "why": "never begun", "log": ""}
    text = page([failed, mute], 50.0, ["1 passed"])
    balance = Balance()
    balance.feed(text)
    assert balance.open == []
    assert "script" not in balance.seen
    assert "http" not in text.replace("<!doctype html>", "")
