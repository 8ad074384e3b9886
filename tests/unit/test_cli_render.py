"""Does what commands print read well: tables, sizes, times, errors?"""

import fcntl
import json
import os
import struct
import subprocess
import sys
import termios

import pytest

from arriero.cli import render
from arriero.contracts.errors import ArrieroError, ErrorCode


def test_a_plain_table_has_columns_two_blanks_apart_and_no_empty_cell() -> None:
    assert render.plain_table(["worker", "idle for"], [["w-1", ""], ["w-22", "3 s"], ["ä\nb", "x"]]) == [
        "WORKER  IDLE_FOR",
        "w-1     -",
        "w-22    3 s",
        "ä b     x",
    ]


def test_a_table_without_rows_is_its_head() -> None:
    assert render.plain_table(["a", "b"], []) == ["A  B"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1_572_864, "1.5 MiB"), (5 * 1024**4, "5.0 TiB")],
)
def test_sizes(size: int, text: str) -> None:
    assert render.bytes_text(size) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (950, "950"),
        (108_864, "108.9 thousand"),
        (145_286_144, "145.3 million"),
        (7_241_732_096, "7.24 billion"),
    ],
)
def test_counts(count: int, text: str) -> None:
    assert render.count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0.0 s"),
        (0.44, "0.4 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (185, "3 min 5 s"),
        (7_800, "2 h 10 min"),
        (90_000, "1 d 1 h"),
    ],
)
def test_lengths_of_time(seconds: float, text: str) -> None:
    assert render.seconds_text(seconds) == text


@pytest.mark.parametrize("name", ["log_tail", "last_lines"])
def test_an_error_has_its_code_its_log_and_its_advice(name: str) -> None:
    tail = [f"line {number}" for number in range(30)]
    lines = render.error_lines(ArrieroError(ErrorCode.WORKER_START_FAILED, "exit code 3", **{name: tail}))
    assert lines[0] == "error: WORKER_START_FAILED: exit code 3"
    assert lines[1:-1] == [f"  | line {number}" for number in range(20, 30)]
    assert lines[-1] == "  hint: The details carry its exit code and last log lines."


def test_advice_of_the_one_who_knows_better_wins() -> None:
    error = ArrieroError(ErrorCode.INSUFFICIENT_RAM, "no", suggested_action="Stop w-1.")
    assert render.error_lines(error)[-1] == "  hint: Stop w-1."


@pytest.mark.parametrize(
    ("details", "command"),
    [
        ({}, "`arriero nodes undrain NAME`"),
        ({"node": "attic"}, "`arriero nodes undrain attic`"),
        ({"node": "a b;c"}, "`arriero nodes undrain 'a b;c'`"),
    ],
)
def test_advice_bears_the_name_that_is_known(details: dict[str, str], command: str) -> None:
    error = ArrieroError(ErrorCode.NODE_DRAINING, "no", **details)
    assert command in render.error_lines(error)[-1]
    assert command in error.body().details["suggested_action"]


def on_a_terminal(program: str, *, columns: int = 200) -> str:
    """Return what a terminal of this width is sent."""
    person, terminal = os.openpty()
    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
        argv = [sys.executable, "-c", f"from arriero.cli import render; {program}"]
        subprocess.run(argv, stdin=terminal, stdout=terminal, env={**env, "TERM": "xterm"}, check=True)
        return os.read(person, 65_536).decode()
    finally:
        os.close(person)
        os.close(terminal)


@pytest.mark.parametrize(("columns", "is_stacked"), [(40, True), (200, False)])
def test_a_table_wider_than_the_terminal_is_not_squeezed(columns: int, is_stacked: bool) -> None:
    name = "hf:organisation/repository:Q4_K_M"
    shown = on_a_terminal(f"render.table(['model', 'id'], [[{name!r}, 'm-0123456789ab']])", columns=columns)
    assert name in shown and "m-0123456789ab" in shown
    assert ("─" not in shown) == is_stacked
    if is_stacked:
        # One cell a line, none of them over the edge.
        assert shown.splitlines() == [f"model    {name}", "  id     m-0123456789ab"]


def test_nothing_of_anybodys_reaches_a_terminal_that_it_would_obey(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spell = "\x1b]0;x\x07\x1b[2J\x9b2J\x7f\r\u202e\u2028\ud800 é中 a\tb\nc"
    assert render.plain(spell) == "?]0;x??[2J?2J????? é中 a\tb\nc"
    render.out(spell)
    render.note(spell)
    render.error(ArrieroError(ErrorCode.INTERNAL_ERROR, spell, log_tail=[spell], suggested_action=spell))
    told = capsys.readouterr()
    assert {c for c in told.out + told.err if not c.isprintable()} == {"\t", "\n"}


def test_json_says_the_same_to_a_terminal_without_its_commands() -> None:
    value = {"a": "\x1b[2J\x9b2J\u202e\U000e0041é"}
    shown = on_a_terminal(f"render.data({value!r})")
    assert json.loads(shown) == value
    assert {c for c in shown if not c.isprintable()} <= {"\r", "\n"}
