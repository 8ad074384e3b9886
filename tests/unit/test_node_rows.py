"""Is a machine of the pool told whole, and short, to whoever looks?"""

import msgspec

from arriero.cli import node_rows
from arriero.contracts.errors import ErrorBody
from arriero.contracts.records import DeviceRecord, NodeRecord, WorkerRecord
from arriero.contracts.states import NodeState, WorkerState

CPU = DeviceRecord(id="cpu", backend="cpu", name="A processor", memory_mb=65_536, memory_free_mb=32_768)
CARD = DeviceRecord(
    id="cuda:0", backend="cuda", name="A card", memory_mb=24_576, memory_free_mb=6_144, driver="595.1"
)
NODE = NodeRecord(
    name="attic",
    status=NodeState.READY,
    version="0.1.0",
    backends=["cpu", "cuda"],
    devices=[CPU, CARD],
    ram_mb=65_536,
    ram_free_mb=32_768,
    disk_free_mb=102_400,
    labels={"room": "attic"},
    last_connected_unix=1_000_000.0,
    is_remote=True,
    ssh="ana@attic:2222",
    key_path="/home/ana/.ssh/attic",
    host_key="SHA256:abc",
    install_path=".local/share/arriero",
    mac="00:1a:2b:3c:4d:5e",
    engines={"llamacpp": "1"},
    os="linux",
    arch="x86_64",
    cpu_cores=8,
    lease=7,
    latency_ms=1.25,
    models=3,
)


def worker(node: str, state: WorkerState) -> WorkerRecord:
    return WorkerRecord(
        worker_id=f"w-{state}", node=node, url="", model_ref="demo", backend="cpu", device="cpu", state=state,
        slots_total=4, slots_available=3, pid=1, started_unix=0.0, last_activity_unix=0.0,
    )  # fmt: skip


WORKERS = [
    worker("attic", WorkerState.BUSY),
    worker("attic", WorkerState.IDLE),
    worker("else", WorkerState.IDLE),
]


def test_a_row_has_what_people_look_for() -> None:
    (row,) = node_rows.listed([NODE], WORKERS, now_unix=1_000_003.0)
    assert dict(zip(node_rows.COLUMNS, row, strict=True)) == {
        "node": "attic",
        "status": "ready",
        "workers": "2, 1 busy",
        "models": "3",
        "memory free": "32.0 of 64.0 GiB",
        "devices": "cuda:0 6.0 of 24.0 GiB",
        "disk free": "100.0 GiB",
        "round trip": "1.2 ms",
        "last seen": "3.0 s ago",
        "version": "0.1.0",
        "reached by": "ana@attic:2222",
    }


def test_all_that_is_kept_of_a_machine_is_shown() -> None:
    told = [f"{name}: {text}" for name, text in node_rows.shown(NODE, WORKERS, now_unix=1_000_003.0)]
    for line in (
        "reached by: ssh ana@attic:2222",
        "key: /home/ana/.ssh/attic",
        "host key: SHA256:abc",
        "install path: .local/share/arriero",
        "labels: room=attic",
        "wakes by: 00:1a:2b:3c:4d:5e",
        "memory: 32.0 of 64.0 GiB free",
        "device: cuda:0: A card, 6.0 of 24.0 GiB free, driver 595.1",
        "backends: cpu, cuda",
        "version: 0.1.0",
        "lease: 7",
        "worker: w-busy: demo on cpu, busy, 3 of 4 slots free",
    ):
        assert line in told, line
    assert not [line for line in told if "else" in line]


def test_one_that_does_not_answer_says_why_and_what_to_do() -> None:
    body = ErrorBody("NODE_UNREACHABLE", "no route", {"suggested_action": "plug it in"})
    gone = msgspec.structs.replace(NODE, status=NodeState.UNREACHABLE, error=body, is_drained=True)
    told = dict(node_rows.shown(gone, [], now_unix=1_000_003.0))
    assert told["status"] == "unreachable (drained)"
    assert (told["why"], told["what to do"]) == ("NODE_UNREACHABLE: no route", "plug it in")
