"""Which worker takes a request, and which node takes a new worker?

Pure arithmetic with reasons: feasible, ranked, chosen.  Ties break by id, so the answer does not
depend on the order of the input, and every refusal says why.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from arriero.contracts.errors import ErrorCode
from arriero.contracts.records import DeviceRecord
from arriero.contracts.states import NodeState, WorkerState
from arriero.domain.worker_states import READY

MIB_PER_GIB: Final = 1024
_WAITED_FOR: Final = frozenset({WorkerState.STARTING, WorkerState.LOADING})
_CPU: Final = "cpu"


@dataclass(frozen=True, slots=True)
class Wants:
    """What a request asks for; None: anything."""

    model_ref: str
    node: str | None = None
    backend: str | None = None
    device: str | None = None
    #: Workers that this request was lost on already.
    excluded: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one candidate was not taken.  `code` is what the person would be told if it were the only one."""

    candidate: str
    code: ErrorCode
    why: str


# --- Workers ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as a choice sees it."""

    worker_id: str
    node: str
    model_ref: str
    backend: str
    device: str
    state: WorkerState
    slots_free: int
    queued: int
    node_state: NodeState = NodeState.READY
    load_fraction: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerChoice:
    """The worker that takes the request; None: a new one is needed."""

    worker_id: str | None
    #: Whether it takes requests now; a worker that loads is waited for.
    is_ready: bool
    #: One sentence, for people.
    message: str
    refused: tuple[Refusal, ...] = field(default=())


def choose_worker(workers: Iterable[WorkerView], wants: Wants) -> WorkerChoice:
    """Choose among the workers that have the model: ready first, most free slots, shortest queue."""
    refused: list[Refusal] = []
    feasible: list[WorkerView] = []
    for worker in sorted(workers, key=lambda w: w.worker_id):
        refusal = _worker_refusal(worker, wants)
        if refusal is None:
            feasible.append(worker)
        elif worker.model_ref == wants.model_ref:
            refused.append(Refusal(worker.worker_id, *refusal))
    best = min(feasible, key=_worker_rank, default=None)
    if best is None:
        why = "; ".join(f"{r.candidate} {r.why}" for r in refused)
        message = f"no worker has {wants.model_ref}" + (f" ({why})" if why else "")
        return WorkerChoice(None, False, message, tuple(refused))
    return WorkerChoice(best.worker_id, best.state in READY, _worker_message(best), tuple(refused))


def _worker_rank(worker: WorkerView) -> tuple[object, ...]:
    return (
        worker.state not in READY,
        -max(worker.slots_free, 0),
        worker.queued,
        -worker.load_fraction,
        worker.worker_id,
    )


def _worker_message(worker: WorkerView) -> str:
    name = f"{worker.worker_id} on {worker.node}"
    if worker.state not in READY:
        return f"{name} is {worker.state}: waiting for it"
    if worker.slots_free > 0:
        return f"{name} has {_count(worker.slots_free, 'free slot')}: chosen"
    return f"{name} is busy, {_count(worker.queued, 'request')} wait before this one: chosen"


def _worker_refusal(worker: WorkerView, wants: Wants) -> tuple[ErrorCode, str] | None:
    if worker.model_ref != wants.model_ref:
        return ErrorCode.NO_WORKERS, f"has {worker.model_ref}"
    if worker.worker_id in wants.excluded:
        return ErrorCode.WORKER_LOST, "lost this request before"
    if wants.node is not None and worker.node != wants.node:
        return ErrorCode.NO_WORKERS, f"is on {worker.node}, {wants.node} was asked for"
    if wants.backend is not None and worker.backend != wants.backend:
        return ErrorCode.NO_WORKERS, f"runs on {worker.backend}, {wants.backend} was asked for"
    if wants.device is not None and worker.device != wants.device:
        return ErrorCode.NO_WORKERS, f"runs on {worker.device}, {wants.device} was asked for"
    if worker.state not in READY | _WAITED_FOR:
        return ErrorCode.NO_READY_WORKERS, f"is {worker.state}"
    if worker.node_state is not NodeState.READY:
        return ErrorCode.NODE_UNREACHABLE, f"is on {worker.node}, which is {worker.node_state}"
    return None


