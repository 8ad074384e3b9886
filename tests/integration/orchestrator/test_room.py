"""Room for a model: who goes for it, who waits, and who is woken."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.integration.orchestrator.scripted import (
    WAIT_S,
    RunningOrchestrator,
    ScriptedAgent,
    WorkerScript,
    agent,
    orchestrator,
    read_events,
)

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import AgentBeat, NodeChanged, TaskPlacing
from arriero.contracts.records import Capabilities, DeviceRecord, ModelRecord, NodeRecord, WorkerRecord
from arriero.contracts.states import NodeState, WorkerState
from arriero.domain.placement import Wants
from arriero.domain.placement_decision import Wake
from arriero.domain.placement_memory import Needed
from arriero.orchestrator.feed import Feed
from arriero.orchestrator.nodes import Node, NodeRegistry
from arriero.orchestrator.provisioning import ModelProvisioner
from arriero.orchestrator.room import LOOKS_PER_S, Found, RoomFinder
from arriero.orchestrator.store.nodes import NodeEntry
from arriero.runtime.clock import SystemClock
from arriero.runtime.settings import Settings
from arriero.runtime.wake import magic_packet

A, B, C = "hf:org/a", "hf:org/b", "hf:org/c"
MAC = "52:54:00:12:34:56"


def model(model_ref: str, size_mb: int = 5000, **changes: Any) -> ModelRecord:
    record = ModelRecord(
        model_id=f"m-{model_ref[-1] * 12}", model_ref=model_ref, provider="hf", files=["a.gguf"],
        size_bytes=size_mb << 20, sha256="0" * 64, added_unix=7.0,
    )  # fmt: skip
    return msgspec.structs.replace(record, **changes)


def holds_one(andes: ScriptedAgent, *refs: str) -> None:
    """Have models of which two do not fit at a time."""
    andes.memory_of = dict.fromkeys(refs, 5000)
    andes.models[:] = [model(ref) for ref in refs]
    andes.spawn.fractions = ()


async def ready(o: RunningOrchestrator, model_ref: str) -> None:
    def is_idle(answer: Any) -> bool:
        return any(w["state"] == "idle" and w["model_ref"] == model_ref for w in answer["workers"])

    await o.until("/v1/workers", is_idle)


async def ask(o: RunningOrchestrator, model_ref: str, **body: Any) -> list[dict[str, Any]]:
    """Run a task to its end; return its events."""
    async with o.session.post(
        f"{o.url}/v1/tasks", json={"prompt": "x", "model": model_ref, **body},
        headers={"Accept": "text/event-stream"},
    ) as response:  # fmt: skip
        assert response.status == 200, await response.text()
        return await read_events(response)


def told(events: list[dict[str, Any]]) -> str:
    return "\n".join(event.get("message", "") for event in events)


async def test_an_idle_worker_makes_room_and_of_two_the_one_used_longest_ago(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes:
        holds_one(andes, A, B, C)
        andes.memory_of[A] = andes.memory_of[C] = 3500
        andes.has_models(model(A, 3500), model(B, 3500), model(C, 3500))
        old, new = await andes.add_worker(C), await andes.add_worker(A)
        old.record = msgspec.structs.replace(old.record, last_activity_unix=5.0)
        new.record = msgspec.structs.replace(new.record, last_activity_unix=9.0)
        async with orchestrator(tmp_path, starvation_s="2") as o:
            await ready(o, A)
            events = await ask(o, B)
            assert events[-1] == {"DONE": True}, events
            assert "stops what was used longest ago: 1 worker (hf:org/c)" in told(events)
            assert {w.record.model_ref for w in andes.workers.values()} == {A, B}
            assert [body.model_ref for body in andes.spawned] == [B]


async def test_a_pinned_model_makes_no_room_and_the_numbers_are_told(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes:
        holds_one(andes, A, B)
        andes.models[0] = model(A, is_pinned=True)
        await andes.add_worker(A)
        async with orchestrator(tmp_path) as o:
            await ready(o, A)
            events = await ask(o, B)
            error = events[-1]["error"]
            assert error["code"] == "INSUFFICIENT_RAM"
            assert error["message"] == "andes has 2.5 GiB free, the model needs 4.9 GiB"
            assert len(andes.workers) == 1 and andes.spawned == []


async def test_a_loaded_model_is_served_until_the_other_has_waited_its_time(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes:
        holds_one(andes, A, B)
        first = await andes.add_worker(A, WorkerScript(tokens=3, hold_after=1))
        async with orchestrator(tmp_path, starvation_s="1") as o, asyncio.TaskGroup() as group:
            await ready(o, A)
            held = group.create_task(ask(o, A))
            async with asyncio.timeout(WAIT_S):
                await first.held.wait()
            other = group.create_task(ask(o, B))
            # Its turn has come: nothing new goes to the loaded one, what it computes goes on.
            listed = f"{o.url}/v1/placements:explain"
            async with asyncio.timeout(WAIT_S):
                while True:
                    async with o.session.post(listed, json={"model": A}) as response:
                        explained = await response.json()
                    if explained["worker_id"] is None:
                        break
                    await asyncio.sleep(0.02)
            assert explained["refused_workers"][0]["why"] == f"makes room for {B}"
            again = group.create_task(ask(o, A))
            assert not held.done() and not other.done() and andes.spawned == []
            first.go_on.set()
        assert held.result()[-1] == other.result()[-1] == again.result()[-1] == {"DONE": True}
        assert "its turn has come, stops: 1 worker (hf:org/a)" in told(other.result())
        assert "waits while hf:org/a has requests there, 1 s at most" in told(other.result())
        assert [body.model_ref for body in andes.spawned] == [B, A]


async def test_a_hundred_requests_for_two_models_swap_them_a_few_times(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes:
        holds_one(andes, A, B)
        async with orchestrator(tmp_path, starvation_s="30") as o, asyncio.TaskGroup() as group:
            await o.until("/v1/nodes", lambda answer: answer["nodes"])
            asked = [group.create_task(ask(o, (A, B)[number % 2])) for number in range(100)]
        assert all(task.result()[-1] == {"DONE": True} for task in asked)
        assert len(andes.spawned) <= 4, [body.model_ref for body in andes.spawned]


async def test_a_model_that_is_asked_for_in_two_ways_is_loaded_once(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes:
        holds_one(andes, A, B)
        first = await andes.add_worker(A, WorkerScript(tokens=3, hold_after=1))
        async with orchestrator(tmp_path, starvation_s="30") as o, asyncio.TaskGroup() as group:
            await ready(o, A)
            held = group.create_task(ask(o, A))
            async with asyncio.timeout(5):
                await first.held.wait()
            asked = []
            for place in ({}, {"node": "andes"}):
                body = {"prompt": "x", "model": B, **place}
                async with o.session.post(f"{o.url}/v1/tasks", json=body) as response:
                    asked.append(f"/v1/tasks/{(await response.json())['task_id']}")
                await o.until(asked[-1], lambda task: task["state"] == "placing")
            first.go_on.set()
            for path in asked:
                await o.until(path, lambda task: task["state"] == "done")
        assert held.result()[-1] == {"DONE": True}
        assert [body.model_ref for body in andes.spawned] == [B], "the other one evicts it and loads it again"


async def test_who_leaves_while_waiting_for_room_costs_nobody_its_place(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes:
        holds_one(andes, A, B)
        first = await andes.add_worker(A, WorkerScript(tokens=3, hold_after=1))
        async with orchestrator(tmp_path, starvation_s="30") as o, asyncio.TaskGroup() as group:
            await ready(o, A)
            held = group.create_task(ask(o, A))
            async with asyncio.timeout(WAIT_S):
                await first.held.wait()
            assert (await ask(o, B, timeout=0.5))[-1]["error"]["code"] == "REQUEST_TIMEOUT"
            first.go_on.set()
            assert (await held)[-1] == {"DONE": True}
        assert andes.spawned == [] and len(andes.workers) == 1


async def test_explain_tells_each_candidate_with_numbers_and_does_nothing(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes:
        holds_one(andes, A, B)
        worker = await andes.add_worker(A)
        async with orchestrator(tmp_path) as o:
            await ready(o, A)
            async with o.session.post(f"{o.url}/v1/placements:explain", json={"model": B}) as response:
                explained = await response.json()
            (node,) = explained["nodes"]
            assert (node["name"], node["rank"], node["device"]) == ("andes", None, "cpu")
            assert (node["free_mb"], node["has_model"], explained["needed_mb"]) == (2578, True, 5000)
            assert explained["code"] == node["code"] == "INSUFFICIENT_RAM"
            assert explained["would_evict"] == [
                {"worker_id": worker.worker_id, "node": "andes", "model_ref": A, "memory_mb": 5000,
                 "is_busy": False}
            ]  # fmt: skip
            assert "1 worker on andes would be stopped, which frees 4.9 GiB" in explained["message"]
            body = {"model": B, "labels": {"disk": "fast"}}
            async with o.session.post(f"{o.url}/v1/placements:explain", json=body) as response:
                explained = await response.json()
            assert explained["nodes"][0]["why"] == "lacks the label disk=fast"
            async with o.session.post(f"{o.url}/v1/placements:explain", json={"model": A}) as response:
                explained = await response.json()
            assert explained["worker_id"] == worker.worker_id and explained["workers"][0]["rank"] == 1
            assert andes.spawned == [] and len(andes.workers) == 1


async def test_the_speed_that_a_worker_tells_is_its_nodes_for_that_model_also_when_it_is_gone(
    tmp_path: Path,
) -> None:
    async def speeds(o: RunningOrchestrator, model_ref: str) -> tuple[list[float], float]:
        async with o.session.post(f"{o.url}/v1/placements:explain", json={"model": model_ref}) as response:
            explained = await response.json()
        told = [worker["speed_tokens_per_s"] for worker in explained["workers"]]
        return told, explained["nodes"][0]["speed_tokens_per_s"]

    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker, _ = await andes.add_worker(), await andes.add_worker(A)
        await ready(o, A)
        assert await speeds(o, "demo") == ([0.0], 0.0)
        andes.change(worker, tokens_per_s=2000.0)
        await o.until("/v1/workers", lambda answer: any(w["tokens_per_s"] for w in answer["workers"]))
        assert await speeds(o, "demo") == ([2000.0], 2000.0)
        assert await speeds(o, A) == ([0.0], 0.0)
        andes.change(worker, state=WorkerState.STOPPED)
        await o.until("/v1/workers", lambda answer: len(answer["workers"]) == 1)
        assert await speeds(o, "demo") == ([], 2000.0)


async def would_go(o: RunningOrchestrator, model_ref: str) -> list[dict[str, Any]]:
    """Return the workers that would be stopped for a model."""
    async with o.session.post(f"{o.url}/v1/placements:explain", json={"model": model_ref}) as response:
        found: list[dict[str, Any]] = (await response.json())["would_evict"]
        return found


async def start(o: RunningOrchestrator, model_ref: str, **body: Any) -> tuple[int, dict[str, Any]]:
    """Ask for a worker by name; return the status and the answer."""
    async with o.session.post(f"{o.url}/v1/workers", json={"model_ref": model_ref, **body}) as response:
        return response.status, await response.json()


async def test_a_worker_that_is_asked_for_by_name_has_room_made_by_what_is_idle(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes:
        holds_one(andes, A, B, C)
        andes.memory_of[A] = andes.memory_of[C] = 3500
        andes.has_models(model(A, 3500), model(B, 3500), model(C, 3500))
        old, new = await andes.add_worker(C), await andes.add_worker(A)
        old.record = msgspec.structs.replace(old.record, last_activity_unix=5.0)
        new.record = msgspec.structs.replace(new.record, last_activity_unix=9.0)
        async with orchestrator(tmp_path, starvation_s="2") as o:
            await ready(o, A)
            status, error = await start(o, B, labels={"room": "attic"})
            assert (status, error["error"]["code"]) == (503, "NO_CAPACITY")
            assert error["error"]["message"] == "andes lacks the label room=attic"
            status, record = await start(o, B, slots=2)
            assert (status, record["model_ref"]) == (202, B)
            assert {w.record.model_ref for w in andes.workers.values()} == {A, B}
            assert [(body.model_ref, body.slots) for body in andes.spawned] == [(B, 2)]


async def test_what_a_worker_takes_is_counted_once_as_soon_as_its_machine_counts_it(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes:
        holds_one(andes, A, B)
        andes.memory_of = {A: 3500, B: 3500}
        andes.has_models(model(A, 3500), model(B, 3500))
        andes.spawn.load_gate = asyncio.Event()
        async with orchestrator(tmp_path) as o:
            await o.until("/v1/nodes", lambda answer: answer["nodes"])
            assert (await start(o, A))[0] == 202
            # Its first beat since; the one after it comes a while later.
            await o.until("/v1/nodes", lambda answer: answer["nodes"][0]["ram_free_mb"] == 4078)
            assert (await start(o, B))[0] == 202
            andes.spawn.load_gate.set()
            assert {w.record.model_ref for w in andes.workers.values()} == {A, B}


async def test_no_worker_that_computes_or_is_pinned_goes_for_one_that_is_asked_for_by_name(
    tmp_path: Path,
) -> None:
    async with agent(tmp_path) as andes:
        holds_one(andes, A, B)
        first = await andes.add_worker(A, WorkerScript(tokens=3, hold_after=1))
        async with orchestrator(tmp_path, starvation_s="0.4") as o, asyncio.TaskGroup() as group:
            await ready(o, A)
            held = group.create_task(ask(o, A))
            async with asyncio.timeout(WAIT_S):
                await first.held.wait()
            status, refused = await start(o, B)
            assert (status, refused["error"]["code"]) == (507, "INSUFFICIENT_RAM")
            assert refused["error"]["message"] == "andes has 2.5 GiB free, the model needs 4.9 GiB"
            first.go_on.set()
            assert (await held)[-1] == {"DONE": True}
            andes.has_models(model(A, is_pinned=True), model(B))
            async with asyncio.timeout(WAIT_S):
                while await would_go(o, B):  # noqa: ASYNC110 - Another process.
                    await asyncio.sleep(0.02)
            status, refused = await start(o, B)
            assert (status, refused["error"]["code"]) == (507, "INSUFFICIENT_RAM")
        assert andes.spawned == [] and len(andes.workers) == 1


class HeldClock(SystemClock):
    """Notes each pause, and ends none before it is told to."""

    def __init__(self) -> None:
        self.pauses_s: asyncio.Queue[float] = asyncio.Queue()
        self.go_on = asyncio.Event()

    async def sleep_s(self, seconds: float) -> None:
        self.pauses_s.put_nowait(seconds)
        await self.go_on.wait()


async def test_however_much_changes_those_that_wait_share_so_many_looks_and_then_find_what_came_free() -> (
    None
):
    clock = HeldClock()
    registry = NodeRegistry(clock, Feed())
    room = RoomFinder(registry, clock, Settings())
    cpu = DeviceRecord(id="cpu", backend="cpu", name="CPU", memory_mb=16000, memory_free_mb=100)
    node = NodeRecord(
        name="andes", status=NodeState.READY, version="1", backends=["cpu"], devices=[cpu], ram_mb=16000,
        ram_free_mb=100, disk_free_mb=90000,
    )  # fmt: skip
    registry.views.take(NodeChanged(node=node))
    busy = WorkerRecord(
        worker_id="w-1", node="andes", url="", model_ref=A, backend="cpu", device="cpu",
        state=WorkerState.BUSY, slots_total=1, slots_available=0, pid=1, started_unix=1.0,
        last_activity_unix=1.0, memory_mb=15000,
    )  # fmt: skip
    registry.observe(busy)
    needed = Needed(6000, 6000)
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        first = group.create_task(room.find(Wants(B), lambda _: None, needed=needed))
        assert await clock.pauses_s.get() == 1 / LOOKS_PER_S
        second = group.create_task(room.find(Wants(C), lambda _: None, needed=needed))
        assert await clock.pauses_s.get() == 2 / LOOKS_PER_S
        for number in range(100):
            registry.observe(msgspec.structs.replace(busy, last_activity_unix=2.0 + number))
            await asyncio.sleep(0)
        assert clock.pauses_s.empty(), "nobody looked"
        registry.observe(msgspec.structs.replace(busy, state=WorkerState.STOPPED))
        clock.go_on.set()
        assert (await first).node == (await second).node == "andes"


async def test_who_waits_for_room_takes_none_once_a_worker_of_the_model_is_back() -> None:
    clock = HeldClock()
    registry = NodeRegistry(clock, Feed())
    room = RoomFinder(registry, clock, Settings())
    cpu = DeviceRecord(id="cpu", backend="cpu", name="CPU", memory_mb=16000, memory_free_mb=100)
    node = NodeRecord(
        name="andes", status=NodeState.READY, version="1", backends=["cpu"], devices=[cpu], ram_mb=16000,
        ram_free_mb=100, disk_free_mb=90000,
    )  # fmt: skip
    registry.views.take(NodeChanged(node=node))
    registry.views.models_told("andes", [model(A)])
    other = WorkerRecord(
        worker_id="w-1", node="andes", url="", model_ref=B, backend="cpu", device="cpu",
        state=WorkerState.BUSY, slots_total=1, slots_available=0, pid=1, started_unix=1.0,
        last_activity_unix=1.0, memory_mb=15000,
    )  # fmt: skip
    registry.observe(other)
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        provisioner = ModelProvisioner(registry, room, group, clock)
        job = provisioner.job(Wants(A))
        job.followers.append(Wants(A))
        await clock.pauses_s.get()
        worker = msgspec.structs.replace(
            other, worker_id="w-2", model_ref=A, memory_mb=0, state=WorkerState.IDLE
        )
        registry.observe(worker)
        registry.observe(msgspec.structs.replace(other, state=WorkerState.STOPPED))
        clock.go_on.set()
        await clock.pauses_s.get()
        assert job.may_end, "it looked, and left the memory that came free"
        # A request that was lost there before has one made all the same.
        job.followers.append(Wants(A, excluded=frozenset({"w-2"})))
        while job.error is None:
            await job.changed.wait()
    assert job.error.code is ErrorCode.NODE_NOT_FOUND, "no agent is behind its node"


# --- Waking ----------------------------------------------------------------------------------------


def asleep(registry: NodeRegistry) -> Node:
    cpu = DeviceRecord(id="cpu", backend="cpu", name="CPU", memory_mb=16000, memory_free_mb=100)
    has = Capabilities(
        name="attic", version="1", api_version=1, backends=["cpu"], devices=[cpu], engines={},
        ram_mb=16000, ram_free_mb=100, disk_free_mb=90000, cpu_cores=2, os="linux", arch="x",
    )  # fmt: skip
    node = registry.add(NodeEntry(name="attic", ssh="attic", install_path="p", mac=MAC, capabilities=has))
    registry.unreachable(node, ArrieroError(ErrorCode.NODE_UNREACHABLE, "silent for 3 s"))
    return node


async def test_a_machine_that_sleeps_is_woken_by_its_packet_and_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ear:
        ear.bind(("127.0.0.1", 0))
        ear.setblocking(False)
        registry = NodeRegistry(SystemClock(), Feed())
        settings = Settings(wake_address=f"127.0.0.1:{ear.getsockname()[1]}", wake_timeout_s=10)
        room = RoomFinder(registry, SystemClock(), settings)
        node = asleep(registry)
        foreseen = room.foresee(Wants(A))
        assert foreseen.choice.code is ErrorCode.NODE_UNREACHABLE
        assert isinstance(foreseen.decision, Wake) and foreseen.decision.node.name == "attic"
        steps: list[TaskPlacing] = []
        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
            finding = group.create_task(room.find(Wants(A), steps.append))
            packet = await asyncio.get_running_loop().sock_recv(ear, 1024)
            assert packet == magic_packet(MAC) == b"\xff" * 6 + bytes.fromhex("525400123456") * 16
            assert not finding.done()
            beat = AgentBeat(ram_free_mb=15000, disk_free_mb=90000, unix=1.0)
            registry.heard(node, beat)
            found = await finding
        assert isinstance(found, Found) and found.node == "attic"
        assert "wakes it (52:54:00:12:34:56)" in steps[0].message
        assert steps[-1].message.startswith("is awake after")


async def test_a_machine_that_does_not_wake_is_given_up_and_named(tmp_path: Path) -> None:
    registry = NodeRegistry(SystemClock(), Feed())
    settings = Settings(wake_address="127.0.0.1:9", wake_timeout_s=0.2)
    room = RoomFinder(registry, SystemClock(), settings)
    asleep(registry)
    with pytest.raises(ArrieroError) as refused:
        await room.find(Wants(A), lambda _: None)
    assert refused.value.code is ErrorCode.NODE_UNREACHABLE
    assert refused.value.message == "attic did not wake within 0.2 s"
    with pytest.raises(ArrieroError) as wrong:
        magic_packet("52:54:00:12:34")
    assert wrong.value.code is ErrorCode.INVALID_REQUEST
    with pytest.raises(ArrieroError) as wrong:
        RoomFinder(registry, SystemClock(), Settings(wake_address="nowhere"))
    assert wrong.value.code is ErrorCode.INVALID_SETTINGS
