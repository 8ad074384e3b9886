"""What is foretold of a request, for pools in which something is the matter with each machine."""

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_placement_nodes import MODEL, card, cpu

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import NodeChanged
from arriero.contracts.placements import PlacementExplained
from arriero.contracts.records import NodeRecord, WorkerRecord
from arriero.contracts.requests import SpawnBody
from arriero.contracts.states import NodeState, WorkerState
from arriero.domain.placement import Wants
from arriero.domain.placement_memory import Needed
from arriero.orchestrator.explaining import explain
from arriero.orchestrator.feed import Feed
from arriero.orchestrator.nodes import NodeRegistry
from arriero.orchestrator.provisioning import Job, ModelProvisioner
from arriero.orchestrator.room import RoomFinder
from arriero.runtime.clock import SystemClock
from arriero.runtime.settings import Settings

#: Takes 8468 MiB with its whole context, 4628 at least.
REF = MODEL.model_ref
MAC = "52:54:00:12:34:56"


def node(name: str, free_mb: int = 9000, **changes: Any) -> NodeRecord:
    record = NodeRecord(
        name=name, status=NodeState.READY, version="1", backends=["cpu"], devices=[cpu(free_mb)],
        ram_mb=16000, ram_free_mb=free_mb, disk_free_mb=90_000,
    )  # fmt: skip
    return msgspec.structs.replace(record, **changes)


def away(name: str, code: ErrorCode, why: str, **changes: Any) -> NodeRecord:
    return node(name, status=NodeState.UNREACHABLE, error=ArrieroError(code, why).body(), **changes)


class Pool:
    """The parts of an orchestrator that choose, fed as agents would."""

    def __init__(self, *nodes: NodeRecord, holders: tuple[str, ...] = ("andes",), **settings: Any) -> None:
        self.registry = NodeRegistry(SystemClock(), Feed())
        self.views = self.registry.views
        self.room = RoomFinder(self.registry, SystemClock(), Settings(**settings))
        self._number = 0
        for record in nodes:
            self.views.take(NodeChanged(node=record))
            self.views.models_told(record.name, [MODEL] if record.name in holders else [])

    def worker(self, node: str, state: WorkerState, memory_mb: int, **changes: Any) -> str:
        """Have a worker of another model, or of what `changes` say."""
        self._number += 1
        record = WorkerRecord(
            worker_id=f"w-{self._number:012x}", node=node, url="http://127.0.0.1:1", model_ref="hf:o/other",
            backend="cpu", device="cpu", state=state, slots_total=4,
            slots_available=0 if state is WorkerState.BUSY else 4, pid=1, started_unix=1.0,
            last_activity_unix=float(self._number), memory_mb=memory_mb,
        )  # fmt: skip
        self.registry.observe(msgspec.structs.replace(record, **changes))
        return record.worker_id

    def explain(self, model_ref: str = REF, running: Job | None = None, **wants: Any) -> PlacementExplained:
        return explain(self.views, self.room, Wants(model_ref, **wants), running)


def whys(explained: PlacementExplained) -> dict[str, tuple[str | None, str]]:
    return {each.name: (each.code, each.why) for each in explained.nodes}


#: Something is the matter with each, in a way of its own.
TROUBLED = (
    node("andes", 3000),
    node("bolivia", is_drained=True, status=NodeState.DRAINING),
    away("cusco", ErrorCode.NODE_UNREACHABLE, "silent for 3 s"),
    away("lima", ErrorCode.VERSION_MISMATCH, "it is arriero 0.1, this is 0.2", mac=MAC),
    node("oruro", devices=[cpu(9000), card()]),
    node("potosi", backends=["cuda", "cpu"], devices=[cpu(9000), card(free_mb=4000)]),
    node("quito", disk_free_mb=1000),
    node("sucre", status=NodeState.JOINING),
)


def test_each_machine_is_named_with_its_own_reason_and_numbers() -> None:
    explained = Pool(*TROUBLED).explain()
    assert whys(explained) == {
        "andes": ("INSUFFICIENT_RAM", "has 2.9 GiB free, the model needs 8.3 GiB"),
        "bolivia": ("NODE_DRAINING", "takes no new work: it is drained"),
        "cusco": ("NODE_UNREACHABLE", "is unreachable: silent for 3 s"),
        "lima": ("VERSION_MISMATCH", "is unreachable: it is arriero 0.1, this is 0.2"),
        "oruro": (
            "BACKEND_UNAVAILABLE",
            "has RTX, and its engine computes with cpu alone: install the one for cuda "
            "(`arriero engines install --node oruro`), or ask for --backend cpu",
        ),
        "potosi": ("INSUFFICIENT_VRAM", "has 3.9 GiB free on cuda:0, the model needs 8.3 GiB"),
        "quito": (
            "INSUFFICIENT_DISK", "has 1.0 GiB of disk free, fetching it takes 4.0 GiB",
        ),
        "sucre": ("NODE_UNREACHABLE", "is joining"),
    }  # fmt: skip
    assert (explained.node, explained.code) == (None, "NO_CAPACITY")
    assert (explained.needed_mb, explained.needed_least_mb) == (8468, 4628)
    for each in explained.nodes:
        assert f"{each.name} {each.why}" in explained.message
    assert explained.would_wake is None, "lima answers: it does not sleep"


