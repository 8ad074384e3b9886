"""What does a choice cost in a large pool?  1,000 nodes, 5,000 workers: `python -m tests.bench.placement`.

The views are those of the orchestrator, fed with the events that agents send; between two choices
beats and leases change them as they would.  The plain loop looks at every worker, as a choice
without an index does.
"""

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from arriero.contracts.events import NodeChanged, PoolWorkerChanged
from arriero.contracts.records import DeviceRecord, ModelRecord, NodeRecord, WorkerRecord
from arriero.contracts.states import NodeState, WorkerState
from arriero.domain.placement import Wants, choose_node, choose_worker
from arriero.orchestrator.views import PoolViews
from arriero.runtime.clock import SystemClock
from tests.bench import full_pool
from tests.bench.full_pool import us

NODES = 1_000
WORKERS = 5_000
CHOICES = 3_000
#: Of the models that are loaded most share a few, as in a pool of people.
MODELS = ("hf:org/common", *(f"hf:org/model-{number}" for number in range(40)))


def pool(chance: random.Random) -> PoolViews:
    """Return the views of a pool: one node in three has a card; every worker is idle or busy."""
    views = PoolViews(SystemClock())
    for record in fill(views, chance, range(2_000, 60_000)):
        views.take(PoolWorkerChanged(worker=record))
    return views


def fill(views: PoolViews, chance: random.Random, free_mb: range) -> list[WorkerRecord]:
    """Tell the views of the nodes; return the workers."""
    for number in range(NODES):
        views.take(NodeChanged(node=_node(chance, number, free_mb)))
        views.models_told(f"n-{number:04}", [_model(chance.choice(MODELS)) for _ in range(3)])
    return [_worker(chance, number) for number in range(WORKERS)]


def _devices(
    chance: random.Random, has_card: bool, of_mb: range = range(2_000, 60_000)
) -> list[DeviceRecord]:
    free_mb = chance.choice(of_mb)
    found = [DeviceRecord(id="cpu", backend="cpu", name="CPU", memory_mb=64_000, memory_free_mb=free_mb)]
    if has_card:
        free_mb = chance.randrange(1_000, 24_000)
        found.append(
            DeviceRecord(id="cuda:0", backend="cuda", name="GPU", memory_mb=24_000, memory_free_mb=free_mb)
        )
    return found


def _node(chance: random.Random, number: int, free_mb: range) -> NodeRecord:
    has_card = number % 3 == 0
    devices = _devices(chance, has_card, free_mb)
    return NodeRecord(
        name=f"n-{number:04}", status=NodeState.READY, version="1", devices=devices,
        backends=["cuda", "cpu"] if has_card else ["cpu"], ram_mb=64_000,
        ram_free_mb=devices[0].memory_free_mb, disk_free_mb=chance.randrange(100_000),
        labels={"room": str(number % 10)},
    )  # fmt: skip


def _model(model_ref: str) -> ModelRecord:
    return ModelRecord(
        model_id="m-0123456789ab", model_ref=model_ref, provider="hf", files=["a.gguf"], size_bytes=4 << 30,
        sha256="0" * 64, added_unix=1.0, block_count=32, head_count=32, head_count_kv=8,
        embedding_length=4096, context_length=8192,
    )  # fmt: skip


def _worker(chance: random.Random, number: int) -> WorkerRecord:
    free = chance.randrange(5)
    return WorkerRecord(
        worker_id=f"w-{number:012x}", node=f"n-{number % NODES:04}", url="http://127.0.0.1:1",
        model_ref=MODELS[0] if number % 2 else chance.choice(MODELS), backend="cpu", device="cpu",
        state=WorkerState.IDLE if free == 4 else WorkerState.BUSY, slots_total=4, slots_available=free,
        pid=1, started_unix=1.0, last_activity_unix=1.0, memory_mb=4_000,
    )  # fmt: skip


def _timed(choose: Callable[[int], object], between: Callable[[int], None], times: int) -> list[float]:
    found = []
    for number in range(times):
        between(number)
        # Of the processor, so that programs beside this one are not measured with it.
        start = time.thread_time()
        choose(number)
        found.append(time.thread_time() - start)
    return found


def measure() -> dict[str, Any]:
    """Return p50 and p99 of each choice in microseconds of the processor, and how many times a plain loop takes."""
    chance = random.Random(7)
    views = pool(chance)
    leases: list[tuple[str, str]] = []

    def news(number: int) -> None:
        """A beat, a request that begins or ends."""
        name = f"n-{chance.randrange(NODES):04}"
        devices = _devices(chance, int(name[2:]) % 3 == 0)
        views.beat(
            name, ram_free_mb=devices[0].memory_free_mb, disk_free_mb=50_000, devices=devices, promised_mb={}
        )
        best = views.workers.best(Wants(MODELS[number % len(MODELS)]))
        if best is not None:
            views.leased(best.worker_id)
            leases.append((best.worker_id, best.node))
        if len(leases) > 500:
            views.released(*leases.pop(chance.randrange(len(leases))))

    def worker(number: int) -> object:
        return views.workers.best(Wants(MODELS[0] if number % 2 else MODELS[number % len(MODELS)]))

    def node(number: int) -> object:
        wants = Wants(f"hf:org/new-{number % 7}" if number % 2 else MODELS[number % len(MODELS)])
        return views.index.best(wants, 8_000, views.facts(wants.model_ref))

    def labelled(number: int) -> object:
        wants = Wants(MODELS[number % len(MODELS)], labels=(("room", str(number % 10)),))
        return views.index.best(wants, 8_000, views.facts(wants.model_ref))

    def plain(number: int) -> object:
        return choose_worker(views.workers, Wants(MODELS[number % len(MODELS)]))

    def plain_node(number: int) -> object:
        wants = Wants(MODELS[number % len(MODELS)])
        return choose_node(views.nodes(), wants, 8_000, views.facts(wants.model_ref))

    start = time.thread_time()
    for number in range(CHOICES):
        news(number)
    news_s = (time.thread_time() - start) / CHOICES
    workers = _timed(worker, news, CHOICES)
    nodes = _timed(node, news, CHOICES)
    loop = _timed(plain, news, 100)
    node_loop = _timed(plain_node, news, 100)
    return {
        "nodes": NODES,
        "workers": WORKERS,
        "worker": us(workers),
        "node": us(nodes),
        "node_with_labels": us(_timed(labelled, news, CHOICES)),
        "news_us": round(1e6 * news_s, 1),
        "worker_loop": us(loop),
        "worker_loop_to_index": round(statistics.median(loop) / statistics.median(workers), 1),
        "full": full_pool.measure(fill),
        "node_loop": us(node_loop),
        "node_loop_to_index": round(statistics.median(node_loop) / statistics.median(nodes), 1),
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
    sys.exit(0)
