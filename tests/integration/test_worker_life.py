"""How does a worker begin, load, fail and end?  (Real processes; the fake engine where a fault is needed.)"""

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import WorkerHealth, WorkerReady
from arriero.contracts.states import WorkerState
from arriero.runtime import processes
from arriero.runtime.http import Http, Peer
from arriero.runtime.sse import SseEvent
from arriero.testing import memory_limit
from arriero.testing.gguf_writer import U32, LlamaShape, llama_file, write_llama
from arriero.testing.workers import HandStarter, HandWorker, hand_starter

SLOW: dict[str, Any] = {"token_s": 0.02}
BODY: dict[str, Any] = {"prompt": "tell me", "max_tokens": 1000, "ignore_eos": True}


@pytest.fixture
def starter(tmp_path: Path) -> Iterator[HandStarter]:
    with hand_starter(tmp_path) as found:
        yield found


@contextlib.asynccontextmanager
async def peer_of(worker: HandWorker) -> AsyncGenerator[Peer, None]:
    async with Http() as http:
        yield http.peer(worker.url, worker.token)


async def begun(peer: Peer, **body: Any) -> AsyncGenerator[SseEvent, None]:
    """Return a stream that has brought its first token."""
    events = peer.events("/v1/inference/stream", method="POST", body={**BODY, **body})
    async for event in events:
        if '"token"' in event.data:
            return events
    raise AssertionError("the stream brought no token")


async def end_of(events: AsyncGenerator[SseEvent, None]) -> str:
    """Read a stream to its end; return "done", the code of its error, or "" if it broke off."""
    end = ""
    async for event in events:
        if event.event == "error":
            end = json.loads(event.data)["error"]["code"]
        elif event.is_done:
            end = "done"
    return end


async def exit_code(worker: HandWorker) -> int:
    return await asyncio.to_thread(worker.wait_exit)


# --- beginning -------------------------------------------------------------------------------


def test_it_calls_back_once_its_server_is_up_with_the_token_it_was_given(starter: HandStarter) -> None:
    agent = starter.callbacks()
    worker = starter.start(callback_url=agent.url, callback_token="cb-secret", engine_options={"load_s": 0.5})
    (told,) = agent.received
    assert (told.worker_id, told.url, told.model_ref) == (worker.spec.worker_id, worker.url, "demo")
    assert (told.backend, told.device) == ("cpu", "cpu")
    assert agent.authorizations == ["Bearer cb-secret"]
    assert worker.states() == ["loading", "idle"]
    assert "cb-secret" not in worker.log()


def test_a_callback_that_fails_is_tried_again(starter: HandStarter) -> None:
    agent = starter.callbacks([503, 500, 200])
    worker = starter.start(callback_url=agent.url, wait_for=None)
    worker.wait_logged("callback_delivered")
    assert len(agent.received) == 3
    assert worker.process.poll() is None


@pytest.mark.parametrize("agent", ["absent", "refusing"])
def test_a_worker_nobody_answers_to_gives_up(starter: HandStarter, agent: str) -> None:
    receiver = starter.callbacks([401])
    if agent == "absent":
        receiver.close()
    worker = starter.start(callback_url=receiver.url, ready_timeout_s=1.0, wait_for=None)
    assert worker.wait_exit() == 124
    ended = worker.exit_file()
    assert ended is not None and (ended.code, ended.exit_code) == ("WORKER_READY_TIMEOUT", 124)
    assert [line["code"] for line in worker.logged("worker_failed")] == ["WORKER_READY_TIMEOUT"]


def test_two_workers_with_the_same_port_base_find_two_ports(starter: HandStarter) -> None:
    first = starter.start(port_base=27_100)
    second = starter.start(port_base=27_100)
    assert first.url != second.url


@pytest.mark.parametrize("line", [b"", b"{}\n", b"not json\n"])
def test_a_spec_that_is_none_is_an_error(tmp_path: Path, line: bytes) -> None:
    import subprocess
    import sys

    ended = subprocess.run(
        [sys.executable, "-m", "arriero", "worker"], input=line, capture_output=True, timeout=60
    )
    assert ended.returncode == 1
    assert b"INVALID_REQUEST" in ended.stderr


# --- loading ---------------------------------------------------------------------------------


