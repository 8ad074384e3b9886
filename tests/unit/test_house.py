"""The house rules that no linter knows."""

import ast
import re
from pathlib import Path

import pytest
from tools import docs, docs_http

from arriero.contracts.errors import KINDS, ErrorCode

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("tools/**/*.py")])
LINES_MAX = 500
FUNCTION_LINES_MAX = 70
#: Longer than the limit, each with its reason.
LONG_MODULES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


def test_no_module_is_longer_than_the_limit() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in SOURCES
        if (lines := len(path.read_text("utf-8").splitlines())) > LINES_MAX
    }
    assert set(long) == set(LONG_MODULES), f"split by question, not by size: {long}"


def test_no_function_is_longer_than_the_limit() -> None:
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES_MAX:
                    long[f"{path.relative_to(ROOT)}:{node.name}"] = lines
    assert set(long) == set(LONG_FUNCTIONS), long


def test_every_module_says_which_question_it_answers() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert silent == []


def test_nothing_is_left_to_do_in_the_code() -> None:
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
    found = [str(path) for path in SOURCES if marks.search(path.read_text("utf-8"))]
    assert found == []


def test_every_silenced_line_gives_its_reason() -> None:
    bare = re.compile(r"#\s*(noqa|type:\s*ignore)(:\s*[A-Z]+\d+|\[[a-z-]+\])?\s*$")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if bare.search(line)
    ]
    assert found == []


def test_decisions_have_no_clock_chance_or_io() -> None:
    banned = {"time", "random", "asyncio", "os", "socket", "subprocess", "secrets", "pathlib"}
    for path in ROOT.glob("src/arriero/domain/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            assert not {name.split(".")[0] for name in names} & banned, path.name


def test_time_and_chance_are_handed_in() -> None:
    """Only `runtime` (and the child of the engine, which has no loop) reads clock and chance."""
    banned = re.compile(
        r"\b(time\.(time|monotonic|sleep)|random\.(random|choice|uniform)|asyncio\.sleep)\((?!0\))"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in ROOT.glob("src/arriero/*/**/*.py")
        if path.relative_to(ROOT / "src/arriero").parts[0]
        in {"agent", "worker", "orchestrator", "engines", "fabrics", "domain"}
        and not path.stem.endswith("_child")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if banned.search(line)
    ]
    assert found == []


def test_reference_pages_are_what_the_code_says() -> None:
    assert docs.stale() == [], "make docs"


def test_every_route_says_what_it_does() -> None:
    silent = [row for rows in docs_http.rows().values() for row in rows if not row[2].endswith(".")]
    assert silent == []


def test_every_code_has_a_heading_a_meaning_and_advice() -> None:
    headings = re.findall(r"^### `(\w+)`$", docs.errors_page(), flags=re.MULTILINE)
    assert headings == [str(code) for code in ErrorCode]
    assert all(kind.meaning.endswith(".") and kind.what_to_do.endswith(".") for kind in KINDS.values())


def test_every_timeout_exits_124() -> None:
    assert {c for c in ErrorCode if c.endswith("_TIMEOUT")} == {
        c for c in ErrorCode if KINDS[c].exit_code == 124
    }


def test_every_code_is_produced_by_a_test_or_listed_as_unreachable_yet() -> None:
    """The list in tests/unreached_codes.txt only shrinks: a code that a test names must leave it."""
    listed = set((ROOT / "tests/unreached_codes.txt").read_text("utf-8").split())
    tests = [
        path.read_text("utf-8")
        for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("tests/**/*.feature")]
        if path != Path(__file__)
    ]
    words = set(re.findall(r"[A-Z][A-Z_]{4,}", "\n".join(tests)))
    assert {str(code) for code in ErrorCode} - words == listed


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_links_in_the_documents_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text("utf-8")):
        assert (ROOT / target).exists(), f"{name}: {target}"
