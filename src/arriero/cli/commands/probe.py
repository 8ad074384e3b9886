"""`arriero probe NAME …`: one question, one exit code."""

from typing import Any

import click

from arriero.cli import options, render
from arriero.contracts.errors import KINDS, from_body
from arriero.probes.registry import PROBES, Option, Probe
from arriero.probes.result import ProbeResult
from arriero.probes.where import Where


@click.group(
    epilog=options.examples(
        (
            "arriero probe worker-health",
            "arriero probe tokens --prompt 'Count from 5 to 25.' --json",
            "arriero probe worker-state --expect idle --through busy",
        )
    )
)
def probe() -> None:
    """Ask one question about the pool.

    Exit codes: 0 yes, 1 no (the error's code says why), 124 no answer in time.
    """


def _option(option: Option) -> click.Option:
    kind: Any = click.Choice(option.choices) if option.choices else option.kind
    if option.kind is bool:
        return click.Option([option.flag, option.name], is_flag=True, default=False, help=option.help)
    # A default of None would count as given, and nothing would be required any more.
    more: dict[str, Any] = {"required": True} if option.is_required else {"default": option.default}
    return click.Option(
        [option.flag, option.name],
        type=kind,
        show_default=option.default is not None,
        help=option.help,
        **more,
    )


def _parameters(row: Probe) -> list[click.Parameter]:
    parameters: list[click.Parameter] = []
    if row.is_of_url:
        parameters.append(click.Argument(["url"]))
    else:
        replaced = f"Address that replaces {row.url_replaces}."
        parameters.append(click.Option(["--url"], default=None, help=replaced))
        # Some probes ask the agent in any case; the flag is taken there, too, and not shown.
        is_agent = click.Option(
            ["--agent", "is_agent"], is_flag=True, hidden=row.is_of_agent, help="Ask the agent's registry."
        )
        parameters.append(is_agent)
    if row.has_worker:
        parameters.append(click.Option(["--worker", "worker_id"], default=None, help="Id of the worker."))
    parameters += [_option(option) for option in row.options]
    timeout = click.FloatRange(min=0, min_open=True)
    parameters.append(
        click.Option(
            ["--timeout", "timeout_s"],
            type=timeout,
            default=row.timeout_s,
            show_default=True,
            help="Limit, seconds.",
        )
    )
    parameters.append(
        click.Option(["--json", "as_json"], is_flag=True, help="Print the answer as JSON on stdout.")
    )
    return parameters


def _ends(row: Probe) -> str:
    """Return by which exit code and which error it may end, for the help."""
    by_exit: dict[int, list[str]] = {}
    for code in row.codes:
        by_exit.setdefault(int(KINDS[code].exit_code), []).append(str(code))
    lines = [f"Exit {exit_code}: {', '.join(codes)}." for exit_code, codes in sorted(by_exit.items())]
    return "\n\n".join(["Exit 0: it is so.", *lines])


def _make(row: Probe) -> click.Command:
    def run(*, as_json: bool, **given: Any) -> int:
        if not row.is_of_url:
            given["where"] = Where(given.pop("url"), given.pop("is_agent"), given.pop("worker_id", None))
        if row.is_telling:
            given["tell"] = render.note
        result = row.ask(**given)
        _show(result, as_json=as_json)
        return result.exit_code

    shown = options.examples(_examples(row))
    return click.Command(
        row.name,
        params=_parameters(row),
        callback=run,
        help=f"{row.help}\n\n{_ends(row)}",
        short_help=row.help,
        epilog=shown,
    )


def _examples(row: Probe) -> list[str]:
    """Return how a probe is called at its plainest, and with its result as data."""
    needed = " http://127.0.0.1:9200/…" if row.is_of_url else ""
    for option in row.options:
        if option.is_required:
            needed += f" {option.flag} {option.choices[0] if option.choices else option.name.upper()}"
    return [f"arriero probe {row.name}{needed}", f"arriero probe {row.name}{needed} --json --timeout 5"]


def _show(result: ProbeResult, *, as_json: bool) -> None:
    if as_json:
        render.data(result.as_json())
    elif result.error is None:
        render.out(f"{result.probe}: ok{_told(result.seen)}")
    else:
        render.error(from_body(result.error.error))


def _told(seen: dict[str, Any]) -> str:
    """Return the short ones of what was seen, for a person's eye."""
    parts = []
    for name, value in seen.items():
        if isinstance(value, str | int | float) and value != "" and name != "url":
            parts.append(f"{name}={value}" if name != "text" else f"text={value!r}")
        elif isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            shown = len(value) if name == "tokens" else " → ".join(value)
            parts.append(f"{name}={shown}")
    return f" ({', '.join(parts)})" if parts else ""


for _row in PROBES.values():
    probe.add_command(_make(_row))