async def test_loading_is_told_as_it_goes_and_requests_wait_outside(starter: HandStarter) -> None:
    worker = starter.start(wait_for="loading", engine_options={"load_s": 1.5, "load_steps": 6})
    async with peer_of(worker) as peer:
        ready = await peer.call("GET", "/v1/ready", answer=WorkerReady)
        assert (ready.ready, ready.state, ready.model_loaded) == (False, WorkerState.LOADING, False)
        for path, body in (
            ("/v1/inference/stream", BODY),
            ("/v1/chat/completions", {"model": "x", "messages": [{"role": "user", "content": "hi"}]}),
            ("/v1/embeddings", {"model": "x", "input": "hi"}),
        ):
            with pytest.raises(ArrieroError) as caught:
                await peer.call("POST", path, body=body)
            assert caught.value.code is ErrorCode.MODEL_LOADING
        events = [event async for event in peer.events("/v1/progress")]
        assert events.pop().is_done
        frames = [json.loads(event.data) for event in events]
        fractions = [frame["fraction"] for frame in frames]
        assert fractions == sorted(fractions) and len(set(fractions)) >= 3
        assert (
            frames[-1]["stage"] == "ready" and frames[-1]["layers_loaded"] == frames[-1]["layers_total"] > 0
        )
        assert {frame["stage"] for frame in frames[:-1]} <= {"starting", "loading"}
        assert (await peer.call("GET", "/v1/ready", answer=WorkerReady)).ready


async def test_a_load_that_fails_ends_the_progress_with_its_error(starter: HandStarter) -> None:
    options = {"load_s": 4.0, "load_steps": 2, "fail_load": "tensor blk.0 is missing"}
    worker = starter.start(wait_for="loading", engine_options=options)
    async with peer_of(worker) as peer:
        assert await end_of(peer.events("/v1/progress")) == "WORKER_START_FAILED"
    assert await exit_code(worker) == 1
    ended = worker.exit_file()
    assert ended is not None
    assert (ended.code, ended.exit_code, ended.signal) == ("WORKER_START_FAILED", 1, None)
    assert ended.log_tail == ["tensor blk.0 is missing"]
    assert worker.states() == ["loading", "failed"]


async def test_loading_without_progress_is_given_up(starter: HandStarter) -> None:
    worker = starter.start(wait_for="loading", loading_stall_s=2.0, engine_options={"load_s": 600.0})
    async with peer_of(worker) as peer:
        assert await end_of(peer.events("/v1/progress")) == "LOADING_TIMEOUT"
    assert await exit_code(worker) == 124
    ended = worker.exit_file()
    assert ended is not None and ended.code == "LOADING_TIMEOUT"


def test_a_file_that_is_no_model_is_told_as_such(starter: HandStarter, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 100)
    worker = starter.start(wait_for=None, engine="llamacpp", model_path=str(path))
    assert worker.wait_exit() == 1
    ended = worker.exit_file()
    assert ended is not None and ended.code == "MODEL_CORRUPTED"
    assert str(tmp_path) not in ended.message


async def test_ending_while_it_loads_leaves_nothing(starter: HandStarter) -> None:
    worker = starter.start(wait_for="loading", engine_options={"load_s": 600.0, "child": True})
    async with peer_of(worker) as peer:
        progress = peer.events("/v1/progress")
        await anext(progress)
        engine = worker.children()
        assert len(engine) == 1
        worker.signal(signal.SIGTERM)
        assert await end_of(progress) == "NO_READY_WORKERS"
    assert await exit_code(worker) == 0
    assert not processes.is_alive(engine[0])


# --- while it serves -------------------------------------------------------------------------


async def test_the_state_stream_shows_every_step(starter: HandStarter) -> None:
    worker = starter.start(wait_for="loading", engine_options={"load_s": 1.0, **SLOW})
    seen: list[str] = []
    async with peer_of(worker) as peer:
        is_asked = False
        async with asyncio.TaskGroup() as group:
            async for event in peer.events("/v1/state"):
                if event.is_done:
                    break
                health = msgspec.json.decode(event.data, type=WorkerHealth)
                if not seen or seen[-1] != health.state:
                    seen.append(str(health.state))
                if health.state is WorkerState.IDLE and not is_asked:
                    is_asked = True
                    body = {"prompt": "a", "max_tokens": 3}
                    group.create_task(peer.call("POST", "/v1/inference", body=body))
                elif health.state is WorkerState.IDLE and seen.count("busy"):
                    worker.signal(signal.SIGTERM)
    assert seen == ["loading", "idle", "busy", "idle", "draining", "stopped"]
    assert await exit_code(worker) == 0


async def test_a_stalled_stream_is_ended_and_its_slot_is_free(starter: HandStarter) -> None:
    worker = starter.start(stall_s=0.5, slots=1, engine_options={"stall_after_tokens": 3})
    async with peer_of(worker) as peer:
        assert await end_of(await begun(peer)) == "STREAM_STALLED"
        with pytest.raises(ArrieroError) as caught:
            await peer.call("POST", "/v1/inference", body=BODY)
        assert caught.value.code is ErrorCode.STREAM_STALLED
        assert (await peer.call("GET", "/v1/health", answer=WorkerHealth)).slots_busy == 0


