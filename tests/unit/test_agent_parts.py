"""Parts of an agent that need no process: logs, the feed, the witness of out-of-memory, the context."""

import asyncio
import dataclasses
import os
import threading
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest

from arriero.agent import engine_memory
from arriero.agent.child import worker_argv
from arriero.agent.engine_builds import BuildFile, FoundBuild, this_platform
from arriero.agent.events import QUEUE_MAX, Feed
from arriero.agent.held import callback_token
from arriero.agent.machine import Machine, seen_by_engine_alone, shown_devices
from arriero.agent.oom import OomWitness
from arriero.agent.preflight import CONTEXT_LEAST_TOKENS, Preflight, spec_of
from arriero.agent.spawner import worker_env
from arriero.agent.worker_logs import follow, prune
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import AgentBeat, AgentSnapshot
from arriero.contracts.records import Capabilities, DeviceRecord, EngineBuild
from arriero.domain.preflight import Promise, Promises, Wish
from arriero.engines.base import EngineSpec, Estimate
from arriero.engines.fake import Fake
from arriero.engines.llamacpp_backends import EngineDevice
from arriero.runtime import processes, state_dir
from arriero.runtime.log_files import rotate

# --- Logs --------------------------------------------------------------------------------------


def test_a_log_is_cut_while_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "w-1.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"old line\n" * 100)
        assert not rotate(path, 10_000), "small logs are left alone"
        assert rotate(path, 500)
        writer.write(b"new line\n")
    assert path.read_bytes() == b"new line\n"
    older = tmp_path / "w-1.log.1"
    assert older.read_bytes() == b"old line\n" * 100
    assert older.stat().st_mode & 0o777 == 0o600
    assert not rotate(tmp_path / "nothing.log", 1)


def test_only_the_newest_logs_of_ended_workers_are_kept(tmp_path: Path) -> None:
    paths = [tmp_path / f"w-{number}.log" for number in range(5)]
    for number, path in enumerate(paths):
        path.write_text("x")
        os.utime(path, (number, number))
    paths[0].with_suffix(".log.1").write_text("x")
    assert prune(tmp_path, [paths[1]], kept_max=2) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w-1.log", "w-3.log", "w-4.log"]


async def test_a_log_is_followed_over_a_rotation(tmp_path: Path) -> None:
    path, ended = tmp_path / "w-1.log", asyncio.Event()
    path.write_text("one\ntwo\n")
    async with asyncio.timeout(60), aclosing(follow(path, ended, lines=1)) as blocks:
        assert await anext(blocks) == b"two\n"
        with path.open("a") as writer:
            writer.write("three\n")
        assert await anext(blocks) == b"three\n"
        rotate(path, 1)
        path.write_text("four\n")
        assert await anext(blocks) == b"four\n"
        with path.open("a") as writer:
            writer.write("last\n")
        ended.set()
        assert [block async for block in blocks] == [b"last\n"]


# --- The feed ----------------------------------------------------------------------------------


def beat(number: int) -> AgentBeat:
    return AgentBeat(ram_free_mb=number, disk_free_mb=0, unix=0.0)


def snapshot() -> AgentSnapshot:
    capabilities = Capabilities(
        name="n",
        version="0",
        api_version=1,
        backends=[],
        devices=[],
        engines={},
        ram_mb=0,
        ram_free_mb=0,
        disk_free_mb=0,
        cpu_cores=1,
        os="",
        arch="",
    )
    return AgentSnapshot(capabilities=capabilities, workers=[], worker_tokens={}, downloads=[])


async def test_a_reader_gets_a_snapshot_then_every_change() -> None:
    feed = Feed(snapshot)
    async with asyncio.timeout(60), aclosing(feed.read()) as events:
        assert isinstance(await anext(events), AgentSnapshot)
        for number in range(3):
            feed.publish(beat(number))
        assert [await anext(events) for _ in range(3)] == [beat(0), beat(1), beat(2)]
        assert feed.readers == 1
    assert feed.readers == 0


async def test_a_slow_reader_gets_a_new_snapshot_instead_of_a_backlog() -> None:
    feed = Feed(snapshot)
    async with asyncio.timeout(60), aclosing(feed.read()) as events:
        await anext(events)
        for number in range(QUEUE_MAX + 2):
            feed.publish(beat(number))
        assert isinstance(await anext(events), AgentSnapshot)
        feed.publish(beat(7))
        assert await anext(events) == beat(7)


