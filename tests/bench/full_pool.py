"""What does a decision cost where no node has room, and what those that wait for one?

Part of `tests/bench/placement.py`.  The decision is the whole of it: a node that has room, workers that
would make it, less context, waiting, waking.  The time on the clock is told beside the
processor's: whoever waits for an answer waits for the former, and programs beside this one are in it.
"""

import asyncio
import random
import statistics
import time
from typing import Any, Protocol

import msgspec

from arriero.contracts.records import DeviceRecord, WorkerRecord
from arriero.contracts.states import WorkerState
from arriero.domain.placement import Wants
from arriero.domain.placement_memory import Needed
from arriero.orchestrator.feed import Feed
from arriero.orchestrator.nodes import NodeRegistry
from arriero.orchestrator.room import RoomFinder
from arriero.orchestrator.views import PoolViews
from arriero.runtime.clock import SystemClock
from arriero.runtime.settings import Settings

DECISIONS = 1_000
#: Free of each device, and what a new worker needs; those that are there take 4,000, five on a node.
FREE_MB = range(500, 4_000)
SIZES_MB = {
    # Two idle ones make room, on a node in four.
    "idle_ones_go": 8_400,
    # All of a node would have to: those that compute are waited for.
    "busy_ones_are_waited_for": 22_000,
    "nothing_helps": 60_000,
}
WAITING = 100
CHANGES_PER_S = 1_000
WATCHED_S = 2.0


class Pool(Protocol):
    """What makes a pool."""

    def __call__(self, views: PoolViews, chance: random.Random, free_mb: range) -> list[WorkerRecord]:
        """Tell the views of the nodes; return the workers."""
        ...


class _News:
    """Beats, and workers that become busy or idle, as they come in a pool at work."""

    def __init__(self, registry: NodeRegistry, chance: random.Random, workers: list[WorkerRecord]) -> None:
        self._registry = registry
        self._chance = chance
        self._workers = workers
        self._nodes = list(registry.views.nodes())
        self._now = 1.0
        for record in workers:
            registry.observe(record)

    def one(self) -> None:
        node = self._chance.choice(self._nodes)
        free_mb = self._chance.choice(FREE_MB)
        devices: list[DeviceRecord] = [
            msgspec.structs.replace(device, memory_free_mb=free_mb) for device in node.devices
        ]
        self._registry.views.beat(
            node.name, ram_free_mb=free_mb, disk_free_mb=50_000, devices=devices, promised_mb={}
        )
        number = self._chance.randrange(len(self._workers))
        is_idle = self._chance.randrange(5) == 4
        self._now += 0.001
        self._workers[number] = msgspec.structs.replace(
            self._workers[number], state=WorkerState.IDLE if is_idle else WorkerState.BUSY,
            slots_available=4 if is_idle else 1, last_activity_unix=self._now,
        )  # fmt: skip
        self._registry.observe(self._workers[number])


def us(times_s: list[float]) -> dict[str, float]:
    """Return p50 and p99 in microseconds."""
    cuts = statistics.quantiles(times_s, n=100)
    return {"p50_us": round(1e6 * cuts[49], 1), "p99_us": round(1e6 * cuts[98], 1)}


def measure(pool: Pool) -> dict[str, Any]:
    """Return what each kind of decision takes, of the processor and by the clock; and what waiting takes."""
    chance = random.Random(11)
    registry = NodeRegistry(SystemClock(), Feed())
    news = _News(registry, chance, pool(registry.views, chance, FREE_MB))
    room = RoomFinder(registry, SystemClock(), Settings())
    found: dict[str, Any] = {}
    for name, needed_mb in SIZES_MB.items():
        cpu_s, clock_s = [], []
        kinds: dict[str, int] = {}
        for number in range(DECISIONS):
            news.one()
            wants = Wants(f"hf:org/model-{number % 40}", backend="cpu")
            clock, cpu = time.perf_counter(), time.thread_time()
            decision = room.decision(wants, Needed(needed_mb, needed_mb - 200))
            cpu_s.append(time.thread_time() - cpu)
            clock_s.append(time.perf_counter() - clock)
            kind = type(decision).__name__
            kinds[kind] = kinds.get(kind, 0) + 1
        found[name] = {"cpu": us(cpu_s), "clock": us(clock_s), "decisions": kinds}
    found["waiting"] = asyncio.run(_waiting(news, room))
    return found


async def _waiting(news: _News, room: RoomFinder) -> dict[str, Any]:
    """Return how much of a core those take that wait, while something changes all the time."""
    needed = Needed(22_000, 22_000)
    alone = await _cpu_of_core(news)
    async with asyncio.TaskGroup() as group:
        finding = [
            group.create_task(
                room.find(Wants(f"hf:org/model-{n}", backend="cpu"), lambda _: None, needed=needed)
            )
            for n in range(WAITING)
        ]
        together = await _cpu_of_core(news)
        still = sum(not task.done() for task in finding)
        for task in finding:
            task.cancel()
    return {
        "requests": still,
        "changes_per_s": CHANGES_PER_S,
        "of_a_core": round(together - alone, 3),
        "changes_of_a_core": round(alone, 3),
    }


async def _cpu_of_core(news: _News) -> float:
    start_s, cpu_s = time.monotonic(), time.thread_time()
    made = 0
    while (passed_s := time.monotonic() - start_s) < WATCHED_S:
        while made < passed_s * CHANGES_PER_S:
            news.one()
            made += 1
        await asyncio.sleep(0.005)
    return (time.thread_time() - cpu_s) / (time.monotonic() - start_s)
