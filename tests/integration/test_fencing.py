"""One holder a node: what comes from before a cut is refused, by the agent and by its workers."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from tests.integration.agent_scripts import token_of

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.fence import FENCE_HEADER, FENCE_NUMBER_MAX, Fence
from arriero.contracts.records import Health, WorkerHealth, WorkerRecord
from arriero.contracts.requests import FenceBody
from arriero.contracts.states import WorkerState as S
from arriero.runtime.http import Http, Peer
from arriero.runtime.sse import SseEvent
from arriero.testing.agents import AgentProcess
from arriero.testing.workers import HandStarter, hand_starter

FAKE = {"engine": "fake", "health_interval_s": "0.2", "stop_grace_s": "2", "worker_port_base": "23401"}
A, B = "a" * 16, "b" * 16
#: Computes until it is cancelled.
ENDLESS: dict[str, Any] = {"prompt": "on and on", "ignore_eos": True}
SLOW = {"token_s": 0.02}


def under(holder: str, number: int) -> dict[str, str]:
    return {FENCE_HEADER: str(Fence(holder, number))}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    with AgentProcess(tmp_path / "home", FAKE) as running:
        yield running


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[HandStarter]:
    with hand_starter(tmp_path) as found:
        yield found


def peer_of(http: Http, agent: AgentProcess) -> Peer:
    assert agent.run is not None
    return http.peer(agent.run.url, agent.run.token)


@asynccontextmanager
async def held(peer: Peer, holder: str, number: int) -> AsyncIterator[AsyncGenerator[SseEvent, None]]:
    """Hold a node: its event stream, past its snapshot."""
    async with contextlib.aclosing(peer.events("/v1/events", headers=under(holder, number))) as events:
        assert '"workers"' in (await anext(events)).data
        yield events


async def refused(peer: Peer, holder: str, number: int, path: str = "/v1/health") -> ArrieroError:
    with pytest.raises(ArrieroError) as caught:
        if path == "/v1/events":
            async with held(peer, holder, number):
                pass
        else:
            await peer.call("GET", path, headers=under(holder, number))
    assert caught.value.code is ErrorCode.LEASE_SUPERSEDED
    return caught.value


async def asked(peer: Peer, holder: str, number: int) -> None:
    await peer.call("GET", "/v1/health", headers=under(holder, number), answer=Health)


async def ends_superseded(events: AsyncGenerator[SseEvent, None]) -> None:
    async with asyncio.timeout(60):
        last = [event async for event in events][-1]
    assert last.event == "error" and "LEASE_SUPERSEDED" in last.data


async def opened(peer: Peer, headers: dict[str, str], **fields: Any) -> AsyncGenerator[SseEvent, None]:
    """Return a stream that has brought its first token."""
    events = peer.events("/v1/inference/stream", method="POST", body={**ENDLESS, **fields}, headers=headers)
    async for event in events:
        if '"token"' in event.data:
            return events
    raise AssertionError("the stream brought no token")


async def until_free(peer: Peer) -> None:
    async with asyncio.timeout(60), contextlib.aclosing(peer.events("/v1/state")) as seen:
        async for event in seen:
            if not msgspec.json.decode(event.data, type=WorkerHealth).slots_busy:
                return


# --- The agent -----------------------------------------------------------------------------------


async def test_a_larger_number_takes_over_and_a_smaller_one_is_refused_everywhere(
    agent: AgentProcess,
) -> None:
    async with Http() as http:
        peer = peer_of(http, agent)
        async with held(peer, A, 1) as first:
            await asked(peer, A, 1)
            async with held(peer, A, 2) as second:
                await ends_superseded(first)
                await asked(peer, A, 2)
                await asked(peer, A, 3)
                for path in ("/v1/health", "/v1/events", "/v1/workers", "/v1/models"):
                    error = await refused(peer, A, 1, path)
                    assert (error.details["holder"], error.details["number"]) == (A, 2)
                # The same connection may open its stream anew.
                async with held(peer, A, 2):
                    await ends_superseded(second)


async def test_who_says_no_number_is_of_this_machine(agent: AgentProcess) -> None:
    async with Http() as http:
        peer = peer_of(http, agent)
        async with held(peer, A, 5) as events:
            assert (await peer.call("GET", "/v1/health", answer=Health)).status == "alive"
            async with contextlib.aclosing(peer.events("/v1/events")) as watched:
                assert '"workers"' in (await anext(watched)).data
            async with asyncio.timeout(60):
                assert '"unix"' in (await anext(events)).data, "the holder's stream goes on"


@pytest.mark.parametrize("header", ["", "x", f"{A}:0", f"{A}:{FENCE_NUMBER_MAX + 1}"])
async def test_a_header_that_is_none(agent: AgentProcess, header: str) -> None:
    async with Http() as http:
        with pytest.raises(ArrieroError) as caught:
            await peer_of(http, agent).call("GET", "/v1/health", headers={FENCE_HEADER: header})
    assert caught.value.code is ErrorCode.INVALID_REQUEST


async def test_another_holder_waits_for_the_silence_of_the_first(tmp_path: Path) -> None:
    with AgentProcess(tmp_path / "home", {**FAKE, "node_timeout_s": "0.5"}) as agent:
        async with Http() as http:
            peer = peer_of(http, agent)
            async with held(peer, A, 7):
                error = await refused(peer, B, 8, "/v1/events")
                assert error.details["holder"] == A and error.details["silent_s"] == 0
                assert error.details["since_unix"] > 0
                await refused(peer, B, 8)
            async with asyncio.timeout(60):
                while True:
                    try:
                        async with held(peer, B, 8):
                            await asked(peer, B, 8)
                            await refused(peer, A, 7)
                            await refused(peer, A, 9, "/v1/events")
                            break
                    except ArrieroError as refusal:
                        assert refusal.code is ErrorCode.LEASE_SUPERSEDED
                        assert 0 <= refusal.details["silent_s"] < 1


async def test_the_next_agent_refuses_what_the_last_one_did(tmp_path: Path) -> None:
    home = tmp_path / "home"
    patient = {**FAKE, "node_timeout_s": "30"}
    async with Http() as http:
        with AgentProcess(home, patient) as first:
            async with held(peer_of(http, first), A, 4):
                pass
            first.kill()
        with AgentProcess(home, patient) as second:
            peer = peer_of(http, second)
            assert (await refused(peer, A, 3, "/v1/events")).details["number"] == 4
            await refused(peer, A, 3)
            # The holder before gets its time to come back.
            assert (await refused(peer, B, 5, "/v1/events")).details["holder"] == A
            async with held(peer, A, 4):
                await asked(peer, A, 4)


# --- Workers -------------------------------------------------------------------------------------


def worker_of(http: Http, agent: AgentProcess, record: WorkerRecord) -> Peer:
    return http.peer(record.url, token_of(agent, record.worker_id))


async def test_a_stream_from_before_is_over_when_a_newer_number_holds_the_node(agent: AgentProcess) -> None:
    spawned = agent.spawn("demo", engine="fake", slots=1, options=SLOW)
    record = agent.wait_worker(spawned.worker_id, S.IDLE)
    async with Http() as http:
        peer, worker = peer_of(http, agent), worker_of(http, agent, record)
        async with held(peer, A, 1):
            stream = await opened(worker, under(A, 1))
            async with held(peer, A, 2):
                await ends_superseded(stream)
                await until_free(worker)
                with pytest.raises(ArrieroError) as late:
                    await opened(worker, under(A, 1))
                assert late.value.code is ErrorCode.LEASE_SUPERSEDED
                assert late.value.details["number"] == 2
                # Its slot is free: it is the only one.
                again = await opened(worker, under(A, 2), queue=False)
                await again.aclose()


async def test_a_worker_knows_the_number_it_was_started_under_and_an_adopted_one_too(tmp_path: Path) -> None:
    home = tmp_path / "home"
    async with Http() as http:
        with AgentProcess(home, FAKE) as first:
            async with held(peer_of(http, first), A, 6):
                spawned = first.spawn("demo", engine="fake", options=SLOW)
                record = first.wait_worker(spawned.worker_id, S.IDLE)
                worker = worker_of(http, first, record)
                await refused(worker, A, 5)
            stream = await opened(worker, under(A, 6))
            by_hand = await opened(worker, {})
            first.kill()
            with AgentProcess(home, FAKE) as second:
                async with held(peer_of(http, second), A, 8):
                    await ends_superseded(stream)
                    await refused(worker, A, 7)
                    assert '"token"' in (await anext(by_hand)).data, "what says no number goes on"
                await by_hand.aclose()


async def test_a_worker_never_goes_back_to_a_smaller_number(starter: HandStarter) -> None:
    worker = starter.start(engine_options=SLOW, fence=5)
    async with Http() as http:
        peer = http.peer(worker.url, worker.token)
        await refused(peer, A, 4)
        waiting = await opened(peer, under(A, 5))
        told = await peer.call("POST", "/v1/admin/fence", body=FenceBody(number=3), answer=FenceBody)
        assert told.number == 5
        assert '"token"' in (await anext(waiting)).data
        told = await peer.call("POST", "/v1/admin/fence", body=FenceBody(number=6), answer=FenceBody)
        assert told.number == 6
        await ends_superseded(waiting)
        await refused(peer, B, 5)
        # A late cancel must not end what came after it.
        request_id = {"X-Request-Id": "the-same"}
        newer = await opened(peer, {**under(A, 6), **request_id})
        with pytest.raises(ArrieroError) as late:
            await peer.call("DELETE", "/v1/inference/the-same", headers=under(A, 5))
        assert late.value.code is ErrorCode.LEASE_SUPERSEDED
        assert '"token"' in (await anext(newer)).data
        await newer.aclose()


async def test_what_waits_for_a_slot_under_an_old_number_waits_no_more(starter: HandStarter) -> None:
    worker = starter.start(engine_options=SLOW, slots=1, fence=1)
    async with Http() as http:
        peer = http.peer(worker.url, worker.token)
        running = await opened(peer, under(A, 2))
        queued = peer.events("/v1/inference/stream", method="POST", body=ENDLESS, headers=under(A, 1))
        async for event in queued:
            if '"queue' in event.data:
                break
        await peer.call("POST", "/v1/admin/fence", body=FenceBody(number=2))
        await ends_superseded(queued)
        assert '"token"' in (await anext(running)).data
        await running.aclose()


async def test_what_was_overtaken_while_its_body_came_does_not_compute(starter: HandStarter) -> None:
    worker = starter.start(engine_options=SLOW, fence=1)
    async with Http() as http:
        peer = http.peer(worker.url, worker.token)
        split = urlsplit(worker.url)
        body = msgspec.json.encode(ENDLESS)
        reader, writer = await asyncio.open_connection(split.hostname, split.port)
        headers = {"Host": split.netloc, **worker.headers, **under(A, 1), "Content-Length": str(len(body))}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        # The server asks for the rest once the handler waits for it.
        writer.write(f"POST /v1/inference/stream HTTP/1.1\r\nExpect: 100-continue\r\n{lines}\r\n".encode())
        async with asyncio.timeout(60):
            assert b" 100 " in await reader.readuntil(b"\r\n\r\n")
            await peer.call("POST", "/v1/admin/fence", body=FenceBody(number=2))
            writer.write(body)
            assert b" 409 " in await reader.readuntil(b"\r\n")
        writer.close()
        await writer.wait_closed()
