"""How an agent starts, dies, is followed by the next one, and ends: its workers with it, or adopted."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tests.integration.agent_scripts import (
    QUICK,
    WORKER,
    has_left_nothing,
    identity_of,
    scripted,
    tell,
    token_of,
)

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import SpawnBody
from arriero.contracts.states import WorkerState as S
from arriero.runtime import processes
from arriero.runtime.serve import bind
from arriero.testing.agents import AgentProcess, wait_for


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def test_sigterm_stops_all_workers_at_the_same_time(home: Path, models: Path) -> None:
    with AgentProcess(home, {**QUICK, "stop_grace_s": "5"}) as agent:
        stubborn = scripted(models, drain=False, sigterm=False)
        idle = [agent.wait_worker(agent.spawn(stubborn).worker_id, S.IDLE) for _ in range(3)]
        identities = [identity_of(agent, record.worker_id) for record in idle]
        assert agent.process is not None
        agent.process.terminate()
        wait_for(
            lambda: {record.state for record in agent.client.workers()} == {S.DRAINING}, "all drain at once"
        )
        with pytest.raises(ArrieroError) as refused:
            agent.spawn(stubborn)
        assert refused.value.code is ErrorCode.NO_CAPACITY
        assert agent.process.wait(60) == 0
        assert all(has_left_nothing(agent, record, who) for record, who in zip(idle, identities, strict=True))
        assert not agent.state.run_file("agent").exists()


def test_an_agent_keeps_its_own_log_small_while_it_lives(home: Path) -> None:
    agent = AgentProcess(home, {"log_bytes_max": "5000"})
    log = agent.state.log_file("agent")
    log.parent.mkdir(parents=True)
    log.write_text("months\n" * 1000)
    with agent:
        wait_for(lambda: log.stat().st_size < 5000, "it is cut")
        assert log.with_suffix(".log.1").read_text().startswith("months\nmonths\n")
        assert agent.terminate() == 0
        assert "agent_ended" in log.read_text() and "months" not in log.read_text()


def test_workers_outlive_their_agent_and_are_adopted(home: Path, models: Path) -> None:
    first = AgentProcess(home, QUICK)
    with first:
        idle = first.wait_worker(first.spawn(scripted(models), slots=2).worker_id, S.IDLE)
        token, identity = token_of(first, idle.worker_id), identity_of(first, idle.worker_id)
        first.kill()
        assert processes.is_alive(identity)
        tell(idle, token, "/become/busy")
        with AgentProcess(home, QUICK) as second:
            [adopted] = second.client.workers()
            assert (adopted.worker_id, adopted.url, adopted.pid) == (idle.worker_id, idle.url, idle.pid)
            second.wait_worker(idle.worker_id, S.BUSY)
            assert token_of(second, idle.worker_id) == token
            assert first.run is not None and second.run is not None
            assert second.run.url == first.run.url, "a worker that was loading would call back there"
            lease = f"{second.run.pid}:{second.run.pid_start_ticks}"
            wait_for(lambda: tell(idle, token, "/leases", "GET") == [lease], "the lease is renewed")
            tell(idle, token, "/become/idle")
            second.wait_worker(idle.worker_id, S.IDLE)
            assert second.terminate() == 0
            assert has_left_nothing(second, idle, identity)


def test_an_adopted_workers_death_is_seen_at_once(home: Path, models: Path) -> None:
    # Health checks an hour apart: only the process's descriptor can tell.
    slow = {**QUICK, "health_interval_s": "3600"}
    with AgentProcess(home, slow) as first:
        idle = first.wait_worker(first.spawn(scripted(models)).worker_id, S.IDLE)
        first.kill()
        with AgentProcess(home, slow) as second:
            os.kill(idle.pid, signal.SIGKILL)
            failed = second.wait_worker(idle.worker_id, S.FAILED)
            assert failed.exit is not None
            assert (failed.exit.exit_code, failed.exit.code) == (None, ErrorCode.WORKER_LOST)


def test_an_adopted_worker_is_killed_after_grace(home: Path, models: Path) -> None:
    with AgentProcess(home, QUICK) as first:
        ref = scripted(models, drain=False, sigterm=False)
        idle = first.wait_worker(first.spawn(ref).worker_id, S.IDLE)
        identity = identity_of(first, idle.worker_id)
        first.kill()
        with AgentProcess(home, QUICK) as second:
            second.client.stop_worker(idle.worker_id)
            second.wait_worker(idle.worker_id, S.STOPPED)
            assert has_left_nothing(second, idle, identity)


def test_what_ended_while_no_agent_looked_is_recorded(home: Path, models: Path) -> None:
    with AgentProcess(home, QUICK) as first:
        silent = first.wait_worker(first.spawn(scripted(models)).worker_id, S.IDLE)
        told = {"exit_code": 137, "signal": "SIGKILL", "code": "OUT_OF_MEMORY", "message": "engine killed"}
        writer = first.wait_worker(first.spawn(scripted(models, exit=told)).worker_id, S.IDLE)
        dead = [(record, identity_of(first, record.worker_id)) for record in (silent, writer)]
        first.kill()
        for record, identity in dead:
            os.kill(record.pid, signal.SIGKILL)
            assert processes.wait_gone(identity, 30)
        with AgentProcess(home, QUICK) as second:
            unknown, known = (second.client.worker(record.worker_id) for record in (silent, writer))
            assert (unknown.state, known.state) == (S.STOPPED, S.FAILED)
            assert unknown.exit is not None
            assert known.exit is not None
            assert unknown.exit.exit_code is None
            assert (known.exit.code, known.exit.exit_code) == ("OUT_OF_MEMORY", 137)
            assert all(has_left_nothing(second, record, identity) for record, identity in dead)


def test_a_foreign_process_is_neither_adopted_nor_killed(home: Path, models: Path) -> None:
    with AgentProcess(home, QUICK) as first:
        idle = first.wait_worker(first.spawn(scripted(models)).worker_id, S.IDLE)
        path = first.state.worker_file(idle.worker_id)
        token, identity = token_of(first, idle.worker_id), identity_of(first, idle.worker_id)
        first.kill()
        path.write_bytes(path.read_bytes().replace(token.encode(), b"0" * len(token)))
        try:
            with AgentProcess(home, QUICK) as second:
                refused = second.client.worker(idle.worker_id)
                assert refused.exit is not None
                assert (refused.state, refused.exit.code) == (S.FAILED, ErrorCode.WORKER_UNHEALTHY)
                assert second.terminate() == 0
                assert processes.is_alive(identity)
        finally:
            processes.signal_group(identity.pid, signal.SIGKILL)
            processes.wait_gone(identity, 30)


def test_a_worker_never_lives_without_a_record(home: Path, models: Path, tmp_path: Path) -> None:
    """The spec comes after the record; a worker whose stdin ends without one ends as well."""
    done = subprocess.run(
        [*WORKER.split(), str(tmp_path)], stdin=subprocess.DEVNULL, timeout=60, capture_output=True
    )
    assert done.returncode == 3
    real = subprocess.run(
        [sys.executable, "-m", "arriero", "worker"], stdin=subprocess.DEVNULL, timeout=60, capture_output=True
    )
    assert real.returncode not in (0, None)


def test_an_idle_worker_is_unloaded(home: Path, models: Path) -> None:
    with AgentProcess(home, {**QUICK, "idle_timeout_s": "0.5"}) as agent:
        stopped = agent.wait_worker(agent.spawn(scripted(models)).worker_id, S.STOPPED)
        assert stopped.exit is not None
        assert stopped.exit.message == "without work for 0.5 s"


def test_no_callback_in_time_is_a_ready_timeout(home: Path, models: Path) -> None:
    settings = {**QUICK, "worker_ready_timeout_s": "3", "worker_command": "sleep 600"}
    with AgentProcess(home, settings) as agent:
        spawned = agent.spawn(scripted(models))
        identity = identity_of(agent, spawned.worker_id)
        failed = agent.wait_worker(spawned.worker_id, S.FAILED)
        assert failed.exit is not None
        assert (failed.exit.code, failed.exit.signal) == (ErrorCode.WORKER_READY_TIMEOUT, "SIGKILL")
        assert "3 s" in failed.exit.message
        wait_for(lambda: has_left_nothing(agent, failed, identity), "nothing is left")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_worker_program_that_cannot_be_run(
    home: Path, models: Path, tmp_path: Path, is_there: bool
) -> None:
    program = tmp_path / "worker-program"
    if is_there:
        program.write_text("#!/bin/sh\n")
    with AgentProcess(home, {"worker_command": str(program)}) as agent:
        with pytest.raises(ArrieroError) as refused:
            agent.spawn(scripted(models))
        assert refused.value.code is ErrorCode.WORKER_BINARY_NOT_FOUND
        assert str(tmp_path) not in refused.value.message
        assert agent.client.workers() == []
        assert list(agent.state.worker_files()) == []


def test_a_second_agent_is_refused(home: Path) -> None:
    with AgentProcess(home, QUICK) as agent:
        second = AgentProcess(home, QUICK)
        assert second.launch().wait(60) == 1
        assert "ALREADY_RUNNING" in second.log
        assert agent.client.health().status == "alive"


def test_a_taken_port_is_told(home: Path) -> None:
    sock = bind("127.0.0.1", 0)
    try:
        agent = AgentProcess(home, {"agent_port": str(sock.getsockname()[1])})
        assert agent.launch().wait(60) == 1
        assert "PORT_IN_USE" in agent.log
    finally:
        sock.close()


def test_a_state_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    log = tmp_path / "log"
    process = processes.spawn_detached(
        [sys.executable, "-m", "arriero", "agent"],
        log_path=log,
        env={**os.environ, "ARRIERO_HOME": str(tmp_path / "file" / "home"), "ARRIERO_AGENT_PORT": "0"},
    )
    assert process.wait(60) == 1
    assert "STATE_DIR_UNUSABLE" in log.read_text()
    assert str(tmp_path) not in log.read_text()


def test_two_spawns_at_once_get_two_workers(home: Path, models: Path) -> None:
    with AgentProcess(home, QUICK) as agent:
        ref, found = scripted(models), []
        threads = [
            threading.Thread(target=lambda: found.append(agent.client.spawn(SpawnBody(model_ref=ref))))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len({record.worker_id for record in found}) == 4
        for record in found:
            agent.wait_worker(record.worker_id, S.IDLE)


def test_a_run_record_that_is_no_json_is_removed(home: Path) -> None:
    with AgentProcess(home, QUICK) as first:
        assert first.terminate() == 0
        broken = first.state.worker_file("w-00000000dead")
        broken.write_bytes(b'{"record":')
        with AgentProcess(home, QUICK) as second:
            assert second.client.workers() == []
            assert not broken.exists()
    shutil.rmtree(home)


def test_a_disk_without_room_for_a_log_is_refused(home: Path, models: Path) -> None:
    with AgentProcess(home, {**QUICK, "log_bytes_max": str(10**16)}) as agent:
        with pytest.raises(ArrieroError) as refused:
            agent.spawn(scripted(models))
        assert refused.value.code is ErrorCode.INSUFFICIENT_DISK
        assert refused.value.details["required_mb"] > refused.value.details["available_mb"]


@pytest.mark.parametrize("moment", ["process", "record", "callback"])
def test_an_agent_killed_while_it_spawns_leaves_nothing_unknown(
    home: Path, models: Path, moment: str
) -> None:
    ref = scripted(models)
    with AgentProcess(home, QUICK) as first:
        has_come: dict[str, Callable[[], object]] = {
            "process": lambda: _workers_below(home),
            "record": first.state.worker_files,
            "callback": lambda: any(run.record.url for run in first.state.worker_runs()),
        }
        asking = [threading.Thread(target=_spawn_or_not, args=(first, ref)) for _ in range(6)]
        for thread in asking:
            thread.start()
        wait_for(has_come[moment], f"the first {moment} is there")
        first.kill()
        for thread in asking:
            thread.join(60)
        with AgentProcess(home, QUICK) as second:
            known = {record.pid for record in second.client.workers() if record.state is not S.STOPPED}
            wait_for(lambda: _workers_below(home) <= known, "only known workers live")
            assert second.terminate() == 0
            wait_for(lambda: not _workers_below(home), "no worker lives")
            assert not list(second.state.worker_files())


def _spawn_or_not(agent: AgentProcess, ref: str) -> None:
    with contextlib.suppress(ArrieroError):
        agent.spawn(ref)


def _workers_below(home: Path) -> set[int]:
    """Return the pids of the workers whose state folder is `home`, known to an agent or not."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_worker = any("scripted_worker" in word for word in process.cmdline())
            if is_worker and process.environ().get("ARRIERO_HOME") == str(home):
                found.add(process.pid)
    return found
