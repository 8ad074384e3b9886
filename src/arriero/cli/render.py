"""How does anything look that a command prints?  stdout has the answer alone; stderr the rest."""

import os
import sys
from collections.abc import Sequence
from typing import Any, Final, TextIO

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorResponse

LOG_LINES_SHOWN: Final = 10


def is_terminal(stream: TextIO) -> bool:
    """Return whether a person looks at `stream`."""
    try:
        return stream.isatty()
    except ValueError:
        return False


def has_colour(stream: TextIO) -> bool:
    """Return whether `stream` may have colours: a terminal, and NO_COLOR is not set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def plain(text: str) -> str:
    """Return text of anybody's without what a terminal would obey: each such character as `?`.

    Machines, servers and models tell names, errors and logs; one of them may be hostile.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def out(text: str, *, style: str = "") -> None:
    """Print a line of the answer, at once; `style`: our own beginning of the line, with colours."""
    sys.stdout.write(f"{style}{plain(text)}\n")
    sys.stdout.flush()


def note(text: str, *, style: str = "", end: str = "") -> None:
    """Print a line that is not the answer; nothing if stderr is gone.  `style` and `end` are our own."""
    try:
        sys.stderr.write(f"{style}{plain(text)}{end}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass


def log(content: bytes) -> None:
    """Print a piece of a log: as it is, but without what a terminal would obey if one shows it."""
    if is_terminal(sys.stdout):
        content = plain(content.decode("utf-8", "replace")).encode("utf-8", "replace")
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()


def data(value: Any) -> None:
    """Print the answer as JSON: one line, or indented where a person looks."""
    content = msgspec.json.encode(value)
    if is_terminal(sys.stdout):
        content = msgspec.json.format(content, indent=2)
        # Within JSON an escape says the same.
        out("".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in content.decode()))
        return
    sys.stdout.write(content.decode() + "\n")
    sys.stdout.flush()


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def error(failure: ArrieroError, *, as_json: bool = False) -> None:
    """Tell a failure: on stderr in words, with advice; as JSON on stdout."""
    if as_json:
        data(ErrorResponse(failure.body()))
        return
    first, *others = error_lines(failure)
    word = "error:"
    note(first.removeprefix(word), style=f"\x1b[31m{word}\x1b[0m" if has_colour(sys.stderr) else word)
    for line in others:
        note(line)


def error_lines(failure: ArrieroError) -> list[str]:
    """Return a failure in words: what, the last lines of a log where there are some, what to do."""
    lines = [f"error: {failure.code}: {failure.message}"]
    tail = failure.details.get("log_tail") or failure.details.get("last_lines")
    if isinstance(tail, list):
        lines += [f"  | {line}" for line in tail[-LOG_LINES_SHOWN:]]
    return [*lines, f"  hint: {failure.advice}"]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their columns: a table for a person, plain columns for a program."""
    if is_terminal(sys.stdout):
        _rich_table(columns, rows)
        return
    for line in plain_table(columns, rows):
        out(line)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: columns two blanks apart, an empty cell as `-`."""
    cells = [[column.upper().replace(" ", "_") for column in columns]]
    cells += [[cell.replace("\n", " ") or "-" for cell in row] for row in rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def stacked_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table that is too wide: row below row, each cell beside its column's name."""
    width = max(map(len, columns)) + 2
    return [
        f"{column:<{width + 2}}{cell}" if index == 0 else f"  {column:<{width}}{cell}"
        for row in rows
        for index, (column, cell) in enumerate(zip(columns, row, strict=True))
        if cell or index == 0
    ]


def _rich_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        shown.add_column(column)
    for row in rows:
        # As Text, so that no cell is read as markup.
        shown.add_row(*(Text(plain(cell) or "-") for cell in row))
    console = Console(file=sys.stdout, no_color=not has_colour(sys.stdout))
    if Measurement.get(console, console.options.update(max_width=10_000), shown).maximum > console.width:
        # Squeezed into a narrow terminal, names and ids would be cut: nobody could copy them.
        for line in stacked_table(columns, rows):
            out(line)
        return
    console.print(shown)


def bytes_text(size: float) -> str:
    """Return a number of bytes for people: `512 B`, `1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def count_text(count: int) -> str:
    """Return a large number for people: `950`, `108.9 thousand`, `7.24 billion`."""
    for limit, unit, digits in ((1e9, "billion", 2), (1e6, "million", 1), (1e3, "thousand", 1)):
        if count >= limit:
            return f"{count / limit:.{digits}f} {unit}"
    return str(count)


def progress_text(done: int, total: int | None, speed_mbps: float, eta_s: float | None) -> str:
    """Return how far something is: `1.2 GiB of 4.1 GiB, 85.0 Mbit/s, 3 min 5 s left`."""
    text = bytes_text(done)
    if total:
        text += f" of {bytes_text(total)}"
    if speed_mbps:
        text += f", {speed_mbps:.1f} Mbit/s"
    if eta_s is not None:
        text += f", {seconds_text(eta_s)} left"
    return text


def moment_text(unix: float) -> str:
    """Return a moment for people, in their own time zone; empty for 0, which is never."""
    import time

    return time.strftime("%Y-%m-%d %H:%M", time.localtime(unix)) if unix else ""


def mib_text(size_mb: float) -> str:
    """Return a number of MiB for people."""
    return bytes_text(size_mb * 1024 * 1024)


def seconds_text(seconds: float) -> str:
    """Return a length of time for people: `0.4 s`, `42 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`."""
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
