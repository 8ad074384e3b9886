"""`arriero models`: which models does this machine have, and how does it get one?"""

from pathlib import Path
from typing import Final

import click

from arriero.cli import options, pool, render
from arriero.cli.narrator import Narrator
from arriero.cli.signals import terminable
from arriero.client import discovery
from arriero.client.api import Agent, Orchestrator
from arriero.client.connection import Limits
from arriero.contracts import refs
from arriero.contracts.errors import Exit
from arriero.contracts.requests import DownloadBody

_LIMITS: Final = Limits(total_s=30.0, attempts=3)


_PULL_EXAMPLES: Final = (
    "arriero models pull hf:org/repo:Q4_K_M",
    "arriero models pull --node attic https://example.com/model.gguf",
    "arriero models pull --from /media/other/arriero hf:org/repo",
)


@click.group(
    epilog=options.examples(("arriero models pull hf:org/repo:Q4_K_M", "arriero models list --json"))
)
def models() -> None:
    """Fetch models, and keep them in order."""


@models.command("pull", epilog=options.examples(_PULL_EXAMPLES))
@click.argument("ref")
@click.option("--node", metavar="NAME", help="Onto this machine of the pool; default: where it fits best.")
@click.option("--from", "homes", multiple=True, metavar="FOLDER", type=click.Path(path_type=Path),
              help="State folder of another agent on this machine, which is asked first.")  # fmt: skip
@click.option("--keep", is_flag=True, help="The download goes on when this command is interrupted.")
@click.option("--clean", is_flag=True, help="Keep nothing of a download that fails or is cancelled.")
@options.quiet_option
@options.json_option
def pull(
    *,
    ref: str,
    node: str | None,
    homes: tuple[Path, ...],
    keep: bool,
    clean: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Fetch and verify a model, and print its id.

    A download that was cut, killed or cancelled goes on where it stopped.  What this machine, another
    program on it, or another node of the pool has already is not fetched from the internet.  Ctrl-C
    cancels it, unless somebody else waits for it as well.

    Exit codes: 0 the model is there, 1 error, 2 wrong usage, 124 timed out, 130 interrupted.
    """
    from arriero.cli import pulling

    refs.parse(ref)
    peers = [discovery.peer_of(home) for home in homes]
    narrator = Narrator(is_quiet=quiet)
    body = DownloadBody(model_ref=ref, node=node, peers=peers, clean=clean)
    with terminable(), pool.serving(is_ephemeral=False, narrator=narrator, timeout_s=None) as client:
        started, last = pulling.pull(client, body, narrator=narrator, keep=keep)
        record = client.node_agent(started.node).model_of(ref)
    if as_json:
        render.data({"node": started.node, "source": last.source, "model": record})
    else:
        narrator.say(
            started.node,
            f"has {ref} ({render.bytes_text(record.size_bytes)}, from {last.source or 'its source'})",
        )
        render.out(record.model_id)
    return Exit.OK


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