# --- Nodes -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node as a choice sees it."""

    name: str
    state: NodeState
    backends: tuple[str, ...]
    devices: tuple[DeviceRecord, ...]
    ram_free_mb: int
    #: Whether its catalog holds the model.
    has_model: bool = False


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """The node that takes a new worker; None with the code that says best why there is none."""

    node: str | None
    code: ErrorCode | None
    #: One sentence, for people.
    message: str
    refused: tuple[Refusal, ...] = field(default=())


def choose_node(nodes: Iterable[NodeView], wants: Wants, needed_mb: int | None) -> NodeChoice:
    """Choose a node for a new worker: one that has the model first, then most free memory.

    `needed_mb` is the size of the model's weights, None where it is not known yet: the agent
    reckons exactly before it starts anything.  `wants.excluded` names nodes that refused already.
    """
    known = sorted(nodes, key=lambda n: n.name)
    if wants.node is not None:
        known = [node for node in known if node.name == wants.node]
        if not known:
            return NodeChoice(None, ErrorCode.NODE_NOT_FOUND, f"no node is called {wants.node!r}")
    if not known:
        return NodeChoice(None, ErrorCode.NODE_UNREACHABLE, "the pool has no node yet: is an agent running?")
    refused: list[Refusal] = []
    feasible: list[NodeView] = []
    for node in known:
        refusal = _node_refusal(node, wants, needed_mb)
        if refusal is None:
            feasible.append(node)
        else:
            refused.append(Refusal(node.name, *refusal))
    best = min(feasible, key=lambda n: (not n.has_model, -_free_mb(n, wants), n.name), default=None)
    if best is None:
        codes = {refusal.code for refusal in refused}
        code = codes.pop() if len(codes) == 1 else ErrorCode.NO_CAPACITY
        message = "; ".join(f"{r.candidate} {r.why}" for r in refused)
        return NodeChoice(None, code, message, tuple(refused))
    return NodeChoice(best.name, None, _node_message(best, wants, needed_mb), tuple(refused))


def _node_message(node: NodeView, wants: Wants, needed_mb: int | None) -> str:
    free = f"{node.name} has {gib(_free_mb(node, wants))} GiB free"
    if needed_mb is None:
        return f"{free}: chosen"
    return f"{free}, the model has {gib(needed_mb)} GiB: chosen"


def _node_refusal(node: NodeView, wants: Wants, needed_mb: int | None) -> tuple[ErrorCode, str] | None:
    if node.state is not NodeState.READY:
        return ErrorCode.NODE_UNREACHABLE, f"is {node.state}"
    if node.name in wants.excluded:
        return ErrorCode.NO_CAPACITY, "refused it already"
    if wants.backend is not None and wants.backend not in node.backends:
        has = ", ".join(node.backends) or "none"
        return ErrorCode.BACKEND_UNAVAILABLE, f"has the backends {has}, {wants.backend} was asked for"
    if wants.device is not None and wants.device not in {device.id for device in node.devices}:
        has = ", ".join(device.id for device in node.devices) or "none"
        return ErrorCode.DEVICE_NOT_FOUND, f"has the devices {has}, {wants.device} was asked for"
    free_mb = _free_mb(node, wants)
    if needed_mb is not None and needed_mb > free_mb:
        is_host = _uses_host_memory(node, wants)
        code = ErrorCode.INSUFFICIENT_RAM if is_host else ErrorCode.INSUFFICIENT_VRAM
        return code, f"has {gib(free_mb)} GiB free, the model has {gib(needed_mb)} GiB"
    return None


def _candidates(node: NodeView, wants: Wants) -> list[DeviceRecord]:
    return [
        device
        for device in node.devices
        if (wants.device is None or device.id == wants.device)
        and (wants.backend is None or device.backend == wants.backend)
    ]


def _uses_host_memory(node: NodeView, wants: Wants) -> bool:
    return all(device.backend == _CPU for device in _candidates(node, wants))


def _free_mb(node: NodeView, wants: Wants) -> int:
    """Return the most memory that one device in question has free; the machine's own for the CPU."""
    free = [
        device.memory_free_mb if device.backend != _CPU else node.ram_free_mb
        for device in _candidates(node, wants)
    ]
    return max(free, default=node.ram_free_mb)


def gib(mib: int) -> str:
    """Return mebibytes as gibibytes with a digit that tells something."""
    value = mib / MIB_PER_GIB
    return f"{value:.1f}" if value >= 0.1 or mib == 0 else f"{value:.3f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
