"""Which options do several commands share?"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from arriero.cli import completing
from arriero.client import discovery
from arriero.client.api import Orchestrator
from arriero.client.connection import CALL_CODES, FailureCodes, Limits
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.runtime.state_dir import StateDir

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No steps and no progress on stderr.")

model_option = click.option(
    "-m",
    "--model",
    metavar="REF",
    envvar="ARRIERO_DEFAULT_MODEL",
    help="Model reference; default: the orchestrator's.",
    shell_complete=completing.models,
)
label_option = click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="K=V",
    help="Only on nodes with this label; may be repeated.",
    shell_complete=completing.labels,
)


def node_option(text: str) -> Callable[[F], F]:
    """Return the option that names a machine of the pool; `text` says what for."""
    return click.option("--node", metavar="NAME", help=text, shell_complete=completing.nodes)


def labels_of(given: Sequence[str]) -> dict[str, str]:
    """Return the labels of `--label K=V`.  Raises wrong usage."""
    labels: dict[str, str] = {}
    for text in given:
        name, is_pair, value = text.partition("=")
        if not is_pair or not name:
            raise click.BadParameter(f"{text!r} is not of the form K=V", param_hint="--label")
        labels[name] = value
    return labels


def examples(lines: Sequence[str]) -> str:
    """Return the epilog of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def state() -> StateDir:
    """Return the state folder of this command."""
    return discovery.state_of()


def orchestrator(*, codes: FailureCodes = CALL_CODES, timeout_s: float = 30.0) -> Orchestrator:
    """Return a client of the orchestrator.  Raises NOT_RUNNING."""
    return client_of(discovery.orchestrator(), codes=codes, timeout_s=timeout_s)


def client_of(
    address: discovery.Address, *, codes: FailureCodes = CALL_CODES, timeout_s: float = 30.0
) -> Orchestrator:
    """Return a client of the orchestrator at an address."""
    limits = Limits(total_s=timeout_s, attempts=3)
    return Orchestrator(address.url, address.token, codes=codes, limits=limits)


def refuse(message: str, **details: Any) -> ArrieroError:
    """Return the error of an argument that cannot be."""
    return ArrieroError(ErrorCode.INVALID_REQUEST, message, **details)
