"""An agent is told to end, or let go of, by whoever holds it: what goes with it, and what stays."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from tests.integration.agent_scripts import QUICK, has_left_nothing, identity_of, scripted

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.fence import FENCE_HEADER
from arriero.contracts.records import WorkerRecord
from arriero.contracts.requests import SpawnBody
from arriero.contracts.states import WorkerState as S
from arriero.orchestrator.cascade import end_agents, release_nodes
from arriero.runtime import processes
from arriero.runtime.clock import SystemClock
from arriero.runtime.http import Http, Peer
from arriero.testing.agents import AgentProcess, wait_for

A, B = {FENCE_HEADER: f"{'a' * 16}:1"}, {FENCE_HEADER: f"{'b' * 16}:2"}
SOON = {**QUICK, "node_timeout_s": "0.3"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def peer_of(http: Http, agent: AgentProcess, headers: dict[str, str] | None = None) -> Peer:
    assert agent.run is not None
    return http.peer(agent.run.url, agent.run.token, headers=headers)


def ended(agent: AgentProcess) -> int:
    assert agent.process is not None
    return agent.process.wait(60)


@asynccontextmanager
async def held(peer: Peer, headers: dict[str, str]) -> AsyncIterator[None]:
    async with contextlib.aclosing(peer.events("/v1/events", headers=headers)) as events:
        await anext(events)
        yield


async def bound(peer: Peer, agent: AgentProcess, model_ref: str) -> WorkerRecord:
    """Start a worker that goes with A."""
    body = SpawnBody(model_ref=model_ref, bound=True)
    spawned = await peer.call("POST", "/v1/workers", body=body, headers=A, answer=WorkerRecord)
    return await asyncio.to_thread(agent.wait_worker, spawned.worker_id, S.IDLE)


async def stopped(agent: AgentProcess, record: WorkerRecord) -> str:
    after = await asyncio.to_thread(agent.wait_worker, record.worker_id, S.STOPPED)
    assert after.exit is not None
    return after.exit.message


# --- Shutting down -------------------------------------------------------------------------------


def test_an_agent_that_is_shut_down_takes_its_workers_along_and_has_not_failed(
    home: Path, models: Path
) -> None:
    with AgentProcess(home, QUICK) as agent:
        record = agent.wait_worker(agent.spawn(scripted(models)).worker_id, S.IDLE)
        identity = identity_of(agent, record.worker_id)
        agent.client.shut_down()
        # What restarts an agent that crashed must not restart this one.
        assert ended(agent) == 0
        assert has_left_nothing(agent, record, identity)
        assert not agent.state.run_file("agent").exists()


def test_it_is_answered_first_and_may_be_asked_twice(home: Path, models: Path) -> None:
    with AgentProcess(home, {**QUICK, "stop_grace_s": "5"}) as agent:
        stubborn = agent.spawn(scripted(models, drain=False, sigterm=False))
        agent.wait_worker(stubborn.worker_id, S.IDLE)
        assert agent.client.raw("POST", "/v1/admin/shutdown").status == 202
        with pytest.raises(ArrieroError) as refused:
            agent.spawn("demo")
        assert refused.value.code is ErrorCode.NO_CAPACITY
        # The second wish does not save the workers.
        assert agent.client.raw("POST", "/v1/admin/shutdown", body={"workers": False}).status == 202
        assert ended(agent) == 0
        assert agent.state.worker_runs() == []


def test_an_agent_may_leave_its_workers_to_the_next(home: Path, models: Path) -> None:
    with AgentProcess(home, QUICK) as agent:
        record = agent.wait_worker(agent.spawn(scripted(models)).worker_id, S.IDLE)
        identity = identity_of(agent, record.worker_id)
        agent.client.shut_down(workers=False)
        assert ended(agent) == 0
        assert processes.is_alive(identity)
        with AgentProcess(home, QUICK) as following:
            assert following.wait_worker(record.worker_id, S.IDLE).pid == record.pid


@pytest.mark.parametrize("body", [b"{", b'{"workers": 1}', b'{"worker": true}'])
def test_a_wish_that_is_none_ends_nothing(home: Path, body: bytes) -> None:
    with AgentProcess(home, QUICK) as agent:
        assert agent.client.raw("POST", "/v1/admin/shutdown", body=body).status == 400
        assert agent.client.health().status == "alive"


# --- The cascade ---------------------------------------------------------------------------------


async def test_agents_end_together_and_one_that_is_not_there_is_named(tmp_path: Path, models: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with AgentProcess(tmp_path / "a", QUICK) as one, AgentProcess(tmp_path / "b", QUICK) as two:
            for agent in (one, two):
                agent.wait_worker(agent.spawn(scripted(models)).worker_id, S.IDLE)
            async with Http() as http:
                agents = {"one": peer_of(http, one), "two": peer_of(http, two)}
                agents["gone"] = http.peer(f"http://127.0.0.1:{nobody.getsockname()[1]}")
                failures = await end_agents(agents, grace_s=30, clock=SystemClock())
            assert {name: error.code for name, error in failures.items()} == {
                "gone": ErrorCode.NODE_UNREACHABLE
            }
            for agent in (one, two):
                assert ended(agent) == 0 and agent.state.worker_runs() == []


# --- Letting go ----------------------------------------------------------------------------------


async def test_what_was_bound_goes_when_its_orchestrator_lets_go_and_the_rest_stays(
    home: Path, models: Path
) -> None:
    with AgentProcess(home, QUICK) as agent:
        async with Http() as http:
            peer = peer_of(http, agent)
            async with held(peer, A):
                goes = await bound(peer, agent, scripted(models))
                stays = agent.wait_worker(agent.spawn(scripted(models)).worker_id, S.IDLE)
                identity = identity_of(agent, goes.worker_id)
                assert await release_nodes({"here": peer_of(http, agent, A)}, timeout_s=30) == {}
                assert has_left_nothing(agent, goes, identity)
                assert agent.client.worker(stays.worker_id).state is S.IDLE
            # Nobody has to wait for who said that he goes.
            async with held(peer, B):
                pass


async def test_what_was_bound_goes_when_its_orchestrator_is_silent_and_not_before(
    home: Path, models: Path
) -> None:
    with AgentProcess(home, SOON) as agent:
        async with Http() as http:
            peer = peer_of(http, agent)
            async with held(peer, A):
                record = await bound(peer, agent, scripted(models))
            assert "bound to" in await stopped(agent, record)


async def test_what_was_bound_goes_when_another_holds_the_node(home: Path, models: Path) -> None:
    # So long that silence alone would not do it within the test.
    with AgentProcess(home, {**QUICK, "node_timeout_s": "2.5"}) as agent:
        async with Http() as http:
            peer = peer_of(http, agent)
            async with held(peer, A):
                record = await bound(peer, agent, scripted(models))
            async with asyncio.timeout(60):
                while True:
                    with contextlib.suppress(ArrieroError):
                        async with held(peer, B):
                            assert "bound to" in await stopped(agent, record)
                            return


async def test_who_says_no_number_can_bind_nothing_and_let_go_of_nothing(home: Path) -> None:
    with AgentProcess(home, QUICK) as agent:
        async with Http() as http:
            for path, body in (
                ("/v1/workers", SpawnBody(model_ref="demo", bound=True)),
                ("/v1/admin/release", None),
            ):
                with pytest.raises(ArrieroError) as refused:
                    await peer_of(http, agent).call("POST", path, body=body)
                assert refused.value.code is ErrorCode.INVALID_REQUEST


async def test_a_bound_worker_is_known_as_such_to_the_next_agent(home: Path, models: Path) -> None:
    async with Http() as http:
        with AgentProcess(home, SOON) as first:
            peer = peer_of(http, first)
            async with held(peer, A):
                record = await bound(peer, first, scripted(models))
                first.kill()
            with AgentProcess(home, SOON) as second:
                assert "bound to" in await stopped(second, record)
                wait_for(lambda: not second.state.worker_runs(), "nothing is left")
