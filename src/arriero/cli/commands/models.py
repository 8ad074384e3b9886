"""`arriero models`: which models does this machine have?"""

from typing import Final

import click

from arriero.cli import options, render
from arriero.client import discovery
from arriero.client.api import Agent, Orchestrator
from arriero.client.connection import Limits
from arriero.contracts.errors import Exit

_LIMITS: Final = Limits(total_s=30.0, attempts=3)


@click.group(epilog=options.examples(("arriero models list", "arriero models list --pool --json")))
def models() -> None:
    """Show which models this machine has."""


@models.command("list", epilog=options.examples(("arriero models list", "arriero models list --pool")))
@click.option("--pool", is_flag=True, help="Ask the orchestrator what the whole pool answers for.")
@options.json_option
def list_models(*, pool: bool, as_json: bool) -> int:
    """List the verified models in this machine's catalog."""
    if pool or discovery.given_orchestrator() is not None:
        return _list_pool(as_json=as_json)
    address = discovery.agent()
    found = Agent(address.url, address.token, limits=_LIMITS).models()
    if as_json:
        render.data({"models": found})
        return Exit.OK
    render.table(
        ("model", "size", "quantisation", "architecture", "context", "used", "id"),
        [
            [
                record.model_ref,
                render.bytes_text(record.size_bytes),
                record.quantisation,
                record.architecture,
                str(record.context_length or ""),
                f"{record.times_used}×",
                record.model_id,
            ]
            for record in found
        ],
    )
    return Exit.OK


def _list_pool(*, as_json: bool) -> int:
    address = discovery.orchestrator()
    found = Orchestrator(address.url, address.token, limits=_LIMITS).models()
    if as_json:
        render.data({"models": found})
    else:
        render.table(("model", "owner"), [[record.id, record.owned_by] for record in found])
    return Exit.OK
