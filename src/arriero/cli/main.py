"""Which commands are there, and what becomes of their failures?  Commands are imported when they run."""

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from arriero.cli import render
from arriero.cli.signals import Terminated
from arriero.contracts.errors import ArrieroError, ErrorBody, ErrorCode, ErrorResponse, Exit
from arriero.contracts.version import __version__

#: Name of a command: module below `arriero.cli.commands`, its object there, what it is for.
COMMANDS: Final[dict[str, tuple[str, str, str]]] = {
    "up": ("up", "up", "Start orchestrator and agent on this machine."),
    "down": ("down", "down", "Stop everything that runs here, whatever state it is in."),
    "status": ("status", "status", "Show what runs here."),
    "infer": ("infer", "infer", "Ask a model once; the answer streams to stdout."),
    "chat": ("chat", "chat", "Talk with a model."),
    "ps": ("workers", "list_workers", "List workers (as `workers list`)."),
    "workers": ("workers", "workers", "List and stop workers, read their logs."),
    "models": ("models", "models", "Show which models this machine has."),
    "nodes": ("nodes", "nodes", "Add machines over SSH, look after them, take them out."),
    "engines": ("engines", "engines", "Show and install builds of the engine."),
    "explain": ("explain", "explain", "Show where a model would run now, and why nowhere else."),
    "downloads": ("downloads", "downloads", "Show what is being fetched."),
    "probe": ("probe", "probe", "Ask one question with an exit code: for scripts and service units."),
    "doctor": ("doctor", "doctor", "Find out what would keep arriero from working here."),
    "version": ("version", "version", "Show the version."),
    "completion": ("completion", "completion", "Print the script for your shell's completion."),
    "orchestrator": ("daemon_entries", "orchestrator", "Run the orchestrator in the foreground."),
    "agent": ("daemon_entries", "agent", "Run this machine's agent in the foreground."),
}

#: Set by the completion script while it asks what could follow.
COMPLETE_VARIABLE: Final = "_ARRIERO_COMPLETE"


class LazyGroup(click.Group):
    """A group that imports a command when it is run, and not for its name in a list."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module = importlib.import_module(f"arriero.cli.commands.{entry[0]}")
        command: click.Command = getattr(module, entry[1])
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[2]) for name, entry in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete names of commands from the table."""
        found = [
            CompletionItem(name, help=entry[2])
            for name, entry in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExamples:\n"
    '  arriero infer "Count from 5 to 25."\n'
    "  arriero up\n"
    "  arriero chat --model hf:org/repo:Q4_K_M\n"
    "  arriero down",
)
@click.version_option(__version__, "-V", "--version", message="arriero %(version)s")
def cli() -> None:
    """Language models over all the computers you own, behind one address."""


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; every failure becomes a clear message.

    ARRIERO_LOG_LEVEL=debug shows the traceback of a failure as well.
    """
    as_json = "--json" in arguments
    try:
        code = _invoke(arguments)
    except click.exceptions.Exit as ended:
        code = ended.exit_code
    except (KeyboardInterrupt, click.Abort):
        code = Exit.INTERRUPTED
    except Terminated as stopped:
        code = 128 + stopped.number
    except click.exceptions.NoArgsIsHelpError as failure:
        # A group that was given no command: its help is laid out as it is, not one message.
        _tell_help(failure, as_json=as_json)
        code = failure.exit_code
    except click.ClickException as failure:
        _tell_usage(failure, as_json=as_json)
        code = failure.exit_code
    except BrokenPipeError:
        # Whoever read our answer has enough of it: nothing failed.
        code = Exit.OK
    except ArrieroError as failure:
        _tell(failure, as_json=as_json)
        code = failure.kind.exit_code
    except Exception as failure:  # noqa: BLE001 - A person sees a message, never a traceback.
        told = ArrieroError(ErrorCode.INTERNAL_ERROR, f"{type(failure).__name__}: {failure}")
        _tell(told, as_json=as_json)
        code = Exit.ERROR
    _flush()
    return int(code)


def _invoke(arguments: Sequence[str]) -> int:
    """Run a command; unlike click's own `main`, leave signals and broken pipes to us."""
    instruction = os.environ.get(COMPLETE_VARIABLE)
    if instruction:
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, "arriero", COMPLETE_VARIABLE, instruction)
    with cli.make_context("arriero", list(arguments)) as context:
        result = cli.invoke(context)
    return result if isinstance(result, int) else Exit.OK


def _tell_help(failure: click.exceptions.NoArgsIsHelpError, *, as_json: bool) -> None:
    if as_json:
        context: Any = failure.ctx
        message = f"give one of the commands of `{context.command_path}`"
        render.data(ErrorResponse(ErrorBody(ErrorCode.INVALID_REQUEST, message)))
    else:
        render.note(failure.format_message())


def _tell_usage(failure: click.ClickException, *, as_json: bool) -> None:
    context: Any = getattr(failure, "ctx", None)
    path = context.command_path if context is not None else "arriero"
    message = " ".join(failure.format_message().split())
    if as_json:
        render.data(ErrorResponse(ErrorBody(ErrorCode.INVALID_REQUEST, message)))
    else:
        render.note(f"error: {message} (see `{path} --help`)")


def _tell(failure: ArrieroError, *, as_json: bool) -> None:
    if os.environ.get("ARRIERO_LOG_LEVEL", "").lower() == "debug":
        import traceback

        traceback.print_exc()
    with contextlib.suppress(BrokenPipeError):
        render.error(failure, as_json=as_json)


def _flush() -> None:
    """Flush stdout; where its reader is gone, make the interpreter's own flush at the end harmless."""
    try:
        sys.stdout.flush()
    except (BrokenPipeError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