# --- Out of memory -----------------------------------------------------------------------------


def kills(folder: Path, count: int) -> None:
    (folder / "memory.events").write_text(f"low 0\nmax 3\noom 1\noom_kill {count}\n")


def test_only_a_rise_since_the_last_look_is_proof(tmp_path: Path) -> None:
    kills(tmp_path, 4)
    witness = OomWitness(pid=0, path=tmp_path, count=4)
    assert not witness.has_proof()
    kills(tmp_path, 5)
    assert witness.has_proof()
    witness.discount(tmp_path)
    assert not witness.has_proof(), "that one was somebody else's"
    kills(tmp_path, 6)
    witness.discount(tmp_path / "elsewhere")
    assert witness.has_proof()


def test_without_a_memory_cgroup_nothing_is_proven() -> None:
    assert not OomWitness(pid=-1).has_proof()


# --- Spawning ----------------------------------------------------------------------------------


def test_a_callback_token_is_made_from_the_workers_and_tells_nothing_of_it() -> None:
    assert callback_token("a") == callback_token("a") != callback_token("b")
    assert "a" * 48 not in callback_token("a" * 48)


def test_a_workers_environment_has_no_secrets_of_the_agent() -> None:
    env = worker_env({"PATH": "/bin", "HF_TOKEN": "secret", "ARRIERO_API_KEY": "secret"})
    assert env == {"PATH": "/bin", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_a_worker_command_is_split_as_a_shell_would() -> None:
    assert worker_argv("/opt/x/python -m 'a b'") == ["/opt/x/python", "-m", "a b"]
    assert worker_argv("")[1:] == ["-m", "arriero", "worker"]


class Hanging(Machine):
    """One whose cards do not answer until they are let."""

    looks = 0
    let: threading.Event

    def look(self) -> None:
        """Take a look, for as long as it takes."""
        self.looks += 1
        assert self.let.wait(30)
        super().look()


async def test_a_card_that_does_not_answer_holds_nobody_up(tmp_path: Path) -> None:
    made = Hanging(node="n", home=tmp_path, engines={}, builds=[], platform=this_platform())
    made.let = threading.Event()
    for _ in range(3):
        await made.look_aside(within_s=0.01)
    assert made.looks == 1, "each look that hangs takes a thread"
    assert not made.capabilities().devices
    made.let.set()
    await made.look_aside()
    assert made.looks == 1
    assert [device.id for device in made.capabilities().devices] == ["cpu"]
    await made.look_aside()
    assert made.looks == 2


def machine(tmp_path: Path) -> Machine:
    cpu = EngineDevice("cpu", 0, "a processor", 0, 0)
    own = FoundBuild(EngineBuild(name="cpu", version="1", is_own=True, backends=["cpu"]), (cpu,))
    made = Machine(node="n", home=tmp_path, engines={}, builds=[own], platform=this_platform())
    made.look()
    return made


def test_what_builds_answered_holds_for_this_boot_and_these_builds(tmp_path: Path) -> None:
    own = FoundBuild(
        EngineBuild(name="cpu", version="1", is_own=True, backends=["cpu"]),
        (EngineDevice("cpu", 0, "a processor", 0, 0),),
    )
    folder = tmp_path / "engines/cu128-1"
    known = BuildFile(name="cu128", version="1", sha256="a", wheel="w", installed_unix=1.0)
    card = FoundBuild(
        EngineBuild(name="cu128", version="1", backends=["cuda"], sha256="a", installed_unix=1.0),
        (EngineDevice("cuda", 0, "a card", 2, 1),),
        folder / "site",
    )
    assert engine_memory.recall(tmp_path) is None
    folder.mkdir(parents=True)
    state_dir.write(folder / "build.json", known)
    engine_memory.remember(tmp_path, [own, card])
    assert engine_memory.recall(tmp_path) == (own, card)
    # Another boot.
    file = tmp_path / "engines.json"
    content = file.read_text()
    file.write_text(content.replace(processes.boot_id(), "another"))
    assert engine_memory.recall(tmp_path) is None
    # Another build in its place, or none.
    file.write_text(content)
    state_dir.write(folder / "build.json", msgspec.structs.replace(known, installed_unix=2.0))
    assert engine_memory.recall(tmp_path) is None
    (folder / "build.json").unlink()
    assert engine_memory.recall(tmp_path) is None
    # One that could not be used may be of use by now.
    useless = FoundBuild(EngineBuild(name="cpu", version="1", is_own=True, problem="no"), ())
    engine_memory.remember(tmp_path, [useless])
    assert engine_memory.recall(tmp_path) is None


class Hungry(Fake):
    """An engine that takes a fixed share of the free memory for each token of context."""

    def __init__(self, mb_per_token: float) -> None:
        self._mb_per_token = mb_per_token

    async def estimate(self, spec: EngineSpec) -> Estimate:
        assert spec.context_tokens is not None
        return Estimate(round(spec.context_tokens * self._mb_per_token), 0, spec.context_tokens)


def test_a_card_that_is_left_alone_is_not_shown() -> None:
    cpu = DeviceRecord(id="cpu", backend="cpu", name="a processor", memory_mb=1, memory_free_mb=1)
    card = DeviceRecord(id="cuda:0", backend="cuda", name="a card", memory_mb=1, memory_free_mb=1)
    on_cpu = EngineDevice("cpu", 0, "a processor", 0, 0)
    on_card = EngineDevice("cuda", 0, "a card", 0, 0)
    assert shown_devices([on_cpu], [cpu, card], is_cpu_chosen=False) == (cpu, card)
    assert shown_devices([on_cpu], [cpu, card], is_cpu_chosen=True) == (cpu,)
    assert shown_devices([on_cpu, on_card], [cpu, card], is_cpu_chosen=True) == (cpu, card)


async def test_a_context_nobody_asked_for_is_reduced_until_it_fits(tmp_path: Path) -> None:
    here = machine(tmp_path)
    preflight = Preflight(here, log_bytes_max=1_000_000)
    spec = spec_of(tmp_path / "x.gguf", slots=1, threads=0, options={})
    kind = Hungry(here.resources().ram_free_mb / 3000)
    plan = await preflight.plan(
        kind, spec, Wish(), model_ref="demo", context=(8192, False), promises=Promises()
    )
    assert plan.is_reduced
    assert plan.spec.context_tokens == 2048
    preflight.recheck(plan, Promises())
    with pytest.raises(ArrieroError) as refused:
        await preflight.plan(kind, spec, Wish(), model_ref="demo", context=(8192, True), promises=Promises())
    assert refused.value.code is ErrorCode.INSUFFICIENT_RAM


async def test_a_model_too_large_for_any_context_is_refused_with_what_it_wanted(tmp_path: Path) -> None:
    here = machine(tmp_path)
    preflight = Preflight(here, log_bytes_max=1_000_000)
    spec = spec_of(tmp_path / "x.gguf", slots=1, threads=0, options={})
    kind = Hungry(here.resources().ram_free_mb / CONTEXT_LEAST_TOKENS * 2)
    with pytest.raises(ArrieroError) as refused:
        await preflight.plan(kind, spec, Wish(), model_ref="demo", context=(4096, False), promises=Promises())
    assert refused.value.details["required_mb"] > here.resources().ram_free_mb


async def test_the_last_check_before_the_spawn_sees_new_promises(tmp_path: Path) -> None:
    here = machine(tmp_path)
    preflight = Preflight(here, log_bytes_max=1_000_000)
    spec = spec_of(tmp_path / "x.gguf", slots=1, threads=0, options={"memory_mb": 10})
    plan = await preflight.plan(
        Fake(), spec, Wish(), model_ref="demo", context=(512, False), promises=Promises()
    )
    greedy = dataclasses.replace(plan.need, host_mb=here.resources().ram_free_mb)
    taken = Promises((Promise(greedy.host_mb, 0, "cpu"),))
    with pytest.raises(ArrieroError) as refused:
        preflight.recheck(plan, taken)
    assert refused.value.code is ErrorCode.INSUFFICIENT_RAM


def test_cards_only_the_engine_knows_are_devices_too() -> None:
    vulkan = EngineDevice("vulkan", 0, "A card", 8 << 30, 6 << 30)
    [found] = seen_by_engine_alone([EngineDevice("cpu", 0, "cpu", 1, 1), vulkan], [])
    assert (found.id, found.memory_mb, found.memory_free_mb) == ("vulkan:0", 8192, 6144)
