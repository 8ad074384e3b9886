"""How is one of our programs run on a machine, by a Python that is there?"""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from arriero.contracts.errors import ArrieroError, ErrorBody, ErrorCode, fail, from_body
from arriero.fabrics.base import Connection
from arriero.orchestrator.machines import (
    agent_child,
    environment_child,
    examine_child,
    survey_child,
    there_child,
)

#: Where a Python may be besides the folders of PATH, which is short for commands over SSH.
PYTHON_PLACES: Final = (
    "/usr/bin",
    "/usr/local/bin",
    "/opt/homebrew/bin",
    "/opt/local/bin",
    "/home/linuxbrew/.linuxbrew/bin",
    "~/.local/bin",
    "~/.pyenv/versions/*/bin",
    "~/.local/share/uv/python/*/bin",
)
PYTHON_MIN: Final = (3, 11)
#: The newest that the locked packages are tried with: newer ones are taken where there is nothing else.
PYTHON_TRIED_MAX: Final = (3, 14)
LOOK_TIMEOUT_S: Final = 30.0
ANSWER_BYTES_MAX: Final = 4 * 1024 * 1024
#: So a line begins that tells how far a program is, see `there_child.tell`.
_TOLD: Final = b'{"told": '

#: In the order in which they import each other.
_MODULES: Final = (there_child, survey_child, environment_child, agent_child, examine_child)
_START: Final = """
import sys, types
actions = {{}}
for name, text in {sources!r}:
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
    actions.update(getattr(module, "ACTIONS", {{}}))
sys.modules[{common!r}].main({asked!r}, actions)
"""


@dataclass(frozen=True, slots=True)
class Python:
    """One Python of a machine."""

    path: str
    version: tuple[int, int, int]
    #: Whether it can make environments, and whether it is a CPython of 64 bits as the packages are for.
    has_venv: bool
    is_fitting: bool

    @property
    def is_usable(self) -> bool:
        """Whether arriero can be installed with it."""
        return self.version[:2] >= PYTHON_MIN and self.has_venv and self.is_fitting

    def __str__(self) -> str:
        return ".".join(map(str, self.version))


@dataclass(frozen=True, slots=True)
class Look:
    """What a shell could tell of a machine."""

    system: str
    machine: str
    pythons: tuple[Python, ...]

    def best(self) -> Python:
        """Return the Python to install with.  Raises PYTHON_NOT_FOUND, PYTHON_TOO_OLD."""
        usable = [python for python in self.pythons if python.is_usable]
        if usable:
            # The first that is found is what the machine's owner calls python3.
            tried = [python for python in usable if python.version[:2] <= PYTHON_TRIED_MAX]
            return (tried or usable)[0]
        demanded = ".".join(map(str, PYTHON_MIN))
        new = [python for python in self.pythons if python.version[:2] >= PYTHON_MIN]
        if new:
            lacks = "has no module venv" if new[0].is_fitting else "is no 64-bit CPython"
            fail(
                ErrorCode.PYTHON_NOT_FOUND,
                f"no usable Python: {new[0]} at {new[0].path} {lacks}",
                found=str(new[0]),
                path=new[0].path,
                demanded=demanded,
                suggested_action="install python3-venv (Debian, Ubuntu) there, or another Python",
            )
        if self.pythons:
            newest = max(self.pythons, key=lambda python: python.version)
            fail(
                ErrorCode.PYTHON_TOO_OLD,
                f"Python {newest} at {newest.path} is too old: arriero needs {demanded} or newer",
                found=str(newest),
                path=newest.path,
                demanded=demanded,
            )
        fail(
            ErrorCode.PYTHON_NOT_FOUND,
            f"no Python was found: arriero needs {demanded} or newer",
            demanded=demanded,
        )


async def look(connection: Connection, places: Sequence[str] = PYTHON_PLACES) -> Look:
    """Return what a shell can tell of a machine.  Raises SSH_COMMAND_FAILED, NODE_UNREACHABLE."""
    script = Path(__file__).with_name("look.sh").read_bytes()
    done = await connection.run(["sh", "-s", "--", *places], stdin=script, timeout_s=LOOK_TIMEOUT_S)
    found = {"system": "", "machine": ""}
    pythons = []
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        word, _, rest = line.partition(" ")
        if word in found:
            found[word] = rest.strip()
        elif word == "python" and (python := _python(rest)) is not None:
            pythons.append(python)
    return Look(found["system"], found["machine"], tuple(pythons))


def _python(text: str) -> Python | None:
    parts = text.split(" ", 6)
    if len(parts) != 7 or not all(part.isascii() and part.isdigit() for part in parts[:5]):
        return None
    major, minor, patch, has_venv, is_wide = map(int, parts[:5])
    # The flags of its binary interface: free-threaded and debug ones have packages of their own.
    return Python(parts[6], (major, minor, patch), bool(has_venv), bool(is_wide) and parts[5] == "cpython")


async def ask(
    connection: Connection, python: str, action: str, *, timeout_s: float,
    on_line: Callable[[bytes], None] | None = None, **arguments: Any,
) -> Any:  # fmt: skip
    """Have a program do something there, with arguments as JSON on standard input; return its answer.

    `on_line` hears each line of what it says, as it comes: how far it is, at last the answer.

    Raises what it refuses with; NODE_UNREACHABLE; SSH_COMMAND_FAILED if it does not end in time or breaks.
    """
    program = _START.format(
        sources=await asyncio.to_thread(_sources),
        common=there_child.__name__,
        # ASCII alone, so that its repr means the same to every Python.
        asked=json.dumps({"action": action, **arguments}),
    )
    done = await connection.run(
        [python, "-I", "-"],
        stdin=program.encode(),
        timeout_s=timeout_s,
        output_bytes_max=ANSWER_BYTES_MAX,
        on_line=on_line,
    )
    try:
        lines = done.stdout.split(b"\n")
        answer = json.loads(b"\n".join(line for line in lines if not line.startswith(_TOLD)))
    except ValueError as error:
        raise ArrieroError(
            ErrorCode.SSH_COMMAND_FAILED,
            f"{action}: the machine's answer is no JSON document of ours",
            program=action,
            stdout=done.stdout[-500:].decode("utf-8", "replace"),
        ) from error
    if "error" in answer:
        refused = answer["error"]
        raise from_body(ErrorBody(refused["code"], refused["message"], refused["details"]))
    return answer["ok"]


def _sources() -> list[tuple[str, str]]:
    return [(each.__name__, Path(str(each.__file__)).read_text("utf-8")) for each in _MODULES]
