"""Is every command in the table, with help and examples, and is nothing imported before it is needed?"""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest

from arriero.cli import main as cli
from arriero.cli.commands import daemons

HEAVY = ("click", "rich", "msgspec", "litestar", "aiohttp", "uvicorn", "psutil", "platformdirs")


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command with its name as it is typed."""

    def below(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield name, command
        if isinstance(command, click.Group):
            context = click.Context(command)
            for sub_name in command.list_commands(context):
                sub = command.get_command(context, sub_name)
                assert sub is not None
                yield from below(f"{name} {sub_name}".strip(), sub)

    yield from below("", cli.cli)


ALL = dict(commands())


def test_the_commands_that_people_were_told_of_are_there() -> None:
    expected = "up down status infer chat ps workers models nodes probe doctor explain version completion"
    assert set(expected.split()) <= set(ALL)
    assert {"workers list", "workers stop", "workers logs", "models list", "nodes list"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_every_help_says_what_for_and_has_examples(name: str) -> None:
    command = ALL[name]
    shown = command.get_help(click.Context(command, info_name=f"arriero {name}".strip()))
    assert "Examples:" in shown
    assert re.search(r"^    arriero|\| arriero|^    \S.*arriero", shown, re.MULTILINE), shown
    assert command.help and command.help.split("\n")[0].endswith((".", ":")), command.help


@pytest.mark.parametrize(
    "name", [name for name, command in ALL.items() if not isinstance(command, click.Group)]
)
def test_every_command_has_json_besides_those_that_never_end(name: str) -> None:
    flags = {flag for parameter in ALL[name].params for flag in parameter.opts}
    assert ("--json" in flags) != (name in daemons.FLAGS), name


def test_the_short_help_in_the_list_needs_no_import_of_a_command() -> None:
    loaded = _modules_after("from arriero.__main__ import main; main(['--help'])")
    assert not [name for name in loaded if name.startswith("arriero.cli.commands.")]


def test_version_imports_nothing_it_does_not_need() -> None:
    loaded = _modules_after("from arriero.__main__ import main; main(['version', '--json'])")
    assert not loaded & set(HEAVY), loaded & set(HEAVY)


def test_infer_imports_neither_daemons_nor_what_only_progress_bars_need() -> None:
    loaded = _modules_after("import arriero.cli.main, arriero.cli.commands.infer")
    heavy = {*HEAVY, "asyncio", "arriero.cli.launch"} - {"click", "msgspec"}
    assert not loaded & heavy, loaded & heavy


@pytest.mark.parametrize("role", daemons.FLAGS)
def test_daemons_start_without_the_command_line_s_libraries(role: str) -> None:
    loaded = _modules_after(f"from arriero.__main__ import main; main(['{role}', '--help'])")
    assert not loaded & {"click", "rich"}


def test_daemons_start_without_libraries_that_only_happen_to_be_installed() -> None:
    assert importlib.util.find_spec("pydantic") is not None
    loaded = _modules_after("from arriero.runtime.litestar_app import make_app; make_app([], title='x')")
    assert "litestar" in loaded and "pydantic" not in loaded


def _modules_after(script: str) -> set[str]:
    """Return the names of all modules that are loaded after a script, run in a fresh interpreter."""
    told = "print('\\nMODULES', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\ntry:\n    {script}\nexcept SystemExit:\n    pass\n{told}"],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    return set(done.stdout.rpartition("MODULES ")[2].split())