def test_wishes_that_nobody_fulfils_are_told_of_everybody() -> None:
    pool = Pool(node("andes"), node("cusco", labels={"room": "cellar"}))
    assert set(whys(pool.explain(labels=(("room", "attic"),))).values()) == {
        ("NO_CAPACITY", "lacks the label room=attic")
    }
    explained = pool.explain(backend="metal")
    assert explained.code == "BACKEND_UNAVAILABLE"
    assert whys(explained)["cusco"][1] == "has the backends cpu, metal was asked for"
    explained = pool.explain(node="lima")
    assert (explained.code, explained.node) == ("NODE_NOT_FOUND", None)
    assert "no node is called 'lima'" in explained.message
    assert set(whys(explained)) == {"andes", "cusco"}
    explained = pool.explain("hf:no/body", node="cusco")
    assert (explained.node, explained.needed_mb) == ("cusco", None), "what nobody has is fetched"


def test_of_equals_the_name_decides_and_what_loads_has_its_memory_already() -> None:
    pool = Pool(node("cusco"), node("andes"), holders=("andes", "cusco"))
    assert [(each.name, each.rank) for each in pool.explain().nodes] == [("andes", 1), ("cusco", 2)]
    pool.views.reserve("andes", "cpu", 2000)
    explained = pool.explain()
    (cusco, andes) = explained.nodes
    assert (cusco.rank, andes.rank, andes.free_mb, andes.promised_mb) == (1, None, 7000, 2000)
    assert andes.why == "has 6.8 GiB free (2.0 promised), the model needs 8.3 GiB"
    pool.views.reserve("andes", "cpu", 9000)
    assert pool.explain().nodes[1].free_mb == 0


def test_a_worker_without_a_free_slot_is_told_as_it_is() -> None:
    pool = Pool(node("andes"))
    worker_id = pool.worker("andes", WorkerState.BUSY, 5000, model_ref=REF, queued=3)
    explained = pool.explain()
    (worker,) = explained.workers
    assert (explained.worker_id, worker.rank, worker.slots_free, worker.queued) == (worker_id, 1, 0, 3)
    assert explained.message == f"{worker_id} on andes is busy, 3 requests wait before this one: chosen"


# --- What would be done, as it is done ------------------------------------------------------------


def test_idle_workers_go_before_a_model_gets_less_context() -> None:
    pool = Pool(node("andes", 5000))
    assert pool.explain().node == "andes"
    assert pool.explain().message.endswith("chosen, with less context than the model could have")
    assert [each.rank for each in pool.explain().nodes] == [1]
    idle = pool.worker("andes", WorkerState.IDLE, 4000)
    explained = pool.explain()
    assert (explained.node, [each.worker_id for each in explained.would_evict]) == (None, [idle])


def test_a_worker_that_computes_is_waited_for_and_one_that_loads_too() -> None:
    pool = Pool(node("andes", 4000))
    busy = pool.worker("andes", WorkerState.BUSY, 5000)
    explained = pool.explain()
    assert [(each.worker_id, each.is_busy) for each in explained.would_evict] == [(busy, True)]
    assert "once nothing computes there, 1 worker on andes would be stopped" in explained.message
    pool = Pool(node("andes", 4000))
    pool.worker("andes", WorkerState.LOADING, 5000)
    explained = pool.explain()
    assert (explained.would_evict, explained.would_wait_for) == ([], "andes")
    assert "workers on andes that load or end would be waited for" in explained.message


def test_a_machine_that_sleeps_is_woken_where_that_is_sooner_than_what_is_waited_for() -> None:
    asleep = away("attic", ErrorCode.NODE_UNREACHABLE, "silent for 3 s", mac=MAC)
    pool = Pool(node("andes", 4000), asleep)
    explained = pool.explain()
    assert (explained.would_wake, explained.wake_cost_s) == ("attic", 60.0)
    pool.worker("andes", WorkerState.BUSY, 5000)
    assert pool.explain().would_wake is None, "its turn comes after 30 s"
    pool = Pool(node("andes", 4000), asleep, starvation_s=100.0)
    pool.worker("andes", WorkerState.BUSY, 5000)
    assert pool.explain().would_wake == "attic"


def test_a_machine_that_sleeps_is_woken_for_less_context_where_it_holds_no_more() -> None:
    small = msgspec.structs.replace(cpu(100), memory_mb=6000)
    asleep = away(
        "attic", ErrorCode.NODE_UNREACHABLE, "silent for 3 s", mac=MAC, ram_mb=6000, devices=[small]
    )
    explained = Pool(node("andes", 4000), asleep).explain()
    assert (explained.needed_mb, explained.needed_least_mb, explained.would_wake) == (8468, 4628, "attic")


