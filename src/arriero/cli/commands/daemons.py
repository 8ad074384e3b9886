"""How are the daemons started in the foreground?  Needs neither click nor rich.

One table of flags: the parser here is made from it, and so are the entries of `arriero --help`.
"""

import argparse
import gc
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from arriero.contracts.errors import ArrieroError, ErrorCode, Exit
from arriero.runtime import processes, settings

_DAY_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag of a daemon: a setting given on the command line, or a switch (`setting` empty)."""

    name: str
    help: str
    setting: str = ""
    metavar: str = ""

    @property
    def key(self) -> str:
        """Its name as a Python name."""
        return self.name.lstrip("-").replace("-", "_")


_LOG = Flag("--log-level", "debug, info, warning or error.", "log_level", "LEVEL")
_WITH = Flag("--with-pid", "End as soon as this process (PID:STARTTICKS) has ended.", metavar="PID:TICKS")
FLAGS: Final[dict[str, tuple[Flag, ...]]] = {
    "orchestrator": (
        Flag("--port", "Port to listen on; 0 takes a free one.", "orchestrator_port", "PORT"),
        Flag("--host", "Address to listen on.", "orchestrator_host", "HOST"),
        Flag("--background", "Leave again after ARRIERO_ORCHESTRATOR_IDLE_S without work."),
        Flag("--with-agent", "Take this machine's agent and its workers along when leaving."),
        Flag("--cascade", "Take the agents of all nodes and their workers along when leaving."),
        Flag("--ephemeral", "Take the workers along that it started, on all nodes, when leaving."),
        _LOG,
        _WITH,
    ),
    "agent": (
        Flag("--port", "Port to listen on, on loopback; 0 takes a free one.", "agent_port", "PORT"),
        Flag("--name", "Name of this machine in the pool.", "node_name", "NAME"),
        Flag("--worker-port-base", "First port tried for a worker.", "worker_port_base", "PORT"),
        _LOG,
        _WITH,
    ),
    "worker": (),
}
MEANING: Final = {
    "orchestrator": "Run the orchestrator in the foreground: the pool's one address.",
    "agent": "Run this machine's agent in the foreground.",
    "worker": "Run a worker; its specification comes as one JSON line on stdin (started by the agent).",
}
EXAMPLES: Final = {
    "orchestrator": ("arriero orchestrator", "arriero orchestrator --port 0 --log-level debug"),
    "agent": ("arriero agent", "arriero agent --name workstation --port 9300"),
    "worker": ("arriero worker < spec.json",),
}


def main(arguments: Sequence[str]) -> int:
    """Run the daemon that the first argument names, until a signal ends it; return its exit code."""
    role, *rest = arguments
    return run(role, vars(_parser(role).parse_args(rest)))


def run(role: str, values: Mapping[str, Any]) -> int:
    """Run a daemon with the flags' values by their keys (None: not given); return its exit code.

    An expected failure is told on stderr: as one JSON line where that is a log, in words on a terminal.
    """
    try:
        return _start(role, values)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except ArrieroError as error:
        return _tell(role, error)
    except ExceptionGroup as group:
        expected, rest = group.split(ArrieroError)
        if expected is None or rest is not None:
            return _tell_fault(role, group)
        first = _first(expected)
        assert isinstance(first, ArrieroError), "the group was split by this type"
        return _tell(role, first)
    except Exception as error:  # noqa: BLE001 - The last line of the log must say why, with its traceback.
        return _tell_fault(role, error)


def _start(role: str, values: Mapping[str, Any]) -> int:
    if role == "worker":
        from arriero.worker import app as worker

        return worker.main()
    flags = {flag.setting: values.get(flag.key) for flag in FLAGS[role] if flag.setting}
    found = settings.load(flags=flags)
    if values.get("with_pid"):
        _end_with(values["with_pid"])
    if role == "agent":
        # None of what is imported is garbage, and one that was killed is missed until the next one answers.
        gc.disable()
        from arriero.agent import app as agent

        gc.freeze()
        gc.enable()
        return agent.main(found)
    from arriero.orchestrator import app as orchestrator
    from arriero.orchestrator.cascade import Leaving

    leaving = Leaving(
        takes_agent=bool(values.get("with_agent")),
        cascades=bool(values.get("cascade")),
        takes_workers=bool(values.get("ephemeral")),
    )
    return orchestrator.main(found, is_background=bool(values.get("background")), leaving=leaving)


def _end_with(text: str) -> None:
    """Send ourselves SIGTERM when the process `PID:TICKS` has ended."""
    pid, _, ticks = text.partition(":")
    if not (pid.isascii() and pid.isdigit() and ticks.isascii() and ticks.isdigit()):
        raise ArrieroError(ErrorCode.INVALID_SETTINGS, f"--with-pid: {text!r} is not PID:TICKS")
    known = processes.Identity(int(pid), int(ticks), processes.boot_id())

    def watch() -> None:
        while not processes.wait_gone(known, _DAY_S):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="with-pid", daemon=True).start()


def _first(error: BaseException) -> BaseException:
    """Return the first failure of a task group: the others followed from it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _tell_fault(role: str, error: Exception) -> int:
    text = "".join(traceback.format_exception(error))
    first = _first(error)
    return _tell(role, ArrieroError(ErrorCode.INTERNAL_ERROR, f"{type(first).__name__}: {first}"), text)


def _tell(role: str, error: ArrieroError, trace: str = "") -> int:
    if sys.stderr.isatty():
        sys.stderr.write(f"{trace}error: {error.code}: {error.message}\n  hint: {error.advice}\n")
    else:
        body = error.body()
        line: dict[str, Any] = {
            "event": "ended",
            "level": "error",
            "role": role,
            "error": {"code": body.code, "message": body.message, "details": body.details},
        }
        if trace:
            line["exception"] = trace
        sys.stderr.write(json.dumps(line, default=str) + "\n")
    sys.stderr.flush()
    return int(error.kind.exit_code)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, as those of all other commands."""

    def error(self, message: str) -> NoReturn:
        """Tell and exit 2."""
        sys.stderr.write(f"error: {message} (see `{self.prog} --help`)\n")
        sys.exit(Exit.USAGE)


def _parser(role: str) -> _Parser:
    parser = _Parser(
        prog=f"arriero {role}",
        description=MEANING[role],
        epilog="Examples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[role]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag in FLAGS[role]:
        if flag.metavar:
            parser.add_argument(flag.name, dest=flag.key, metavar=flag.metavar, help=flag.help)
        else:
            parser.add_argument(flag.name, dest=flag.key, action="store_true", help=flag.help)
    return parser
