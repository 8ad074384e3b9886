"""How does a machine of the pool look: as one row of many, and by itself?"""

from collections.abc import Iterator, Sequence
from typing import Final

from arriero.cli import render
from arriero.contracts.records import DeviceRecord, NodeRecord, WorkerRecord
from arriero.contracts.states import WorkerState

COLUMNS: Final = (
    "node", "status", "workers", "models", "memory free", "devices", "disk free", "round trip", "last seen",
    "version", "reached by",
)  # fmt: skip


def listed(
    records: Sequence[NodeRecord], workers: Sequence[WorkerRecord], *, now_unix: float
) -> list[list[str]]:
    """Return a row for each machine, in the order of `COLUMNS`."""
    return [
        [
            record.name,
            str(record.status),
            _counted([worker for worker in workers if worker.node == record.name]),
            str(record.models or ""),
            _room(record.ram_free_mb, record.ram_mb),
            _accelerators(record.devices) or "cpu",
            render.mib_text(record.disk_free_mb),
            _round_trip(record),
            _ago(record, now_unix),
            record.version,
            record.ssh or "this machine",
        ]
        for record in records
    ]


def shown(
    record: NodeRecord, workers: Sequence[WorkerRecord], *, now_unix: float
) -> Iterator[tuple[str, str]]:
    """Yield all that is known of a machine: names and texts, of which some are empty."""
    yield "node", record.name
    yield "status", f"{record.status}" + (" (drained)" if record.is_drained else "")
    if record.error is not None:
        yield "why", f"{record.error.code}: {record.error.message}"
        yield "what to do", str(record.error.details.get("suggested_action", ""))
    moment = render.moment_text(record.last_connected_unix)
    yield "last seen", f"{moment} ({_ago(record, now_unix)})" if moment else "never"
    yield "version", record.version
    yield "reached by", f"ssh {record.ssh}" if record.is_remote else "this machine"
    yield "key", record.key_path
    yield "host key", record.host_key
    yield "install path", record.install_path
    yield "round trip", _round_trip(record)
    yield "lease", str(record.lease or "")
    yield "labels", " ".join(f"{key}={value}" for key, value in sorted(record.labels.items()))
    yield "wakes by", record.mac
    yield "system", f"{record.os} {record.arch}".strip()
    yield "processor", f"{record.cpu_cores} cores" if record.cpu_cores else ""
    yield "memory", f"{_room(record.ram_free_mb, record.ram_mb)} free"
    yield "disk", f"{render.mib_text(record.disk_free_mb)} free"
    for device in record.devices:
        driver = f", driver {device.driver}" if device.driver else ""
        room = f", {_room(device.memory_free_mb, device.memory_mb)} free" if device.backend != "cpu" else ""
        yield "device", f"{device.id}: {device.name}{room}{driver}"
    for name, version in sorted(record.engines.items()):
        yield "engine", f"{name} {version}"
    yield "backends", ", ".join(record.backends)
    yield "models", str(record.models or "none yet")
    for worker in workers:
        if worker.node == record.name:
            free = f"{worker.slots_available} of {worker.slots_total} slots free"
            yield (
                "worker",
                f"{worker.worker_id}: {worker.model_ref} on {worker.device}, {worker.state}, {free}",
            )
    for advice in record.advice:
        yield "advice", advice


def _counted(workers: Sequence[WorkerRecord]) -> str:
    busy = sum(worker.state is WorkerState.BUSY for worker in workers)
    return f"{len(workers)}, {busy} busy" if busy else str(len(workers) or "")


def _accelerators(devices: Sequence[DeviceRecord]) -> str:
    """Return each device with its own free memory; a processor has the machine's."""
    return ", ".join(
        f"{each.id} {_room(each.memory_free_mb, each.memory_mb)}" for each in devices if each.backend != "cpu"
    )


def _room(free_mb: int, all_mb: int) -> str:
    free, whole = render.mib_text(free_mb), render.mib_text(all_mb)
    # The unit once, where it is the same.
    number, _, unit = free.partition(" ")
    return f"{number if whole.endswith(unit) else free} of {whole}"


def _round_trip(record: NodeRecord) -> str:
    return f"{record.latency_ms:.1f} ms" if record.latency_ms else ""


def _ago(record: NodeRecord, now_unix: float) -> str:
    if not record.last_connected_unix:
        return ""
    return f"{render.seconds_text(now_unix - record.last_connected_unix)} ago"
