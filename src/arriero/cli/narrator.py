"""How does a person follow, on stderr, what happens before the answer comes?

On a terminal with a progress bar; elsewhere, and without rich, as plain lines.
"""

import sys
from typing import TYPE_CHECKING, Any, Final

from arriero.cli import render

if TYPE_CHECKING:
    from rich.progress import Progress

#: A plain line of progress is written only after it advanced by so much.
_PLAIN_STEP: Final = 0.1


class Narrator:
    """Steps and progress of one command; says nothing when quiet."""

    def __init__(self, *, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet
        self._is_rich = not is_quiet and render.is_terminal(sys.stderr)
        self._progress: Progress | None = None
        self._bar: Any = None
        self._bar_name = ""
        self._plain_shown = -1.0
        self._told: set[str] = set()
        #: Set while an answer's line is not ended on the same terminal.
        self.is_mid_line = False

    def say(self, actor: str, message: str) -> None:
        """Write one sentence of an actor."""
        if self._is_quiet or not message:
            return
        if self.is_mid_line and self._is_rich:
            render.note("")
            self.is_mid_line = False
        text = render.plain(f"[{actor}] {message}")
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, style="dim", soft_wrap=True)
        elif self._is_rich and render.has_colour(sys.stderr):
            render.note(text, style="\x1b[2m", end="\x1b[0m")
        else:
            render.note(text)

    def say_once(self, actor: str, message: str) -> None:
        """Write one sentence of an actor, unless it was written before."""
        if message not in self._told:
            self._told.add(message)
            self.say(actor, message)

    def advance(self, name: str, fraction: float | None, detail: str = "") -> None:
        """Show how far `name` is: 0…1, or None where the end is not known."""
        if self._is_quiet:
            return
        if self._is_rich:
            self._show_bar(render.plain(name), fraction, render.plain(detail))
            return
        if name != self._bar_name:
            self._bar_name, self._plain_shown = name, -1.0
        if fraction is None:
            # Without an end there is nothing to be a tenth of: the first line must do.
            fraction = 0.0
        if fraction - self._plain_shown >= _PLAIN_STEP or (fraction >= 1.0 > self._plain_shown):
            self._plain_shown = fraction
            render.note(f"[{name}] {fraction:.0%} {detail}".rstrip())

    def clear(self) -> None:
        """Take the progress bar away: an answer comes, or the end.  Safe to call twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._bar_name = ""

    def _show_bar(self, name: str, fraction: float | None, detail: str) -> None:
        if self._progress is None:
            self._progress = _new_progress()
            self._progress.start()
            self._bar_name = ""
        if name != self._bar_name:
            if self._bar_name:
                self._progress.remove_task(self._bar)
            self._bar = self._progress.add_task(name, total=1.0, detail=detail)
            self._bar_name = name
        total = None if fraction is None else 1.0
        self._progress.update(self._bar, completed=fraction or 0.0, total=total, detail=detail)


def _new_progress() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TaskProgressColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
        console=Console(file=sys.stderr, no_color=not render.has_colour(sys.stderr)),
        transient=True,
    )
