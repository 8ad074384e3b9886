"""The program as a person starts it: a process, its output, its exit code."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMEOUT_S = 180.0


@dataclass
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return an environment without settings of the machine, with a state folder of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ARRIERO_")}
    env.pop("NO_COLOR", None)
    env |= {"ARRIERO_HOME": str(home), "ARRIERO_CONFIG": os.devnull}
    return env | more


def start(
    *arguments: str, env: Mapping[str, str], stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start a command."""
    return subprocess.Popen(
        [sys.executable, "-m", "arriero", *arguments],
        env=dict(env),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(
    process: subprocess.Popen[bytes], *, content: str | None = None, timeout_s: float = TIMEOUT_S
) -> Done:
    """Wait for a command's end; kill it if it does not come."""
    with process:
        try:
            out, err = process.communicate(None if content is None else content.encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"no end within {timeout_s:g} s: {out!r} {err!r}") from None
    return Done(process.returncode, out.decode(), err.decode())


def run(
    *arguments: str, env: Mapping[str, str], content: str | None = None, timeout_s: float = TIMEOUT_S
) -> Done:
    """Run a command to its end; `content` goes to its stdin."""
    stdin = subprocess.DEVNULL if content is None else subprocess.PIPE
    return finish(start(*arguments, env=env, stdin=stdin), content=content, timeout_s=timeout_s)


def interrupt(process: subprocess.Popen[bytes], number: int = signal.SIGINT) -> Done:
    """Send a signal to a command and wait for its end."""
    process.send_signal(number)
    return finish(process)
