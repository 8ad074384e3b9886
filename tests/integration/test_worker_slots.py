"""Do slots, queue and cancelling hold under real concurrency?  (Real process, real engine.)"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import WorkerHealth
from arriero.runtime.http import Http, Peer
from arriero.runtime.sse import SseEvent
from arriero.testing.gguf_writer import write_llama
from arriero.testing.workers import HandStarter, HandWorker, hand_starter

#: Goes on until the context is full: seconds, and cancelled by every test long before.
ENDLESS: dict[str, Any] = {"prompt": "on and on", "ignore_eos": True, "temperature": 1.0, "seed": 7}


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[HandStarter]:
    with hand_starter(tmp_path) as found:
        yield found


def start(starter: HandStarter, tmp_path: Path, **fields: Any) -> HandWorker:
    model = write_llama(tmp_path / "model.gguf")
    return starter.start(
        engine="llamacpp", model_path=str(model), **{"context_tokens": 4096, "threads": 1, **fields}
    )


@contextlib.asynccontextmanager
async def peer_of(worker: HandWorker) -> AsyncGenerator[Peer, None]:
    async with Http() as http:
        yield http.peer(worker.url, worker.token)


async def health(peer: Peer) -> WorkerHealth:
    return await peer.call("GET", "/v1/health", answer=WorkerHealth)


async def states(peer: Peer) -> AsyncGenerator[WorkerHealth, None]:
    """Yield the worker's health at each change."""
    async with contextlib.aclosing(peer.events("/v1/state")) as events:
        async for event in events:
            if not event.is_done:
                yield msgspec.json.decode(event.data, type=WorkerHealth)


async def until_free(peer: Peer) -> WorkerHealth:
    """Return the health once no slot computes and nobody waits: the slot came back, it did not run out."""
    async with asyncio.timeout(60), contextlib.aclosing(states(peer)) as seen:
        async for now in seen:
            if not now.slots_busy and not now.queued:
                return now
    raise AssertionError("the worker ended")


def stream(peer: Peer, body: dict[str, Any], **headers: str) -> AsyncGenerator[SseEvent, None]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return peer.events("/v1/inference/stream", method="POST", body=body, headers=named)


async def open_stream(peer: Peer, body: dict[str, Any], **headers: str) -> AsyncGenerator[SseEvent, None]:
    """Return a stream that has brought its first token."""
    events = stream(peer, body, **headers)
    async for event in events:
        if '"token"' in event.data:
            return events
    raise AssertionError("the stream brought no token")


async def error_of(events: AsyncGenerator[SseEvent, None]) -> tuple[str, int]:
    """Read to the end; return the code of its error event and how many tokens came, with no [DONE]."""
    tokens, code = 0, ""
    async for event in events:
        assert not event.is_done and not code, "nothing comes after an error"
        if event.event == "error":
            code = json.loads(event.data)["error"]["code"]
        tokens += '"token"' in event.data
    return code, tokens


async def test_sixteen_streams_on_four_slots_are_all_complete_and_right(
    starter: HandStarter, tmp_path: Path
) -> None:
    worker = start(starter, tmp_path)
    async with peer_of(worker) as peer:
        bodies = [{"prompt": f"number {n}", "max_tokens": 40, "temperature": 0.0} for n in range(16)]
        alone = [(await peer.call("POST", "/v1/inference", body=b, answer=dict))["token_ids"] for b in bodies]
        positions: list[list[int]] = [[] for _ in bodies]
        ids: list[list[int]] = [[] for _ in bodies]
        busiest = 0

        async def read(number: int) -> None:
            nonlocal busiest
            is_done = False
            async for event in stream(peer, {**bodies[number], "max_tokens": 40}):
                is_done = event.is_done
                frame = {} if is_done else json.loads(event.data)
                if "position" in frame:
                    positions[number].append(frame["position"])
                if "token" in frame:
                    assert frame["index"] == len(ids[number])
                    ids[number].append(frame["id"])
            assert is_done

        async def watch() -> None:
            """Let the sixteen go when all of them wait."""
            nonlocal busiest
            async with contextlib.aclosing(states(peer)) as seen:
                async for now in seen:
                    busiest = max(busiest, now.slots_busy)
                    if now.queued == 16:
                        for events in blocking:
                            await events.aclose()

        blocking = [await open_stream(peer, ENDLESS) for _ in range(4)]
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(watch())
            async with asyncio.TaskGroup() as readers:
                for number in range(16):
                    readers.create_task(read(number))
            watcher.cancel()
        assert ids == alone
        assert busiest == 4
        assert {seen[0] for seen in positions} == set(range(1, 17))
        assert all(seen == sorted(set(seen), reverse=True) for seen in positions), "nobody is overtaken"
        now = await until_free(peer)
        assert now.state == "idle"


async def test_cancelled_by_delete_the_slot_is_free_when_it_answers(
    starter: HandStarter, tmp_path: Path
) -> None:
    worker = start(starter, tmp_path, slots=1)
    async with peer_of(worker) as peer:
        events = await open_stream(peer, ENDLESS, X_Request_Id="long-1")
        assert (await health(peer)).slots_busy == 1
        await peer.call("DELETE", "/v1/inference/long-1")
        now = await health(peer)
        assert (now.slots_busy, now.state) == (0, "idle")
        assert (await error_of(events))[0] == "REQUEST_CANCELLED"
        await peer.call("DELETE", "/v1/inference/long-1")


