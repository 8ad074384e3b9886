"""Workers under a real agent: spawned, watched, stopped, killed, refused."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tests.integration.agent_scripts import (
    QUICK,
    has_left_nothing,
    identity_of,
    scripted,
    tell,
    token_of,
)

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import AgentBeat, AgentEvent, AgentSnapshot, ModelsChanged, WorkerChanged
from arriero.contracts.records import WorkerRecord, WorkerRunRecord
from arriero.contracts.requests import ImportBody, ReadyCallback
from arriero.contracts.states import WorkerState as S
from arriero.runtime import processes, state_dir
from arriero.testing.agents import AgentProcess, agent, wait_for
from arriero.testing.gguf_writer import write_llama


@pytest.fixture(scope="module")
def shared() -> Iterator[AgentProcess]:
    with agent(QUICK) as running:
        yield running


@pytest.fixture
def one(shared: AgentProcess, tmp_path: Path) -> Iterator[AgentProcess]:
    """The shared agent, rid of its workers afterwards."""
    yield shared
    for record in shared.client.workers():
        shared.client.send("DELETE", f"/v1/workers/{record.worker_id}?force=1")
    wait_for(lambda: not list(shared.state.worker_files()), "all workers are gone")


def ended(agent: AgentProcess, record: WorkerRecord) -> WorkerRecord:
    return agent.wait_worker(record.worker_id, S.FAILED, S.STOPPED)


def test_a_worker_comes_works_and_goes(one: AgentProcess, tmp_path: Path) -> None:
    spawned = one.spawn(scripted(tmp_path), slots=2, context_tokens=256)
    assert (spawned.state, spawned.url, spawned.slots_total) == (S.STARTING, "", 2)
    identity = identity_of(one, spawned.worker_id)
    idle = one.wait_worker(spawned.worker_id, S.IDLE)
    assert (idle.slots_available, idle.context_tokens, idle.pid) == (2, 256, identity.pid)
    assert os.getpgid(idle.pid) == idle.pid, "a group of its own"
    token = token_of(one, idle.worker_id)
    tell(idle, token, "/become/busy")
    busy = one.wait_worker(idle.worker_id, S.BUSY)
    assert busy.slots_available == 1
    tell(idle, token, "/become/idle")
    one.wait_worker(idle.worker_id, S.IDLE)
    path = f"/v1/workers/{idle.worker_id}"
    assert one.client.raw("DELETE", path).status == 202
    stopped = one.wait_worker(idle.worker_id, S.STOPPED)
    assert stopped.exit is not None
    assert (stopped.exit.exit_code, stopped.exit.code) == (0, None)
    assert one.client.raw("DELETE", path).status == 204, "a second stop is no error"
    wait_for(lambda: has_left_nothing(one, stopped, identity), "nothing is left")


def test_a_worker_without_a_state_stream_is_polled(one: AgentProcess, tmp_path: Path) -> None:
    spawned = one.spawn(scripted(tmp_path, state_stream=False))
    idle = one.wait_worker(spawned.worker_id, S.IDLE)
    tell(idle, token_of(one, idle.worker_id), "/become/busy")
    one.wait_worker(idle.worker_id, S.BUSY)


def test_polls_carry_the_agents_lease(one: AgentProcess, tmp_path: Path) -> None:
    idle = one.wait_worker(one.spawn(scripted(tmp_path)).worker_id, S.IDLE)
    assert one.run is not None
    told = tell(idle, token_of(one, idle.worker_id), "/leases", "GET")
    assert told == [f"{one.run.pid}:{one.run.pid_start_ticks}"]


def test_sigkill_is_told_apart_from_out_of_memory(one: AgentProcess, tmp_path: Path) -> None:
    idle = one.wait_worker(one.spawn(scripted(tmp_path)).worker_id, S.IDLE)
    identity = identity_of(one, idle.worker_id)
    os.kill(idle.pid, signal.SIGKILL)
    failed = one.wait_worker(idle.worker_id, S.FAILED)
    assert failed.exit is not None
    assert (failed.exit.exit_code, failed.exit.signal) == (137, "SIGKILL")
    assert failed.exit.code == ErrorCode.WORKER_LOST
    wait_for(lambda: has_left_nothing(one, failed, identity), "nothing is left")


def test_dead_before_it_was_of_use(one: AgentProcess, tmp_path: Path) -> None:
    spawned = one.spawn(scripted(tmp_path, lines=["first words", "last words"], exit_before=3))
    failed = one.wait_worker(spawned.worker_id, S.FAILED)
    assert failed.exit is not None
    assert (failed.exit.exit_code, failed.exit.code) == (3, ErrorCode.WORKER_START_FAILED)
    assert failed.exit.log_tail[-1] == "last words"


def test_a_worker_writes_down_why_it_ended(one: AgentProcess, tmp_path: Path) -> None:
    told = {"exit_code": 137, "signal": "SIGKILL", "code": "OUT_OF_MEMORY", "message": "engine killed"}
    failed = one.wait_worker(one.spawn(scripted(tmp_path, exit=told, exit_code=137)).worker_id, S.FAILED)
    assert failed.exit is not None
    assert (failed.exit.code, failed.exit.exit_code, failed.exit.signal) == ("OUT_OF_MEMORY", 137, "SIGKILL")
    assert failed.exit.message == "engine killed"


def test_a_worker_that_says_it_failed_is_forgotten_at_once(one: AgentProcess, tmp_path: Path) -> None:
    told = {"exit_code": 139, "signal": "SIGSEGV", "code": "WORKER_LOST", "message": "engine died"}
    idle = one.wait_worker(one.spawn(scripted(tmp_path, told_failed=told)).worker_id, S.IDLE)
    identity = identity_of(one, idle.worker_id)
    tell(idle, token_of(one, idle.worker_id), "/become/failed")
    failed = one.wait_worker(idle.worker_id, S.FAILED)
    assert failed.exit is not None
    assert (failed.exit.message, failed.exit.signal) == ("engine died", "SIGSEGV")
    wait_for(lambda: has_left_nothing(one, failed, identity), "the process that lingers is killed")


def test_a_worker_that_fails_its_health_checks_is_killed(one: AgentProcess, tmp_path: Path) -> None:
    spawned = one.spawn(scripted(tmp_path, sick=True))
    failed = one.wait_worker(spawned.worker_id, S.FAILED)
    assert failed.exit is not None
    assert failed.exit.code == ErrorCode.WORKER_UNHEALTHY
    assert failed.exit.signal == "SIGKILL"
    assert "3 health checks" in failed.exit.message


def test_an_impossible_state_counts_as_a_failed_check(one: AgentProcess, tmp_path: Path) -> None:
    idle = one.wait_worker(one.spawn(scripted(tmp_path)).worker_id, S.IDLE)
    tell(idle, token_of(one, idle.worker_id), "/become/loading")
    failed = one.wait_worker(idle.worker_id, S.FAILED)
    assert failed.exit is not None
    assert failed.exit.code == ErrorCode.WORKER_UNHEALTHY


def test_three_crashes_and_the_model_is_refused(one: AgentProcess, tmp_path: Path) -> None:
    ref, other = scripted(tmp_path, exit_before=1), scripted(tmp_path)
    for _ in range(3):
        one.wait_worker(one.spawn(ref).worker_id, S.FAILED)
    with pytest.raises(ArrieroError) as refused:
        one.spawn(ref)
    assert refused.value.code is ErrorCode.WORKER_START_FAILED
    assert refused.value.details["crashes"] == 3
    assert 0 < refused.value.details["refused_for_s"] <= 60
    one.wait_worker(one.spawn(other).worker_id, S.IDLE)


def test_a_stop_is_no_crash(one: AgentProcess, tmp_path: Path) -> None:
    ref = scripted(tmp_path)
    for _ in range(4):
        idle = one.wait_worker(one.spawn(ref).worker_id, S.IDLE)
        one.client.stop_worker(idle.worker_id)
        one.wait_worker(idle.worker_id, S.STOPPED)


def test_out_of_grace_means_sigkill(one: AgentProcess, tmp_path: Path) -> None:
    idle = one.wait_worker(one.spawn(scripted(tmp_path, drain=False, sigterm=False)).worker_id, S.IDLE)
    identity = identity_of(one, idle.worker_id)
    one.client.stop_worker(idle.worker_id)
    assert one.client.worker(idle.worker_id).state is S.DRAINING
    stopped = one.wait_worker(idle.worker_id, S.STOPPED)
    assert stopped.exit is not None
    assert (stopped.exit.exit_code, stopped.exit.signal) == (137, "SIGKILL")
    assert "killed after 1 s of grace" in stopped.exit.message
    assert has_left_nothing(one, stopped, identity) or wait_for(
        lambda: has_left_nothing(one, stopped, identity), "nothing is left"
    )


def test_a_forced_stop_does_not_ask(one: AgentProcess, tmp_path: Path) -> None:
    idle = one.wait_worker(one.spawn(scripted(tmp_path)).worker_id, S.IDLE)
    assert one.client.raw("DELETE", f"/v1/workers/{idle.worker_id}?force=1").status == 202
    stopped = one.wait_worker(idle.worker_id, S.STOPPED)
    assert stopped.exit is not None
    assert stopped.exit.signal == "SIGKILL"


def test_a_worker_that_starts_can_be_stopped(one: AgentProcess, tmp_path: Path) -> None:
    spawned = one.spawn(scripted(tmp_path, ready=False))
    one.client.stop_worker(spawned.worker_id)
    stopped = one.wait_worker(spawned.worker_id, S.STOPPED)
    assert stopped.exit is not None
    assert stopped.exit.code is None


def test_a_callback_proves_who_it_is(one: AgentProcess, tmp_path: Path) -> None:
    idle = one.wait_worker(one.spawn(scripted(tmp_path)).worker_id, S.IDLE)
    secret = _callback_token(token_of(one, idle.worker_id))
    callback = ReadyCallback(
        worker_id=idle.worker_id, url=idle.url, model_ref=idle.model_ref, backend="cpu", device="cpu"
    )

    def answer(token: str, **changes: str) -> tuple[int, str]:
        body = msgspec.structs.replace(callback, **changes)
        raw = one.client.raw(
            "POST", "/v1/workers/ready", body=body, headers={"Authorization": f"Bearer {token}"}
        )
        return raw.status, msgspec.json.decode(raw.content).get("error", {}).get("code", "")

    assert answer(secret) == (200, ""), "the same callback again changes nothing"
    assert answer("0" * 64) == (401, "INVALID_API_KEY")
    assert answer(secret, worker_id="w-000000000000") == (401, "INVALID_API_KEY")
    assert answer(secret, url="http://127.0.0.1:9") == (409, "WORKER_ALREADY_REGISTERED")


def test_a_callback_must_come_from_loopback(one: AgentProcess, tmp_path: Path) -> None:
    spawned = one.spawn(scripted(tmp_path, ready=False))
    secret = _callback_token(token_of(one, spawned.worker_id))
    for url in ("http://10.0.0.1:80", "https://127.0.0.1:80", "http://127.0.0.1"):
        callback = ReadyCallback(
            worker_id=spawned.worker_id, url=url, model_ref=spawned.model_ref, backend="cpu", device="cpu"
        )
        with pytest.raises(ArrieroError) as refused:
            one.client.send(
                "POST", "/v1/workers/ready", body=callback, headers={"Authorization": f"Bearer {secret}"}
            )
        assert refused.value.code is ErrorCode.INVALID_REQUEST


def test_logs_are_shown_and_followed_to_the_end(one: AgentProcess, tmp_path: Path) -> None:
    spawned = one.spawn(scripted(tmp_path, lines=[f"line {n}" for n in range(5)], ready=False))
    path = f"/v1/workers/{spawned.worker_id}/logs"
    wait_for(lambda: b"line 4" in one.client.raw("GET", path).content, "the lines are there")
    assert one.client.raw("GET", f"{path}?lines=2").content == b"line 3\nline 4\n"
    followed: list[bytes] = []
    reader = threading.Thread(target=lambda: followed.extend(one.client.lines(f"{path}?follow=1&lines=1")))
    reader.start()
    wait_for(lambda: followed, "the stream has begun")
    one.client.stop_worker(spawned.worker_id)
    reader.join(60)
    assert not reader.is_alive(), "the stream ends with the worker"
    assert b"".join(followed).startswith(b"line 4\n")


def test_events_tell_everything_in_order(one: AgentProcess, tmp_path: Path) -> None:
    seen: list[AgentEvent] = []
    with one.client.stream("GET", "/v1/events", needs_done=False) as stream:
        events = (msgspec.json.decode(e.data, type=AgentEvent) for e in stream if e.comment is None)
        first = next(events)
        assert isinstance(first, AgentSnapshot)
        assert first.capabilities.backends == ["cpu"]
        spawned = one.spawn(scripted(tmp_path))
        secret = token_of(one, spawned.worker_id)
        one.wait_worker(spawned.worker_id, S.IDLE)
        one.client.stop_worker(spawned.worker_id)
        for event in events:
            seen.append(event)
            if isinstance(event, WorkerChanged) and event.worker.state is S.STOPPED:
                break
        for event in events:
            if isinstance(event, AgentBeat):
                assert event.ram_free_mb > 0
                assert event.disk_free_mb > 0
                break
    mine = [e for e in seen if isinstance(e, WorkerChanged) and e.worker.worker_id == spawned.worker_id]
    states = list(dict.fromkeys(event.worker.state for event in mine))
    assert states == [S.STARTING, S.LOADING, S.IDLE, S.DRAINING, S.STOPPED]
    assert {event.worker_token for event in mine} == {secret}


def test_what_is_in_the_catalog_and_what_is_promised_is_told(tmp_path: Path) -> None:
    # A worker that never calls back keeps its promise until it is stopped.
    mute = QUICK | {"worker_command": f"{sys.executable} -c 'import time; time.sleep(600)'"}
    with agent(mute) as one:
        path = write_llama(tmp_path / "m.gguf")
        body = ImportBody(path=str(path), model_ref="hf:org/m")
        with one.client.stream("GET", "/v1/events", needs_done=False) as stream:
            events = (msgspec.json.decode(e.data, type=AgentEvent) for e in stream if e.comment is None)
            first = next(events)
            assert isinstance(first, AgentSnapshot) and first.models == []
            (record,) = one.client.import_models(body).result().imported
            told = next(event for event in events if isinstance(event, ModelsChanged))
            assert [model.model_ref for model in told.models] == ["hf:org/m"]
            one.client.pin_model(record.model_id, is_pinned=True)
            told = next(event for event in events if isinstance(event, ModelsChanged))
            assert told.models[0].is_pinned
            spawned = one.spawn("hf:org/m", slots=1)
            next(e for e in events if isinstance(e, WorkerChanged))
            beat = next(e for e in events if isinstance(e, AgentBeat))
            run = state_dir.read(one.state.worker_file(spawned.worker_id), WorkerRunRecord)
            assert run is not None and beat.promised_mb == {"cpu": run.estimated_host_mb}
            one.client.send("DELETE", f"/v1/workers/{spawned.worker_id}?force=1")
            next(e for e in events if isinstance(e, AgentBeat) and not e.promised_mb)
            one.client.remove_model(record.model_id)
            seen: list[AgentEvent] = []
            while not seen or not isinstance(seen[-1], ModelsChanged):
                seen.append(next(events))
            assert seen[-1].models == []
        with one.client.stream("GET", "/v1/events", needs_done=False) as stream:
            again = msgspec.json.decode(next(iter(stream)).data, type=AgentEvent)
        assert isinstance(again, AgentSnapshot) and again.models == []


def test_a_snapshot_hands_over_the_tokens(one: AgentProcess, tmp_path: Path) -> None:
    idle = one.wait_worker(one.spawn(scripted(tmp_path)).worker_id, S.IDLE)
    with one.client.stream("GET", "/v1/events", needs_done=False) as stream:
        snapshot = msgspec.json.decode(next(iter(stream)).data, type=AgentEvent)
    assert isinstance(snapshot, AgentSnapshot)
    assert snapshot.worker_tokens[idle.worker_id] == token_of(one, idle.worker_id)
    assert idle.worker_id in {record.worker_id for record in snapshot.workers}


def test_a_backend_or_device_that_is_not_there_is_refused(one: AgentProcess, tmp_path: Path) -> None:
    ref = scripted(tmp_path)
    for wish, code in (
        ({"backend": "cuda"}, ErrorCode.BACKEND_UNAVAILABLE),
        ({"backend": "nonsense"}, ErrorCode.BACKEND_UNAVAILABLE),
        ({"device": "cuda:7"}, ErrorCode.DEVICE_NOT_FOUND),
        ({"backend": "cuda", "device": "cpu"}, ErrorCode.BACKEND_UNAVAILABLE),
    ):
        with pytest.raises(ArrieroError) as refused:
            one.spawn(ref, **wish)
        assert refused.value.code is code, wish
    assert one.client.workers() == [] or all(r.model_ref != ref for r in one.client.workers())


def test_wrong_requests_are_told_what_is_wrong(one: AgentProcess) -> None:
    client = one.client
    for body, code in (
        ({"model_ref": "nonsense"}, ErrorCode.INVALID_MODEL_REFERENCE),
        ({"model_ref": "hf:no/such"}, ErrorCode.MODEL_NOT_FOUND),
        ({"model_ref": "file:///nonexistent/x.gguf"}, ErrorCode.INVALID_MODEL_PATH),
        ({"model_ref": "demo", "slot": 1}, ErrorCode.INVALID_REQUEST),
        ({"model_ref": "demo", "slots": 0}, ErrorCode.INVALID_REQUEST),
        ({"model_ref": "hf:no/such", "engine": "steam"}, ErrorCode.BACKEND_UNAVAILABLE),
        ([], ErrorCode.INVALID_REQUEST),
    ):
        with pytest.raises(ArrieroError) as refused:
            client.send("POST", "/v1/workers", body=body)
        assert refused.value.code is code, body
    with pytest.raises(ArrieroError) as misspelt:
        client.send("POST", "/v1/workers", body={"model_ref": "demo", "slot": 1})
    assert misspelt.value.details["param"] == "slot"
    for method, path in (
        ("GET", "/v1/workers/w-000000000000"),
        ("DELETE", "/v1/workers/w-000000000000"),
        ("GET", "/v1/workers/w-000000000000/logs"),
    ):
        with pytest.raises(ArrieroError) as unknown:
            client.send(method, path)
        assert unknown.value.code is ErrorCode.WORKER_NOT_FOUND, path


def test_every_route_wants_the_token(one: AgentProcess) -> None:
    assert one.run is not None
    stranger = type(one.client)(one.run.url)
    for method, path in (
        ("GET", "/v1/health"),
        ("GET", "/v1/capabilities"),
        ("GET", "/v1/events"),
        ("GET", "/v1/workers"),
        ("POST", "/v1/workers"),
        ("POST", "/v1/workers/ready"),
        ("DELETE", "/v1/workers/w-000000000000"),
        ("GET", "/v1/workers/w-000000000000/logs"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
    ):
        assert stranger.raw(method, path, body={} if method == "POST" else None).status == 401, path


def test_health_and_metrics(one: AgentProcess, tmp_path: Path) -> None:
    health = one.client.health()
    assert one.run is not None
    assert (health.status, health.pid) == ("alive", one.run.pid)
    one.wait_worker(one.spawn(scripted(tmp_path)).worker_id, S.IDLE)
    page = one.client.raw("GET", "/metrics").content.decode()
    assert 'arriero_agent_workers{state="idle"} 1.0' in page
    assert "arriero_agent_worker_spawns_total" in page
    assert 'arriero_agent_downloads_total{state="complete"}' in page


def test_secrets_stay_out_of_argv_and_environment(one: AgentProcess, tmp_path: Path) -> None:
    idle = one.wait_worker(one.spawn(scripted(tmp_path)).worker_id, S.IDLE)
    secret = token_of(one, idle.worker_id).encode()
    assert one.run is not None
    for pid in (idle.pid, one.run.pid):
        for name in ("cmdline", "environ"):
            content = Path(f"/proc/{pid}/{name}").read_bytes()
            assert secret not in content
            assert one.run.token.encode() not in content
    for path in (one.state.run_file("agent"), one.state.worker_file(idle.worker_id)):
        assert path.stat().st_mode & 0o777 == 0o600


def _callback_token(token: str) -> str:
    from arriero.agent.held import callback_token

    return callback_token(token)


def test_a_dead_process_is_not_taken_for_a_new_one_with_its_pid(one: AgentProcess, tmp_path: Path) -> None:
    idle = one.wait_worker(one.spawn(scripted(tmp_path)).worker_id, S.IDLE)
    identity = identity_of(one, idle.worker_id)
    assert processes.is_alive(identity)
    assert not processes.is_alive(
        processes.Identity(identity.pid, identity.start_ticks + 1, identity.boot_id)
    )
