"""A worker's way to its node among several: what happens to others meanwhile, and where it goes on if one refuses.

The orchestrator's parts run in this process, so that a test may stop them at a chosen moment; the agents are
scripted, and are spoken to over real links.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.integration.orchestrator.scripted import ScriptedAgent, agent, download_frame
from tests.integration.orchestrator.test_room import A, B, C, model

from arriero.contracts.errors import ErrorCode
from arriero.contracts.records import Capabilities
from arriero.contracts.states import DownloadState, NodeState
from arriero.domain.placement import Wants
from arriero.fabrics.local import LocalConnection
from arriero.orchestrator.feed import Feed
from arriero.orchestrator.links import NodeLink
from arriero.orchestrator.nodes import NodeRegistry
from arriero.orchestrator.provisioning import Job, ModelProvisioner
from arriero.orchestrator.reach import LocalReach
from arriero.orchestrator.room import RoomFinder
from arriero.orchestrator.store.nodes import NodeEntry
from arriero.runtime.attention import Attention
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SystemEntropy
from arriero.runtime.http import Http
from arriero.runtime.settings import Settings

WAIT_S = 20.0


class Numbers:
    """Who hands out leases."""

    holder_id = "o-1"

    async def next_lease(self, above: int = 0) -> int:
        """Return the next one."""
        return above + 1


@dataclass
class Placed:
    """An orchestrator's parts, with the agents of its nodes."""

    registry: NodeRegistry
    provisioner: ModelProvisioner
    agents: dict[str, ScriptedAgent]

    def asks(self, model_ref: str, node: str | None = None) -> Job:
        """Return the job of somebody who waits for a worker."""
        wants = Wants(model_ref, node)
        job = self.provisioner.job(wants)
        job.followers.append(wants)
        return job

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until it is so; what a beat tells is no news."""
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def over(job: Job) -> Job:
    while not job.is_over:
        await job.changed.wait()
    return job


def told(job: Job) -> str:
    return "\n".join(step.message for _, step in job.steps)


class Over(Exception):
    """A test has ended, and with it what runs for ever."""


@asynccontextmanager
async def until_over() -> AsyncIterator[asyncio.TaskGroup]:
    try:
        async with asyncio.TaskGroup() as group:
            yield group
            raise Over
    except* Over:
        pass


@asynccontextmanager
async def nodes(folder: Path, *names: str) -> AsyncIterator[Placed]:
    """Have nodes with 7,578 MiB free each."""
    clock, entropy = SystemClock(), SystemEntropy()
    registry = NodeRegistry(clock, Feed())
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(asyncio.timeout(WAIT_S))
        http = await stack.enter_async_context(Http())
        agents = {name: await stack.enter_async_context(agent(folder / name, name)) for name in names}
        group = await stack.enter_async_context(until_over())
        room = RoomFinder(registry, clock, Settings(starvation_s=1.0, stop_grace_s=1.0))
        provisioner = ModelProvisioner(registry, room, group, clock)
        for number, (name, scripted) in enumerate(agents.items()):
            scripted.workers_made = number << 8
            has = Capabilities(
                name=name, version="", api_version=0, backends=[], devices=[], engines={}, ram_mb=0,
                ram_free_mb=0, disk_free_mb=0, cpu_cores=0, os="", arch="",
            )  # fmt: skip
            registry.add(NodeEntry(name=name, ssh="u@h", install_path="arr", capabilities=has))
            reach = LocalReach(scripted.folder, http, Numbers(), LocalConnection(entropy, folder))
            link = NodeLink(
                registry, reach, clock, entropy,
                attention=Attention(), node_timeout_s=5, connect_timeout_s=5, name=name,
            )  # fmt: skip
            group.create_task(link.run())
        placed = Placed(registry, provisioner, agents)
        await placed.until(lambda: all(node.state is NodeState.READY for node in registry.nodes()))
        yield placed


async def has(placed: Placed, name: str, *model_refs: str, size_mb: int = 5000) -> None:
    """Have models on the disk of a node, with what a worker of them takes."""
    scripted = placed.agents[name]
    scripted.spawn.fractions = ()
    scripted.memory_of |= dict.fromkeys(model_refs, size_mb)
    scripted.has_models(*scripted.models, *[model(ref, size_mb) for ref in model_refs])
    await placed.until(lambda: all(placed.registry.views.has_model(name, ref) for ref in model_refs))


async def loaded(placed: Placed, name: str, model_ref: str) -> None:
    """Have an idle worker on a node, of which it is known what it takes."""
    scripted, views = placed.agents[name], placed.registry.views
    worker = await scripted.add_worker(model_ref)
    await placed.until(lambda: worker.worker_id in [view.worker_id for view in views.workers.of_node(name)])
    await placed.until(lambda: _free_mb(placed, name) == scripted.ram_free_mb)


def _free_mb(placed: Placed, name: str) -> int:
    view = placed.registry.views.node(name)
    return view.ram_free_mb if view is not None else 0


async def test_nobody_makes_room_and_no_memory_is_kept_before_the_model_is_there(tmp_path: Path) -> None:
    async with nodes(tmp_path, "laptop", "workstation") as placed:
        far = placed.agents["workstation"]
        await has(placed, "laptop", B)
        await has(placed, "workstation", A)
        await has(placed, "workstation", C, size_mb=2000)
        await loaded(placed, "workstation", A)
        far.download_frames = [download_frame(DownloadState.COMPLETE, 1000)]
        far.download_gate.clear()
        job = placed.asks(B, "workstation")
        await far.download_asked.wait()
        # It may take hours: who is there is asked on, and who fits beside it begins.
        assert placed.registry.views.workers.best(Wants(A)) is not None
        assert (await over(placed.asks(C, "workstation"))).error is None
        # What is pinned meanwhile stays.
        far.has_models(model(A, is_pinned=True), model(B), model(C, 2000))
        await placed.until(lambda: placed.registry.views.has_model("workstation", B))
        far.download_gate.set()
        await over(job)
        assert job.error is not None and job.error.code is ErrorCode.INSUFFICIENT_RAM
        assert "workstation lacks hf:org/b: fetches it before others make room" in told(job)
        assert {worker.record.model_ref for worker in far.workers.values()} == {A, C}


async def test_the_room_for_a_model_that_was_fetched_is_made_then(tmp_path: Path) -> None:
    async with nodes(tmp_path, "andes") as placed:
        andes = placed.agents["andes"]
        await has(placed, "andes", A)
        await loaded(placed, "andes", A)
        andes.download_frames = [download_frame(DownloadState.COMPLETE, 1000)]
        andes.download_gate.clear()
        # Nobody knows yet how large it is.
        job = placed.asks(B)
        await andes.download_asked.wait()
        andes.memory_of[B] = 5000
        andes.has_models(model(A), model(B))
        andes.download_gate.set()
        await over(job)
        assert job.error is None, job.error
        assert "stops what was used longest ago: 1 worker (hf:org/a)" in told(job)
        assert [worker.record.model_ref for worker in andes.workers.values()] == [B]


async def test_whose_place_was_taken_while_the_model_came_begins_where_there_is_room(tmp_path: Path) -> None:
    async with nodes(tmp_path, "andes", "bolivia") as placed:
        andes, bolivia = placed.agents.values()
        await has(placed, "andes", A)
        for scripted in (andes, bolivia):
            scripted.download_frames = [download_frame(DownloadState.COMPLETE, 1000)]
        andes.download_gate.clear()
        job = placed.asks(B)
        await andes.download_asked.wait()
        await loaded(placed, "andes", A)
        await has(placed, "andes", B)
        andes.download_gate.set()
        await over(job)
        assert job.error is None, job.error
        assert [body.model_ref for body in bolivia.spawned] == bolivia.downloaded == [B]
        assert [worker.record.model_ref for worker in andes.workers.values()] == [A]