async def test_a_stream_that_is_slow_but_moves_is_not_stalled(starter: HandStarter) -> None:
    worker = starter.start(stall_s=1.0, engine_options={"token_s": 0.2})
    async with peer_of(worker) as peer:
        assert await end_of(await begun(peer, max_tokens=10)) == "done"


def test_a_client_that_does_not_read_gives_its_slot_back(starter: HandStarter) -> None:
    # A long name makes every chunk two kilobytes: what lies between us and the worker is soon full.
    worker = starter.start(stall_s=0.5, context_tokens=1_000_000, model_ref=f"file:///{'m' * 2000}")
    body = {"messages": [{"role": "user", "content": "Count from 1 to 5000."}], "stream": True}
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(worker.url.rpartition(":")[2])))
        client.sendall(f"{head}Authorization: Bearer {worker.token}\r\n\r\n".encode() + content)
        worker.wait_logged("request_ended")
        assert [line["code"] for line in worker.logged("request_ended")] == ["STREAM_STALLED"]


def test_a_model_for_embeddings_makes_nothing_else(starter: HandStarter, tmp_path: Path) -> None:
    file = llama_file()
    file.set("llama.pooling_type", U32, 1)
    worker = starter.start(engine="llamacpp", model_path=str(file.write(tmp_path / "model.gguf")))

    async def ask() -> None:
        async with peer_of(worker) as peer:
            found = await peer.call("POST", "/v1/embeddings", body={"input": "hi"}, answer=dict)
            assert len(found["data"][0]["embedding"]) > 1
            for path, body in (("/v1/inference", {"prompt": "a"}), ("/v1/completions", {"prompt": "a"})):
                with pytest.raises(ArrieroError) as caught:
                    await peer.call("POST", path, body=body)
                assert caught.value.code is ErrorCode.INVALID_REQUEST

    asyncio.run(ask())


# --- ending ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["route", "signal"])
async def test_draining_lets_the_running_and_the_waiting_finish(starter: HandStarter, how: str) -> None:
    worker = starter.start(slots=1, engine_options=SLOW)
    async with peer_of(worker) as peer:
        running = await begun(peer, max_tokens=30)
        waiting = peer.events("/v1/inference/stream", method="POST", body={**BODY, "max_tokens": 2})
        while '"queued"' not in (await anext(waiting)).data:
            pass
        state = peer.events("/v1/state")
        if how == "route":
            answer = await peer.call("POST", "/v1/admin/drain", answer=WorkerHealth)
            assert answer.state is WorkerState.DRAINING
        else:
            worker.signal(signal.SIGTERM)
        async for event in state:
            if '"draining"' in event.data:
                break
        with pytest.raises(ArrieroError) as caught:
            await peer.call("POST", "/v1/inference", body=BODY)
        assert caught.value.code is ErrorCode.NO_READY_WORKERS
        assert await end_of(running) == "done"
        assert await end_of(waiting) == "done"
        assert await end_of(state) == "done"
    assert await exit_code(worker) == 0
    ended = worker.exit_file()
    assert ended is not None and (ended.exit_code, ended.code) == (0, None)


@pytest.mark.parametrize("how", ["shutdown", "grace", "two signals"])
async def test_what_runs_too_long_is_cancelled(starter: HandStarter, how: str) -> None:
    worker = starter.start(stop_grace_s=0.2 if how == "grace" else 30.0, engine_options=SLOW)
    async with peer_of(worker) as peer:
        running = await begun(peer)
        if how == "shutdown":
            await peer.call("POST", "/v1/admin/shutdown", body={"grace_s": 0.1})
        else:
            worker.signal(signal.SIGTERM)
        if how == "two signals":
            await asyncio.to_thread(worker.wait_state, "draining")
            worker.signal(signal.SIGTERM)
        assert await end_of(running) == "WORKER_LOST"
    assert await exit_code(worker) == 0


async def test_an_engine_that_will_not_end_is_killed(starter: HandStarter) -> None:
    worker = starter.start(engine_options={"hang_unload": True, "child": True})
    (engine,) = worker.children()
    worker.signal(signal.SIGTERM)
    assert await exit_code(worker) == 0
    assert not processes.is_alive(engine)


