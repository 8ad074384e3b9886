"""What is kept, and told, of a command that was run?"""

from collections.abc import Callable, Sequence
from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.fabrics.base import Completed

#: So much of the end of a command's errors goes into ours.
TOLD_BYTES_MAX: Final = 2000
#: A line that is told as it comes is cut after so much.
LINE_BYTES_MAX: Final = 4096


class Kept:
    """A stream's beginning, or its end, of bounded size."""

    def __init__(
        self, bytes_max: int, *, is_end: bool = False, on_line: Callable[[bytes], None] | None = None
    ) -> None:
        self.bytes_max = bytes_max
        self._is_end = is_end
        self._on_line = on_line
        self._line = b""
        self._content = bytearray()
        self.is_cut = False

    def feed(self, chunk: bytes) -> None:
        """Take what came next."""
        if self._on_line is not None:
            *lines, rest = (self._line + chunk).split(b"\n")
            self._line = rest[:LINE_BYTES_MAX]
            for line in lines:
                self._on_line(line[:LINE_BYTES_MAX])
        if self._is_end:
            self._content += chunk
            excess = len(self._content) - self.bytes_max
            if excess > 0:
                del self._content[:excess]
                self.is_cut = True
            return
        room = self.bytes_max - len(self._content)
        self._content += chunk[:room]
        self.is_cut = self.is_cut or len(chunk) > room

    def content(self) -> bytes:
        """Return what is kept."""
        return bytes(self._content)


def _printable(said: bytes) -> str:
    told = said[-TOLD_BYTES_MAX:].decode("utf-8", "replace").strip()
    return "".join(c if c.isprintable() or c == "\n" else " " for c in told)


def not_begun(machine: str, argv: Sequence[str], completed: Completed, before: bytes) -> ArrieroError:
    """Return what is told of a command that the machine's login shell did not start."""
    told = _printable(completed.stderr) or _printable(before)
    said = f"it says: {told.splitlines()[-1][:200]}" if told else "it said nothing"
    return ArrieroError(
        ErrorCode.SSH_COMMAND_FAILED,
        f"{machine} runs no commands for that user: {said}",
        machine=machine,
        program=argv[0],
        exit_code=completed.exit_code,
        stderr=told,
        suggested_action="log in as a user with a shell: neither nologin nor a ForceCommand, nor a command= "
        "in its authorized_keys",
    )


def checked(machine: str, argv: Sequence[str], completed: Completed, *, may_fail: bool) -> Completed:
    """Return `completed`.  Raises SSH_COMMAND_FAILED if it failed and may not."""
    if completed.exit_code == 0 or may_fail:
        return completed
    # Of argv the program alone: what else is in it may be a path, and is long.
    told = _printable(completed.stderr)
    last = told.splitlines()[-1] if told else "it said nothing"
    raise ArrieroError(
        ErrorCode.SSH_COMMAND_FAILED,
        f"{argv[0]} failed on {machine} with exit code {completed.exit_code}: {last}",
        machine=machine,
        program=argv[0],
        exit_code=completed.exit_code,
        stderr=told,
    )


def not_ended(machine: str, argv: Sequence[str], timeout_s: float) -> ArrieroError:
    """Return what is told of a command that took too long."""
    return ArrieroError(
        ErrorCode.SSH_COMMAND_FAILED,
        f"{argv[0]} did not end within {timeout_s:g} s on {machine}; it was stopped",
        machine=machine,
        program=argv[0],
        timeout_s=timeout_s,
    )