async def test_cancelled_by_leaving_streaming_or_not(starter: HandStarter, tmp_path: Path) -> None:
    worker = start(starter, tmp_path, slots=1)
    async with peer_of(worker) as peer:
        events = await open_stream(peer, ENDLESS)
        await events.aclose()
        await until_free(peer)
        with pytest.raises(ArrieroError):
            await peer.call("POST", "/v1/inference", body=ENDLESS, timeout_s=0.3)
        await until_free(peer)
        text = await (await peer.request("GET", "/metrics")).text()
        assert 'requests_total{outcome="cancelled"} 2' in text


async def test_a_deadline_ends_a_stream_with_an_error_and_an_answer_with_a_status(
    starter: HandStarter, tmp_path: Path
) -> None:
    worker = start(starter, tmp_path, slots=1)
    async with peer_of(worker) as peer:
        code, tokens = await error_of(stream(peer, ENDLESS, X_Request_Deadline="700"))
        assert code == "REQUEST_TIMEOUT" and tokens > 0
        # The tighter of both limits wins.
        code, _ = await error_of(stream(peer, {**ENDLESS, "timeout": 0.5}, X_Request_Deadline="60000"))
        assert code == "REQUEST_TIMEOUT"
        with pytest.raises(ArrieroError) as caught:
            await peer.call("POST", "/v1/inference", body={**ENDLESS, "timeout": 0.5})
        assert caught.value.code is ErrorCode.REQUEST_TIMEOUT
        assert caught.value.details["layer"] == "worker"
        assert 0 < caught.value.details["timeout_ms"] < 500, "it gives up before its caller does"
        await until_free(peer)


async def test_a_deadline_counts_in_the_queue_and_frees_the_place(
    starter: HandStarter, tmp_path: Path
) -> None:
    worker = start(starter, tmp_path, slots=1)
    async with peer_of(worker) as peer:
        running = await open_stream(peer, ENDLESS)
        code, tokens = await error_of(stream(peer, {**ENDLESS, "timeout": 0.3}))
        assert (code, tokens) == ("REQUEST_TIMEOUT", 0)
        assert (await health(peer)).queued == 0
        await running.aclose()


async def test_who_waits_can_be_cancelled_and_the_rest_move_up(starter: HandStarter, tmp_path: Path) -> None:
    worker = start(starter, tmp_path, slots=1)
    async with peer_of(worker) as peer:
        running = await open_stream(peer, ENDLESS)
        waiting = [stream(peer, ENDLESS, X_Request_Id=f"wait-{n}") for n in (1, 2)]
        for number, events in enumerate(waiting, start=1):
            assert json.loads((await anext(events)).data) == {"request_id": f"wait-{number}", "started": True}
            assert json.loads((await anext(events)).data) == {"position": number, "queued": True}
        await peer.call("DELETE", "/v1/inference/wait-1")
        assert (await error_of(waiting[0]))[0] == "REQUEST_CANCELLED"
        assert json.loads((await anext(waiting[1])).data) == {"position": 1, "queued": True}
        for events in (waiting[1], running):
            await events.aclose()
        await until_free(peer)


async def test_full_queue_busy_slots_and_used_ids_are_refused(starter: HandStarter, tmp_path: Path) -> None:
    worker = start(starter, tmp_path, slots=1, queue_max=1)
    async with peer_of(worker) as peer:
        running = await open_stream(peer, ENDLESS, X_Request_Id="same")
        queued = stream(peer, ENDLESS)
        while '"queued"' not in (await anext(queued)).data:
            pass
        found = {}
        for name, body, headers in (
            ("busy", {**ENDLESS, "queue": False}, {}),
            ("full", ENDLESS, {}),
            ("used", ENDLESS, {"X_Request_Id": "same"}),
        ):
            for path in ("/v1/inference", "/v1/inference/stream"):
                named = {key.replace("_", "-"): value for key, value in headers.items()}
                response = await peer.request("POST", path, body=body, headers=named)
                code = (await response.json())["error"]["code"]
                found[name, path] = (response.status, code, "Retry-After" in response.headers)
        for path in ("/v1/inference", "/v1/inference/stream"):
            assert found["busy", path] == (503, "ALL_SLOTS_BUSY", True)
            assert found["full", path] == (429, "QUEUE_FULL", True)
            assert found["used", path] == (409, "REQUEST_ID_IN_USE", False)
        for events in (queued, running):
            await events.aclose()
        await until_free(peer)


async def test_queue_positions_are_comments_on_openai_streams(starter: HandStarter, tmp_path: Path) -> None:
    worker = start(starter, tmp_path, slots=1)
    async with peer_of(worker) as peer:
        running = await open_stream(peer, ENDLESS)
        body = {
            "model": "x",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 2,
            "stream": True,
        }
        events = peer.events("/v1/chat/completions", method="POST", body=body)
        assert (await anext(events)).comment == "queued position=1"
        await running.aclose()
        rest = [event async for event in events]
        assert rest[-1].is_done and all(event.comment is None for event in rest)


async def test_cancelling_stops_the_computing_also_while_a_prompt_is_read(
    starter: HandStarter, tmp_path: Path
) -> None:
    """After a cancelled long prompt the next one is right away at the same slot, and gets its own answer."""
    worker = start(starter, tmp_path, slots=1, context_tokens=4096)
    async with peer_of(worker) as peer:
        short = {"prompt": "short", "max_tokens": 8, "temperature": 0.0}
        expected = (await peer.call("POST", "/v1/inference", body=short, answer=dict))["token_ids"]
        for number in range(2):
            events = stream(peer, {"prompt_ids": [40 + number] * 2000, "max_tokens": 8})
            await anext(events)
            await events.aclose()
            answer = await peer.call("POST", "/v1/inference", body=short, answer=dict)
            assert answer["token_ids"] == expected
        await until_free(peer)