@pytest.mark.parametrize("engine", ["fake", "llamacpp"])
async def test_an_engine_killed_mid_stream_ends_everything_at_once(
    starter: HandStarter, tmp_path: Path, engine: str
) -> None:
    fields: dict[str, Any] = {"engine_options": {"child": True, **SLOW}}
    if engine == "llamacpp":
        fields = {"model_path": str(write_llama(tmp_path / "model.gguf")), "context_tokens": 4096}
    worker = starter.start(engine=engine, slots=1, **fields)
    async with peer_of(worker) as peer:
        state = peer.events("/v1/state")
        health = msgspec.json.decode((await anext(state)).data, type=WorkerHealth)
        assert health.engine_pid is not None
        running = await begun(peer)
        waiting = peer.events("/v1/inference/stream", method="POST", body=BODY)
        while '"queued"' not in (await anext(waiting)).data:
            pass
        known = processes.identity(health.engine_pid)
        assert known is not None
        processes.signal_process(known, signal.SIGKILL)
        assert await end_of(running) == "WORKER_LOST"
        assert await end_of(waiting) == "WORKER_LOST"
        last = health
        async for event in state:
            if not event.is_done:
                last = msgspec.json.decode(event.data, type=WorkerHealth)
        assert (last.state, last.status) == (WorkerState.FAILED, "failed")
        assert last.exit is not None
        assert (last.exit.code, last.exit.exit_code) == ("WORKER_LOST", 1)
        assert "SIGKILL" in last.exit.message
    assert await exit_code(worker) == 1
    assert worker.exit_file() == last.exit


async def test_an_engine_that_dies_idle_ends_the_worker_too(starter: HandStarter) -> None:
    worker = starter.start(engine_options={"child": True})
    (engine,) = worker.children()
    processes.signal_process(engine, signal.SIGKILL)
    assert await exit_code(worker) == 1
    assert worker.states()[-1] == "failed"


async def test_a_worker_killed_takes_its_engine_with_it(starter: HandStarter, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model.gguf")
    worker = starter.start(engine="llamacpp", model_path=str(model))
    (engine,) = worker.children()
    worker.signal(signal.SIGKILL)
    assert await exit_code(worker) == -signal.SIGKILL
    assert await asyncio.to_thread(processes.wait_gone, engine, 30.0)


# --- lease -----------------------------------------------------------------------------------


def test_a_worker_without_its_agent_drains_and_ends(starter: HandStarter) -> None:
    worker = starter.start(callback_url=starter.callbacks().url, lease_s=5.0)
    assert worker.wait_exit() == 0
    assert worker.states() == ["loading", "idle", "draining", "stopped"]
    assert len(worker.logged("lease_over")) == 1


def test_a_worker_started_by_hand_has_no_lease(starter: HandStarter) -> None:
    worker = starter.start(lease_s=0.2)
    worker.wait_state("idle")
    with pytest.raises(TimeoutError):
        worker.wait_state("draining", 1.5)


async def test_polls_and_the_state_stream_keep_the_lease(starter: HandStarter) -> None:
    worker = starter.start(callback_url=starter.callbacks().url, lease_s=5.0)
    async with peer_of(worker) as peer:
        beats = 0
        headers = {"X-Arriero-Lease": "1:1"}
        async for _ in peer.events(
            "/v1/state", headers=headers
        ):  # A beat a second, for longer than the lease.
            beats += 1
            if beats == 7:
                break
        assert worker.states() == ["loading", "idle"]
        await peer.call("GET", "/v1/health", headers=headers)
    assert await exit_code(worker) == 0


def test_a_lease_of_nothing_lasts_as_long_as_the_agent(starter: HandStarter, tmp_path: Path) -> None:
    import subprocess

    agent = subprocess.Popen(["sleep", "60"])
    try:
        known = processes.identity(agent.pid)
        assert known is not None
        worker = starter.start(callback_url=starter.callbacks().url, lease_s=0.0)

        async def poll() -> None:
            async with peer_of(worker) as peer:
                header = {"X-Arriero-Lease": f"{known.pid}:{known.start_ticks}"}
                await peer.call("GET", "/v1/health", headers=header)

        asyncio.run(poll())
        assert worker.process.poll() is None
    finally:
        agent.kill()
        agent.wait()
    assert worker.wait_exit() == 0
    assert "draining" in worker.states()


# --- memory ----------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.skipif(not memory_limit.can_limit(), reason="making a memory cgroup needs root")
def test_an_engine_killed_for_memory_is_told_with_its_proof(tmp_path: Path) -> None:
    # Some 150 MB of weights, read into memory by the engine, which so is the one that is killed.
    model = write_llama(tmp_path / "model.gguf", LlamaShape(layers=16, embedding=512, feed_forward=2048))
    with memory_limit.memory_limit("worker") as limit, hand_starter(tmp_path) as starter:
        limit.set_mib(100)
        worker = starter.start(
            engine="llamacpp", model_path=str(model), prefix=limit.join_command, wait_for=None
        )
        assert worker.wait_exit() == 137
        ended = worker.exit_file()
        assert ended is not None
        assert (ended.code, ended.exit_code, ended.signal) == ("OUT_OF_MEMORY", 137, "SIGKILL")
        assert worker.states() == ["loading", "failed"]
        assert limit.oom_kills >= 1
