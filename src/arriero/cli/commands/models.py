"""`arriero models`: which models does this machine have, and how does it get one?"""

from pathlib import Path
from typing import Final

import click

from arriero.cli import model_agent, options, pool, render
from arriero.cli.commands import model_upkeep
from arriero.cli.narrator import Narrator
from arriero.cli.signals import terminable
from arriero.client import discovery
from arriero.client.api import Orchestrator
from arriero.client.connection import Limits
from arriero.contracts import refs
from arriero.contracts.errors import ArrieroError, ErrorCode, Exit
from arriero.contracts.records import ModelEstimate, ModelRecord
from arriero.contracts.requests import DownloadBody
from arriero.contracts.states import NodeState

_LIMITS: Final = Limits(total_s=30.0, attempts=3)
_EXAMPLES: Final = ("arriero models pull hf:org/repo:Q4_K_M", "arriero models list --json")
_PULL_EXAMPLES: Final = (
    "arriero models pull hf:org/repo:Q4_K_M",
    "arriero models pull --node attic https://example.com/model.gguf",
    "arriero models pull --from /media/other/arriero hf:org/repo",
)
_SHOW_EXAMPLES: Final = (
    "arriero models show hf:org/repo:Q4_K_M",
    "arriero models show m-0123456789ab --context 32768 --slots 1 --json",
)


@click.group(epilog=options.examples(_EXAMPLES))
def models() -> None:
    """Fetch models, and keep them in order."""


@models.command("pull", epilog=options.examples(_PULL_EXAMPLES))
@click.argument("ref")
@options.node_option("Onto this machine of the pool; default: where it fits best.")
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
    peers = [model_agent.peer_of(home) for home in homes]
    narrator = Narrator(is_quiet=quiet)
    body = DownloadBody(model_ref=ref, node=node, peers=peers, clean=clean)
    with terminable(), pool.serving(is_ephemeral=False, narrator=narrator, timeout_s=None) as client:
        started, last = pulling.pull(client, body, narrator=narrator, keep=keep)
        record = client.node_agent(started.node).model_of(ref)
    if as_json:
        render.data({"node": started.node, "source": last.source, "model": record})
    else:
        size = render.bytes_text(record.size_bytes)
        narrator.say(started.node, f"has {ref} ({size}, from {last.source or 'its source'})")
        render.out(record.model_id)
    return Exit.OK


@models.command("list", epilog=options.examples(("arriero models list", "arriero models list --pool")))
@model_agent.node_option
@click.option("--pool", "of_pool", is_flag=True, help="Ask what the whole pool answers for.")
@options.json_option
def list_models(*, node: str | None, of_pool: bool, as_json: bool) -> int:
    """List the verified models in a machine's catalog."""
    if of_pool or (node is None and discovery.given_orchestrator() is not None):
        return _list_pool(as_json=as_json)
    catalog = model_agent.running_agent(node).catalog()
    found = catalog.models
    if as_json:
        render.data(catalog)
        return Exit.OK
    for notice in catalog.notices:
        render.note(f"note: {notice}")
    render.table(
        ("model", "size", "quantisation", "architecture", "context", "used", "source", "pinned", "id"),
        [
            [
                record.model_ref,
                render.bytes_text(record.size_bytes),
                record.quantisation,
                record.architecture,
                str(record.context_length or ""),
                f"{record.times_used}×",
                record.source,
                "yes" if record.is_pinned else "",
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


@models.command("show", epilog=options.examples(_SHOW_EXAMPLES))
@click.argument("model")
@click.option(
    "--context", type=click.IntRange(64, 1_048_576), help="Tokens of a slot's context to reckon with."
)
@click.option("--slots", type=click.IntRange(1, 64), help="Slots to reckon with.")
@model_agent.node_option
@options.json_option
def show(*, model: str, context: int | None, slots: int | None, node: str | None, as_json: bool) -> int:
    """Show all that is known of a model, and where in the pool it would fit.

    MODEL is a reference or an id.  What it needs is reckoned by the engine's dry run, on each device of
    each machine that has it.
    """
    with pool.serving(is_ephemeral=False, narrator=Narrator(), timeout_s=None) as client:
        with model_agent.serving_agent(node, Narrator()) as agent:
            record = model_agent.find(agent, model)
        estimates, left_out = _estimates(client, record, context=context, slots=slots)
    if as_json:
        render.data({"model": record, "estimates": estimates, "left_out": left_out})
        return Exit.OK
    for name, value in _facts(record):
        render.out(f"{name:<14}{value}")
    for file in record.parts:
        render.out(f"{'file':<14}{file.name}  {render.bytes_text(file.size_bytes)}  sha256 {file.sha256}")
    render.out("")
    for estimate in estimates:
        render.out(f"on {estimate.node}, {estimate.slots} slots of {estimate.context_tokens} tokens:")
        render.table(
            ("device", "memory", "device memory", "fits", "why not"),
            [
                [
                    device.device,
                    render.mib_text(device.host_mb),
                    render.mib_text(device.device_mb) if device.device_mb else "",
                    "yes" if device.fits else "no",
                    device.why,
                ]
                for device in estimate.devices
            ],
        )
    for name, why in left_out.items():
        render.out(f"on {name}: {why}")
    return Exit.OK


def _estimates(
    client: Orchestrator, record: ModelRecord, *, context: int | None, slots: int | None
) -> tuple[list[ModelEstimate], dict[str, str]]:
    """Return what the model needs on each node that has it, and why others say nothing."""
    estimates: list[ModelEstimate] = []
    left_out: dict[str, str] = {}
    for node in client.nodes():
        if node.status is not NodeState.READY:
            left_out[node.name] = f"is {node.status}"
            continue
        agent = client.node_agent(node.name)
        try:
            there = agent.model_of(record.model_ref)
            estimates.append(agent.model_estimate(there.model_id, context_tokens=context, slots=slots))
        except ArrieroError as error:
            is_missing = error.code is ErrorCode.MODEL_NOT_FOUND
            left_out[node.name] = "does not have it" if is_missing else f"{error.code}: {error.message}"
    return estimates, left_out


def _facts(record: ModelRecord) -> list[tuple[str, str]]:
    """Return what a person wants to know, name and value; without what is not known."""
    facts = [
        ("model", record.model_ref),
        ("id", record.model_id),
        ("source", record.source + (" (in place, never removed by us)" if record.is_external else "")),
        ("revision", record.revision),
        ("size", render.bytes_text(record.size_bytes)),
        ("sha256", record.sha256),
        ("format", record.format),
        ("architecture", record.architecture),
        ("quantisation", record.quantisation),
        ("parameters", render.count_text(record.parameters) if record.parameters else ""),
        ("context", f"{record.context_length} tokens" if record.context_length else ""),
        ("layers", str(record.block_count or "")),
        ("heads", _heads(record)),
        ("vocabulary", f"{record.vocabulary_size} tokens" if record.vocabulary_size else ""),
        ("embeddings", "its purpose" if record.is_embedding else ""),
        ("chat template", "yes" if record.has_chat_template else "no"),
        ("projector", record.projector),
        ("pinned", "yes" if record.is_pinned else ""),
        ("added", render.moment_text(record.added_unix)),
        ("last used", render.moment_text(record.last_used_unix)),
        ("times used", str(record.times_used)),
    ]
    return [(name, value) for name, value in facts if value]


def _heads(record: ModelRecord) -> str:
    if not record.head_count:
        return ""
    return f"{record.head_count}, {record.head_count_kv} of keys and values"


for _command in model_upkeep.COMMANDS:
    models.add_command(_command)
