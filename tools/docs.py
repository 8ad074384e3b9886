"""Makes the pages of docs/reference from the tables in the code.  `--check` only compares."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from arriero.contracts.errors import KINDS, ErrorCode
from arriero.domain.node_states import NODES
from arriero.domain.task_states import TASKS
from arriero.domain.worker_states import WORKERS
from arriero.runtime.settings import ENV_PREFIX, Settings

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "reference"
NOTE = "<!-- Made by `make docs` from the code; change the table there. -->"


def errors_page() -> str:
    lines = ["# Errors", "", NOTE, ""]
    lines += [
        "Every failure, over HTTP, in an event stream, on the command line or in a probe, carries one of these",
        'codes in `{"error": {"code": …, "message": …, "details": {…}}}`. Programs match on the code.',
        "",
    ]
    for code in ErrorCode:
        kind = KINDS[code]
        lines += [
            f"### `{code}`",
            "",
            kind.meaning,
            "",
            f"- HTTP status {kind.http_status}, exit code {int(kind.exit_code)}, "
            f"{'a retry may help' if kind.is_retryable else 'a retry alone does not help'}",
            f"- What to do: {kind.what_to_do}",
            "",
        ]
    return "\n".join(lines)


def settings_page() -> str:
    lines = ["# Settings", "", NOTE, ""]
    lines += [
        "Flags over environment over file. The file is `$ARRIERO_CONFIG`, else `~/.config/arriero/config.toml`, else",
        "`/etc/arriero/config.toml`; its keys are the names below. Unknown keys are errors.",
        "",
        "| setting | environment | default | unit | what it does |",
        "|---|---|---|---|---|",
    ]
    for field in dataclasses.fields(Settings):
        default = "" if field.default == "" else f"`{field.default}`"
        unit = field.metadata["unit"]
        variable = f"{ENV_PREFIX}{field.name.upper()}"
        lines.append(f"| `{field.name}` | `{variable}` | {default} | {unit} | {field.metadata['help']} |")
    return "\n".join([*lines, ""])


def states_page() -> str:
    from arriero.domain.download_states import DOWNLOADS

    lines = ["# States", "", NOTE, "", "An arrow that is not drawn does not exist: it raises.", ""]
    for table in (WORKERS, NODES, TASKS, DOWNLOADS):
        lines += [f"## {table.name.capitalize()}", "", "```mermaid", table.mermaid(), "```", ""]
    return "\n".join(lines)


def http_page() -> str:
    from tools.docs_http import rows

    lines = ["# HTTP", "", NOTE, ""]
    lines += [
        "JSON in and out; streams are `text/event-stream`. The orchestrator is the one address for clients; agents and",
        "workers listen on loopback and demand the token in their run files. `GET /openapi.json` of the orchestrator",
        "has the shapes; errors are those of [errors.md](errors.md).",
        "",
    ]
    for daemon, found in rows().items():
        lines += [f"## {daemon}", "", "| route | what |", "|---|---|"]
        lines += [f"| `{method} {path}` | {text} |" for path, method, text in found]
        lines.append("")
    return "\n".join(lines)


def cli_page() -> str:
    import click

    from arriero.cli.main import cli

    lines = ["# Command line", "", NOTE, ""]

    def add(command: click.Command, name: str, parent: click.Context | None) -> None:
        context = click.Context(
            command, info_name=name, parent=parent, terminal_width=100, max_content_width=100
        )
        lines.extend([f"## `{context.command_path}`", "", "```", command.get_help(context), "```", ""])
        if isinstance(command, click.Group):
            for child in command.list_commands(context):
                found = command.get_command(context, child)
                if found is not None and not found.hidden:
                    add(found, child, context)

    add(cli, "arriero", None)
    return "\n".join(lines)


PAGES: dict[str, Callable[[], str]] = {
    "cli.md": cli_page,
    "errors.md": errors_page,
    "http.md": http_page,
    "settings.md": settings_page,
    "states.md": states_page,
}


def stale() -> list[str]:
    """Return the names of the pages that differ from what the code says."""
    return [
        name
        for name, make in PAGES.items()
        if not (FOLDER / name).exists() or (FOLDER / name).read_text("utf-8") != make()
    ]


def main() -> int:
    if "--check" in sys.argv:
        for name in stale():
            print(f"docs/reference/{name} is stale: make docs")
        return 1 if stale() else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, make in PAGES.items():
        (FOLDER / name).write_text(make(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