async def test_a_machine_that_sleeps_is_woken_where_the_line_is_longer_than_that_takes() -> None:
    pool = Pool(node("andes", 4000), away("attic", ErrorCode.NODE_UNREACHABLE, "silent for 3 s", mac=MAC))
    pool.worker("andes", WorkerState.BUSY, 5000)
    woken: list[str | None] = []
    said: list[str] = []
    async with asyncio.TaskGroup() as group:
        waiting = []
        for number in range(2):
            finding = pool.room.find(
                Wants(f"hf:o/{number}"), lambda step: said.append(step.message), needed=Needed(8000, 8000)
            )
            waiting.append(group.create_task(finding))
            await asyncio.sleep(0)
            woken.append(pool.explain().would_wake)
        for task in waiting:
            task.cancel()
    assert woken == [None, "attic"], "the second one's turn comes after 60 s, the third one's after 90"
    assert [text.split(": ")[1] for text in said] == [
        "waits while hf:o/other has requests there, 30 s at most",
        "waits for who came earlier",
    ]


async def test_a_worker_that_is_being_made_is_joined_by_who_asks_in_the_same_way() -> None:
    pool = Pool(node("andes", 4000), starvation_s=30.0)
    pool.worker("andes", WorkerState.BUSY, 5000)
    async with asyncio.TaskGroup() as group:
        provisioner = ModelProvisioner(pool.registry, pool.room, group, SystemClock())
        assert provisioner.running(Wants(REF)) is None
        job = provisioner.job(Wants(REF))
        job.followers.append(Wants(REF))
        begun = pool.explain(running=provisioner.running(Wants(REF)))
        assert begun.message.endswith("joins the worker being made: its place is being looked for")
        await asyncio.sleep(0)
        explained = pool.explain(running=provisioner.running(Wants(REF, excluded=frozenset({"w-1"}))))
        elsewhere = provisioner.running(Wants(REF, node="andes"))
        taken = pool.worker("andes", WorkerState.LOADING, 0, model_ref=REF)
        chosen = pool.explain(running=job)
        assert job.task is not None
        job.task.cancel()
    assert elsewhere is None and (explained.node, explained.code) == ("andes", None)
    assert explained.would_join is not None and not explained.would_evict and not explained.refused_nodes
    waits = f"andes has 3.9 GiB free, {REF} needs 8.3 GiB: waits while hf:o/other has requests there, 30 s at most"
    assert explained.would_join.message == waits
    assert explained.message == f"no worker has {REF}; joins the worker being made on andes: {waits}"
    assert (chosen.worker_id, chosen.would_join) == (taken, None)


@given(
    names=st.sets(st.sampled_from([record.name for record in TROUBLED])),
    is_sound=st.booleans(),
    wants=st.fixed_dictionaries(
        {},
        optional={
            "node": st.sampled_from(["andes", "lima", "tarija"]),
            "backend": st.sampled_from(["cpu", "cuda", "metal"]),
            "device": st.sampled_from(["cpu", "cuda:0", "cuda:7"]),
            "labels": st.just((("room", "attic"),)),
        },
    ),
    model_ref=st.sampled_from([REF, "hf:no/body", "demo"]),
)
def test_every_machine_has_a_rank_or_a_reason(
    names: set[str], is_sound: bool, wants: dict[str, Any], model_ref: str
) -> None:
    sound = [node("tarija", labels={"room": "attic"})] if is_sound else []
    nodes = [*sound, *(record for record in TROUBLED if record.name in names)]
    explained = Pool(*nodes).explain(model_ref, **wants)
    assert sorted(each.name for each in explained.nodes) == sorted(record.name for record in nodes)
    ranks = [each.rank for each in explained.nodes if each.rank is not None]
    assert ranks == list(range(1, len(ranks) + 1))
    for each in explained.nodes:
        assert (each.rank is None) == bool(each.why) == (each.code is not None)
    assert explained.node == (explained.nodes[0].name if ranks else None)
    assert explained.message and (explained.code is None) == (explained.node is not None)


async def test_nothing_is_stopped_for_a_worker_that_its_machine_could_not_start() -> None:
    pool = Pool(node("andes", 4000), node("cusco", 3000), holders=("cusco",), starvation_s=0.1)
    pool.worker("andes", WorkerState.IDLE, 5000)
    async with asyncio.TaskGroup() as group:
        provisioner = ModelProvisioner(pool.registry, pool.room, group, SystemClock())
        with pytest.raises(ArrieroError) as refused:
            await provisioner.spawn(SpawnBody(model_ref=REF), "andes")
    assert (refused.value.code, refused.value.message) == (
        ErrorCode.MODEL_NOT_FOUND, f"andes does not have {REF}",
    )  # fmt: skip
    assert pool.views.node("andes") is not None and pool.explain().nodes[0].promised_mb == 0
