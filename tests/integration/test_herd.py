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
from arriero.runtime.http import Http
from arriero.testing.agents import wait_for
from arriero.testing.herd import Herd
from arriero.testing.herd_orchestrator import HerdOrchestrator

NODES = 20


@pytest.fixture(scope="module", autouse=True)
def herd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Herd]:
    with Herd(tmp_path_factory.mktemp("herd"), nodes=NODES) as running:
        yield running


async def test_its_words_are_an_agents(herd: Herd) -> None:
    decoder = msgspec.json.Decoder(AgentEvent)
    told: list[AgentEvent] = []
    async with Http() as http, asyncio.timeout(10):
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


@pytest.mark.timeout(60)
def test_a_herd_is_held_is_missed_and_comes_back(herd: Herd, tmp_path: Path) -> None:
    with HerdOrchestrator(herd, tmp_path / "home") as orchestrator:
        orchestrator.settled_s(since_s=time.monotonic(), limit_s=20)
        assert len(orchestrator.client.workers()) == 5 * NODES
        herd.silence(5)
        wait_for(lambda: orchestrator.ready() == set(herd.names[5:]), "the silent are missed")
        herd.speak()
        wait_for(lambda: orchestrator.ready() == set(herd.names), "they are back")
        before = {node.name: node.lease for node in orchestrator.client.nodes()}
        herd.drop()
        orchestrator.settled_s(since_s=time.monotonic(), limit_s=20)
        orchestrator.end()
        orchestrator.start()
        orchestrator.settled_s(since_s=time.monotonic(), limit_s=20)
        after = {node.name: node.lease for node in orchestrator.client.nodes()}
        assert len(orchestrator.client.workers()) == 5 * NODES
        assert all(after[name] > before[name] for name in herd.names)
