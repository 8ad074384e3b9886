"""Is a simulated agent one to the orchestrator, and does a herd of them break as it is told?"""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from arriero.client.api import Agent
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import AgentBeat, AgentEvent, AgentSnapshot
from arriero.contracts.records import Capabilities, ModelList, WorkerList
from arriero.contracts.states import NodeState
from arriero.fabrics.base import Connection, NodeAddress, OnHeard, OnRetry
from arriero.orchestrator.feed import Feed
from arriero.orchestrator.links import NodeLink
from arriero.orchestrator.nodes import NodeRegistry
from arriero.orchestrator.reach import SshReach
from arriero.orchestrator.store import open_database
from arriero.orchestrator.store.nodes import NodeStore
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SystemEntropy
from arriero.runtime.http import Http
from arriero.testing.agents import wait_for
from arriero.testing.herd import Herd, HerdFabric
from arriero.testing.herd_orchestrator import HerdOrchestrator

NODES = 20


@pytest.fixture(scope="module", autouse=True)
def herd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    with Herd(tmp_path_factory.mktemp("herd"), nodes=NODES) as running:
        yield running


async def test_its_words_are_an_agents(herd: Herd) -> None:
    decoder = msgspec.json.Decoder(AgentEvent)
    told: list[AgentEvent] = []
    async with Http() as http, asyncio.timeout(60):
        run = herd.runs[3]
        peer = http.peer(run.url, run.token)
        events = peer.events("/v1/events")
        async for event in events:
            told.append(decoder.decode(event.data))
            if len(told) == 3:
                break
        await events.aclose()
        has = await peer.call("GET", "/v1/capabilities", answer=Capabilities)
        workers = (await peer.call("GET", "/v1/workers", answer=WorkerList)).workers
        models = (await peer.call("GET", "/v1/models", answer=ModelList)).models
    first, *beats = told
    assert isinstance(first, AgentSnapshot) and all(isinstance(beat, AgentBeat) for beat in beats)
    assert (first.capabilities, first.workers, first.models) == (has, workers, models)
    assert has.name == herd.names[3] and len(workers) == 5 and models
    assert set(first.worker_tokens) == {worker.worker_id for worker in workers}
    assert isinstance(beats[0], AgentBeat) and {device.id for device in has.devices} == set(
        beats[0].device_free_mb
    )


def test_a_token_is_demanded_and_tells_which_agent(herd: Herd) -> None:
    assert [Agent(run.url, run.token).health().name for run in herd.runs] == herd.names
    with pytest.raises(ArrieroError) as caught:
        Agent(herd.runs[0].url, "of nobody").health()
    assert caught.value.code is ErrorCode.INVALID_API_KEY


def test_a_herd_is_held_is_missed_and_comes_back(herd: Herd, tmp_path: Path) -> None:
    with HerdOrchestrator(herd, tmp_path / "home") as orchestrator:
        orchestrator.settled_s(since_s=time.monotonic(), limit_s=60)
        assert len(orchestrator.client.workers()) == 5 * NODES
        try:
            herd.silence(5)
            wait_for(lambda: orchestrator.ready() == set(herd.names[5:]), "the silent are missed")
        finally:
            herd.speak()
        wait_for(lambda: orchestrator.ready() == set(herd.names), "they are back")
        before = {node.name: node.lease for node in orchestrator.client.nodes()}
        herd.drop()
        orchestrator.settled_s(since_s=time.monotonic(), limit_s=60)
        orchestrator.end()
        orchestrator.start()
        orchestrator.settled_s(since_s=time.monotonic(), limit_s=60)
        after = {node.name: node.lease for node in orchestrator.client.nodes()}
        assert len(orchestrator.client.workers()) == 5 * NODES
        assert all(after[name] > before[name] for name in herd.names)


class _FirstIsGone(HerdFabric):
    """The first connection that it makes is gone before anybody has used it."""

    made = 0

    async def connect(
        self, address: NodeAddress, on_retry: OnRetry | None = None, on_heard: OnHeard | None = None
    ) -> Connection:
        connection = await super().connect(address, on_retry)
        self.made += 1
        if self.made == 1:
            await connection.aclose()
        return connection


async def test_a_line_that_is_gone_from_its_beginning_is_made_anew(herd: Herd, tmp_path: Path) -> None:
    clock, entropy = SystemClock(), SystemEntropy()
    entry = herd.entries()[0]
    fabric = _FirstIsGone(herd.folder, entropy)
    database = await open_database(tmp_path / "orchestrator.db")
    try:
        async with Http() as http, asyncio.timeout(60):
            leases = await NodeStore.open(database, entropy)
            registry = NodeRegistry(clock, Feed())
            node = registry.add(entry)
            reach = SshReach(entry, fabric, http, leases, clock)
            link = NodeLink(
                registry,
                reach,
                clock,
                entropy,
                attention=http.attention,
                node_timeout_s=3,
                connect_timeout_s=10,
                name=entry.name,
            )
            async with asyncio.TaskGroup() as group:
                holding = group.create_task(link.run())
                while node.state is not NodeState.READY:
                    await registry.changed.wait()
                holding.cancel()
    finally:
        await database.close()
    assert fabric.made == 2
