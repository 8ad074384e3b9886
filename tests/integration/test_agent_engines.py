"""A real agent with real workers and engines: llama.cpp on the demo model, and the fake one for faults."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.agent_scripts import has_left_nothing, identity_of, token_of

from arriero.client.api import Worker
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import WorkerRecord
from arriero.contracts.requests import InferenceBody
from arriero.contracts.states import WorkerState as S
from arriero.runtime import cgroups, processes
from arriero.runtime.serve import bind
from arriero.testing.agents import AgentProcess, wait_for

FAKE = {"engine": "fake", "health_interval_s": "0.2", "stop_grace_s": "2"}
#: Each file has its own ports, so that tests side by side do not look for the same ones.
PORTS = 23301


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def worker_of(agent: AgentProcess, record: WorkerRecord) -> Worker:
    return Worker(record.url, token_of(agent, record.worker_id))


def engine_of(agent: AgentProcess, record: WorkerRecord) -> processes.Identity:
    pid = worker_of(agent, record).health().engine_pid
    assert pid is not None
    engine = processes.identity(pid)
    assert engine is not None
    return engine


def fake(agent: AgentProcess, *, until: S = S.IDLE, **knobs: Any) -> WorkerRecord:
    spawned = agent.spawn("demo", engine="fake", options=knobs)
    return agent.wait_worker(spawned.worker_id, until)


def test_the_demo_model_answers_and_the_worker_goes_idle_busy_idle(home: Path) -> None:
    with AgentProcess(home) as agent:
        spawned = agent.spawn("demo")
        idle = agent.wait_worker(spawned.worker_id, S.IDLE)
        assert idle.load_fraction == 1.0
        assert idle.context_tokens > 0
        assert idle.memory_mb > 0
        body = InferenceBody(prompt="Count from 5 to 25.", max_tokens=8, temperature=0.0)
        assert worker_of(agent, idle).infer(body).total_tokens > 0
        [model] = agent.client.models()
        assert (model.model_ref, model.times_used) == ("demo", 1)
        identity = identity_of(agent, idle.worker_id)
        agent.client.stop_worker(idle.worker_id)
        stopped = agent.wait_worker(idle.worker_id, S.STOPPED)
        assert stopped.exit is not None
        assert stopped.exit.exit_code == 0
        assert has_left_nothing(agent, stopped, identity)


def test_a_taken_port_is_passed_over(home: Path) -> None:
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(contextlib.closing(bind("127.0.0.1", PORTS, tries=50)))
        base = taken.getsockname()[1]
        agent = stack.enter_context(AgentProcess(home, {**FAKE, "worker_port_base": str(base)}))
        first, second = fake(agent), fake(agent)
        ports = [int(record.url.rpartition(":")[2]) for record in (first, second)]
        assert base not in ports
        assert len(set(ports)) == 2
        assert all(base < port < base + 200 for port in ports)


def test_what_cannot_fit_is_refused_with_the_numbers(home: Path) -> None:
    with AgentProcess(home, {**FAKE, "node_name": "small-box"}) as agent:
        with pytest.raises(ArrieroError) as refused:
            agent.spawn("demo", engine="fake", options={"memory_mb": 10**8})
        details = refused.value.details
        assert refused.value.code is ErrorCode.INSUFFICIENT_RAM
        assert details["required_mb"] >= 10**8
        assert 0 < details["available_mb"] < 10**8
        assert details["node"] == "small-box"
        assert details["suggested_action"]
        assert agent.client.workers() == []


def test_memory_promised_to_a_loading_worker_is_not_given_twice(home: Path) -> None:
    with AgentProcess(home, FAKE) as agent:
        free_mb = agent.client.capabilities().ram_free_mb
        first = agent.spawn("demo", engine="fake", options={"memory_mb": free_mb * 6 // 10, "load_s": 60})
        agent.wait_worker(first.worker_id, S.LOADING)
        with pytest.raises(ArrieroError) as refused:
            agent.spawn("demo", engine="fake", options={"memory_mb": free_mb * 6 // 10})
        assert refused.value.code is ErrorCode.INSUFFICIENT_RAM
        assert refused.value.details["promised_mb"] > 0
        fake(agent, memory_mb=1)


def test_of_many_requests_at_once_no_more_are_taken_than_fit(home: Path) -> None:
    with AgentProcess(home, FAKE) as agent:
        free_mb = agent.client.capabilities().ram_free_mb
        codes: list[str] = []

        def ask() -> None:
            try:
                agent.spawn("demo", engine="fake", options={"memory_mb": free_mb * 6 // 10, "load_s": 60})
                codes.append("taken")
            except ArrieroError as error:
                codes.append(str(error.code))

        asking = [threading.Thread(target=ask) for _ in range(6)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(60)
        assert sorted(codes) == ["INSUFFICIENT_RAM"] * 5 + ["taken"]


def test_a_file_that_is_no_model_is_refused_before_anything_starts(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 100)
    with AgentProcess(home) as agent:
        with pytest.raises(ArrieroError) as refused:
            agent.spawn(path.as_uri())
        assert refused.value.code is ErrorCode.MODEL_CORRUPTED
        assert agent.client.workers() == []


def test_an_unknown_knob_is_refused(home: Path) -> None:
    with AgentProcess(home, FAKE) as agent:
        with pytest.raises(ArrieroError) as refused:
            agent.spawn("demo", options={"speed": 3})
        assert refused.value.code is ErrorCode.INVALID_REQUEST


def test_an_engine_that_fails_to_load_fails_its_worker(home: Path) -> None:
    with AgentProcess(home, FAKE) as agent:
        failed = fake(agent, until=S.FAILED, fail_load="no such tensor")
        assert failed.exit is not None
        assert failed.exit.code == ErrorCode.WORKER_START_FAILED
        assert "no such tensor" in failed.exit.message + " ".join(failed.exit.log_tail)


def test_an_engine_that_is_killed_fails_its_worker(home: Path) -> None:
    with AgentProcess(home, FAKE) as agent:
        idle = fake(agent, child=True)
        identity = identity_of(agent, idle.worker_id)
        engine_pid = worker_of(agent, idle).health().engine_pid
        assert engine_pid is not None
        os.kill(engine_pid, signal.SIGKILL)
        failed = agent.wait_worker(idle.worker_id, S.FAILED)
        assert failed.exit is not None
        assert failed.exit.code == ErrorCode.WORKER_LOST, "a kill is not a lack of memory"
        wait_for(lambda: has_left_nothing(agent, failed, identity), "the worker ends after its engine")


def test_a_killed_worker_takes_its_engine_along(home: Path) -> None:
    with AgentProcess(home, FAKE) as agent:
        # Not even one that reacts to nothing stays behind.
        idle = fake(agent, child=True, hang_unload=True)
        engine = engine_of(agent, idle)
        os.kill(idle.pid, signal.SIGKILL)
        agent.wait_worker(idle.worker_id, S.FAILED)
        assert processes.wait_gone(engine, 30)


def test_sigterm_ends_workers_whose_engines_hang(home: Path) -> None:
    with AgentProcess(home, {**FAKE, "stop_grace_s": "1"}) as agent:
        idle = [fake(agent, hang_unload=True, child=True) for _ in range(2)]
        identities = [identity_of(agent, record.worker_id) for record in idle]
        engines = [engine_of(agent, record) for record in idle]
        assert agent.terminate() == 0
        assert all(processes.wait_gone(engine, 30) for engine in engines)
        assert all(has_left_nothing(agent, r, who) for r, who in zip(idle, identities, strict=True))


def test_tokens_flow_while_the_agent_dies_and_the_next_one_comes(home: Path) -> None:
    with AgentProcess(home, FAKE) as first:
        idle = fake(first, token_s=0.05)
        answers: list[int] = []
        body = InferenceBody(prompt="on and on", max_tokens=100, ignore_eos=True)
        worker = worker_of(first, idle)
        asker = threading.Thread(target=lambda: answers.append(worker.infer(body).total_tokens))
        asker.start()
        try:
            first.wait_worker(idle.worker_id, S.BUSY)
            first.kill()
            with AgentProcess(home, FAKE) as second:
                [adopted] = second.client.workers()
                assert adopted.worker_id == idle.worker_id
                asker.join(60)
                assert answers == [100]
                second.wait_worker(idle.worker_id, S.IDLE)
        finally:
            first.clean_up()
            asker.join(60)


@pytest.mark.parametrize("lease_s", ["0", "0.5"])
def test_workers_end_when_no_agent_comes(home: Path, lease_s: str) -> None:
    settings = {**FAKE, "lease_s": lease_s}
    with AgentProcess(home, settings) as first:
        idle = fake(first)
        identity = identity_of(first, idle.worker_id)
        first.kill()
        assert processes.wait_gone(identity, 30)
        with AgentProcess(home, settings) as second:
            [ended] = second.client.workers()
            assert ended.state is S.STOPPED
            assert ended.exit is not None
            assert ended.exit.exit_code == 0, "the worker wrote it down"
            assert has_left_nothing(second, ended, identity)


def _has_worked_since(agent: AgentProcess, record: WorkerRecord) -> bool:
    now = agent.client.worker(record.worker_id)
    return now.state is S.IDLE and now.last_activity_unix > record.last_activity_unix


@pytest.fixture
def memory_group(tmp_path: Path) -> Iterator[Path]:
    """A memory cgroup of our own, version 1 or 2 as found."""
    mine = cgroups.memory_cgroup(os.getpid())
    if mine is None or os.getuid() != 0:
        pytest.skip("needs root and a memory cgroup")
    folder = mine / f"arriero-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error.strerror}")
    yield folder
    wait_for(lambda: not (folder / "cgroup.procs").read_text(), "the cgroup is empty")
    folder.rmdir()


def limit(folder: Path, limit_bytes: int) -> None:
    for name in ("memory.max", "memory.limit_in_bytes"):
        if (folder / name).exists():
            (folder / name).write_text(str(limit_bytes))
            return
    raise AssertionError("a memory cgroup has a limit")


@pytest.mark.root
def test_a_worker_the_kernel_kills_for_memory_is_told_with_proof(home: Path, memory_group: Path) -> None:
    with AgentProcess(home, {**FAKE, "health_interval_s": "3600"}) as agent:
        idle = fake(agent)
        (memory_group / "cgroup.procs").write_text(str(idle.pid))
        # The agent looks at the cgroup with every news: it knows of the move before the kill.
        assert cgroups.memory_cgroup(idle.pid) == memory_group
        worker_of(agent, idle).infer(InferenceBody(prompt="again", max_tokens=1))
        wait_for(lambda: _has_worked_since(agent, idle), "its news has come")
        limit(memory_group, 8 << 20)
        with contextlib.suppress(ArrieroError):
            worker_of(agent, idle).infer(InferenceBody(prompt="word " * 200_000, max_tokens=1))
        failed = agent.wait_worker(idle.worker_id, S.FAILED)
        assert failed.exit is not None
        assert (failed.exit.code, failed.exit.exit_code) == (ErrorCode.OUT_OF_MEMORY, 137)
        assert failed.exit.signal == "SIGKILL"
        assert cgroups.oom_kill_count(memory_group) >= 1


@pytest.mark.root
def test_a_kill_in_a_memory_cgroup_is_no_lack_of_memory(home: Path, memory_group: Path) -> None:
    with AgentProcess(home, FAKE) as agent:
        idle = fake(agent)
        (memory_group / "cgroup.procs").write_text(str(idle.pid))
        os.kill(idle.pid, signal.SIGKILL)
        failed = agent.wait_worker(idle.worker_id, S.FAILED)
        assert failed.exit is not None
        assert failed.exit.code == ErrorCode.WORKER_LOST


@pytest.mark.root
def test_the_limit_of_a_memory_cgroup_counts(home: Path, memory_group: Path) -> None:
    limit(memory_group, 600 << 20)
    with AgentProcess(home, FAKE) as agent:
        assert agent.process is not None
        (memory_group / "cgroup.procs").write_text(str(agent.process.pid))
        capabilities = agent.client.capabilities()
        assert capabilities.ram_mb == 600
        assert capabilities.ram_free_mb < 600
        with pytest.raises(ArrieroError) as refused:
            agent.spawn("demo", engine="fake", options={"memory_mb": 700})
        assert refused.value.code is ErrorCode.INSUFFICIENT_RAM
        assert "memory limit" in refused.value.details["suggested_action"]
        fake(agent, memory_mb=10)
