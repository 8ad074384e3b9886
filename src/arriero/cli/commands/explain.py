"""`arriero explain`: where would a model run now, and why nowhere else?"""

from typing import Final

import click

from arriero.cli import options, render
from arriero.contracts.errors import Exit
from arriero.contracts.placements import NodeCandidate, PlacementExplained, WorkerCandidate
from arriero.contracts.requests import TaskBody

_EXAMPLES: Final = (
    "arriero explain --model hf:org/repo:Q4_K_M",
    "arriero explain --model demo --node workstation --backend cuda",
    "arriero explain --model hf:org/repo:Q8_0 --label disk=fast --json",
)

_WORKER_COLUMNS: Final = ("rank", "worker", "node", "state", "free slots", "queued", "speed", "why not")
_NODE_COLUMNS: Final = (
    "rank", "node", "status", "device", "free", "promised", "model", "speed", "load", "why not",
)  # fmt: skip


@click.command(epilog=options.examples(_EXAMPLES))
@options.model_option
@options.node_option("Only this machine of the pool.")
@click.option("--backend", metavar="NAME", help="cpu, cuda, metal…")
@click.option("--device", metavar="ID", help="cuda:0, cpu…")
@options.label_option
@options.json_option
def explain(
    *, model: str | None, node: str | None, backend: str | None, device: str | None,
    labels: tuple[str, ...], as_json: bool,
) -> int:  # fmt: skip
    """Show where a request would go now: each candidate with its numbers, and why it was refused.

    Nothing is started, stopped, fetched or woken.

    Exit codes: 0 it would be computed, 1 nothing can take it.
    """
    body = TaskBody(model=model, node=node, backend=backend, device=device, labels=options.labels_of(labels))
    explained = options.orchestrator().explain(body)
    if as_json:
        render.data(explained)
    else:
        _show(explained)
    has_place = (
        explained.worker_id,
        explained.node,
        explained.would_join,
        explained.would_evict,
        explained.would_wait_for,
        explained.would_wake,
    )
    return Exit.OK if any(has_place) else Exit.ERROR


def _show(explained: PlacementExplained) -> None:
    if explained.needed_mb is not None:
        least_mb = explained.needed_least_mb
        least = (
            f", {render.mib_text(least_mb)} at least" if least_mb not in (None, explained.needed_mb) else ""
        )
        render.out(f"{explained.model_ref} needs {render.mib_text(explained.needed_mb)}{least}")
    else:
        render.out(f"{explained.model_ref}: what it needs is known once a node has it")
    if explained.workers:
        render.out("")
        render.table(_WORKER_COLUMNS, [_worker_row(worker) for worker in explained.workers])
    if explained.nodes:
        render.out("")
        render.table(_NODE_COLUMNS, [_node_row(node) for node in explained.nodes])
    for victim in explained.would_evict:
        when = "once it is idle" if victim.is_busy else "idle"
        size = render.mib_text(victim.memory_mb)
        render.out(f"would stop {victim.worker_id} on {victim.node} ({when}): {victim.model_ref}, {size}")
    if explained.would_wake is not None:
        cost = render.seconds_text(explained.wake_cost_s or 0.0)
        render.out(f"would wake {explained.would_wake}, which is reckoned to cost {cost}")
    render.out("")
    render.out(explained.message)


def _worker_row(worker: WorkerCandidate) -> list[str]:
    return [
        str(worker.rank or ""),
        worker.worker_id,
        worker.node,
        worker.state,
        str(worker.slots_free),
        str(worker.queued),
        _speed(worker.speed_tokens_per_s),
        worker.why,
    ]


def _node_row(node: NodeCandidate) -> list[str]:
    model = "here" if node.has_model else "neighbour" if node.is_fetched_from_neighbour else "outside"
    return [
        str(node.rank or ""),
        node.name,
        node.status,
        node.device,
        render.mib_text(node.free_mb) if node.free_mb is not None else "",
        render.mib_text(node.promised_mb) if node.promised_mb > 0 else "",
        model,
        _speed(node.speed_tokens_per_s),
        str(node.load),
        node.why,
    ]


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.1f} tokens/s" if tokens_per_s else ""
