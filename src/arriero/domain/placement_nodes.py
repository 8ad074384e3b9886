"""Which node takes a new worker?

Feasible, ranked, chosen: pure arithmetic with reasons.  Only where nothing was found, or somebody
asks (`candidates`), the reasons are put into words.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NoReturn, TypeAlias

from arriero.contracts.errors import ErrorCode, fail
from arriero.contracts.records import DeviceRecord
from arriero.contracts.states import NodeState
from arriero.domain.engine_builds import install_command
from arriero.domain.placement_wants import ModelFacts, Refusal, Wants, gib, missing_labels
from arriero.domain.placement_workers import speed_class
from arriero.domain.preflight import PREFERENCE

_CPU: Final = "cpu"
_SIZE_STEPS: Final = 2
NO_FACTS: Final = ModelFacts()

Rank: TypeAlias = tuple[int, bool, int, int, int, str]
Refused: TypeAlias = tuple[ErrorCode, str]


@dataclass(frozen=True, slots=True)
class Room:
    """What one device of a node could give to a worker, in MiB."""

    device: str
    backend: str
    #: Free now, without what is promised to others.
    free_mb: int
    promised_mb: int
    total_mb: int
    #: `free_mb` as a step of half a doubling: nodes of the same step are equally full.
    size_class: int

    @property
    def is_host(self) -> bool:
        """Whether it is the machine's own memory."""
        return self.backend == _CPU


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node as a choice sees it.  What a choice needs of it is reckoned once, when it is made."""

    name: str
    state: NodeState
    backends: tuple[str, ...]
    devices: tuple[DeviceRecord, ...]
    ram_free_mb: int
    ram_mb: int = 0
    #: None: not known, and not counted.
    disk_free_mb: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    #: Memory by device that is not free any more though nobody uses it yet; "cpu" is the host's.
    promised_mb: Mapping[str, int] = field(default_factory=dict)
    #: Whether a person asked that it takes no new work.
    is_drained: bool = False
    #: Why it does not answer, where that is known.
    error_code: ErrorCode | None = None
    error: str = ""
    #: Hardware address that wakes it, empty if it cannot be woken.
    mac: str = ""
    #: Seconds that waking it is reckoned to cost.
    wake_cost_s: float = 60.0
    #: Rooms by what is asked for: a device's id, a backend's name, None where nothing is.
    _rooms: dict[str | None, Room] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rooms = self._rooms
        for device in self.devices:
            if device.backend not in self.backends:
                continue
            room = _room(self, device)
            rooms[device.id] = room
            best = rooms.get(device.backend)
            # A device of the same name as its backend ("cpu") is its only one.
            if best is None or (-room.free_mb, room.device) < (-best.free_mb, best.device):
                rooms[device.backend] = room
        backend = default_backend(self.backends, self.devices)
        if backend is not None and backend in rooms:
            rooms[None] = rooms[backend]

    def room(self, wants: Wants) -> Room | None:
        """Return the emptiest device that may be used; None if there is none (see `_no_room`)."""
        found = self._rooms.get(wants.device or wants.backend)
        if found is None or (wants.backend is not None and found.backend != wants.backend):
            return None
        return found

    def asked(self) -> Iterable[tuple[str | None, Room]]:
        """Return what may be asked for, each with the room that it means."""
        return self._rooms.items()

    def rooms(self, wants: Wants) -> list[Room]:
        """Return all devices that may be used."""
        best = self.room(wants)
        if best is None or wants.device is not None:
            return [] if best is None else [best]
        found = {room.device: room for room in self._rooms.values() if room.backend == best.backend}
        return list(found.values())


def default_backend(backends: tuple[str, ...], devices: tuple[DeviceRecord, ...]) -> str | None:
    """Return the backend to use where none is asked for, as the agent's preflight chooses it.

    None where that would be the CPU only because no engine was built for the accelerator that is
    there: the person has to ask for the CPU.
    """
    backend = next((name for name in PREFERENCE if name in backends), None)
    if backend == _CPU and any(device.backend not in backends for device in devices):
        return None
    return backend


def _room(node: NodeView, device: DeviceRecord) -> Room:
    is_host = device.backend == _CPU
    free_mb = node.ram_free_mb if is_host else device.memory_free_mb
    total_mb = (node.ram_mb or device.memory_mb) if is_host else device.memory_mb
    promised_mb = node.promised_mb.get(device.id, 0)
    left_mb = free_mb - promised_mb
    return Room(device.id, device.backend, left_mb, promised_mb, total_mb, size_class(left_mb))


def size_class(memory_mb: int) -> int:
    """Return memory as a step of half a doubling."""
    return round(_SIZE_STEPS * math.log2(memory_mb)) if memory_mb > 0 else 0


@dataclass(frozen=True, slots=True)
class NodeChoice:
    """The node that takes a new worker; None with the code that says best why there is none."""

    node: str | None
    code: ErrorCode | None
    #: One sentence, for people.
    message: str
    refused: tuple[Refusal, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Candidate:
    """One node with the numbers that a choice compares."""

    name: str
    #: From 1; None: refused.
    rank: int | None
    refusal: Refusal | None
    room: Room | None
    has_model: bool
    is_fetched_from_neighbour: bool
    speed: float
    load: int


def choose_node(
    nodes: Iterable[NodeView], wants: Wants, needed_mb: int | None, facts: ModelFacts = NO_FACTS
) -> NodeChoice:
    """Choose a node for a new worker.

    One that has the model first, then one that can fetch it from a neighbour; an accelerator before a
    CPU; then the smallest memory that suffices, so that large nodes stay free for large models (the
    largest where the need is not known); then the node that is fastest with the model, the one with
    least to do, the name.  `needed_mb` is what a worker will take, None where that is not known: the
    agent reckons exactly before it starts anything.
    """
    best: NodeView | None = None
    best_rank: Rank | None = None
    known = list(nodes)
    for node in known:
        rank = node_rank(node, wants, needed_mb, facts)
        if rank is not None and (best_rank is None or rank < best_rank):
            best, best_rank = node, rank
    if best is None:
        return _none(known, wants, needed_mb, facts)
    return chosen_node(best, wants, needed_mb)


def chosen_node(node: NodeView, wants: Wants, needed_mb: int | None) -> NodeChoice:
    """Return the choice of a node."""
    return NodeChoice(node.name, None, _message(node, wants, needed_mb))


def no_node(nodes: Iterable[NodeView], wants: Wants, needed_mb: int | None, facts: ModelFacts) -> NodeChoice:
    """Return why no node was chosen."""
    return _none(list(nodes), wants, needed_mb, facts)


def candidates(
    nodes: Iterable[NodeView], wants: Wants, needed_mb: int | None, facts: ModelFacts = NO_FACTS
) -> list[Candidate]:
    """Return all nodes with their numbers, in the order of the choice, those that are refused last."""
    ranked: list[tuple[Rank, NodeView]] = []
    refused: list[NodeView] = []
    for node in nodes:
        rank = node_rank(node, wants, needed_mb, facts)
        if rank is None:
            refused.append(node)
        else:
            ranked.append((rank, node))
    ranked.sort(key=lambda pair: pair[0])
    refused.sort(key=lambda node: node.name)

    def candidate(node: NodeView, number: int | None) -> Candidate:
        refusal = None if number is not None else refusal_of(node, wants, needed_mb, facts)
        return Candidate(
            name=node.name,
            rank=number,
            refusal=refusal,
            room=node.room(wants),
            has_model=facts.is_on(node.name),
            is_fetched_from_neighbour=not facts.is_on(node.name) and facts.has_neighbour,
            speed=facts.speeds.get(node.name, 0.0),
            load=facts.loads.get(node.name, 0),
        )

    return [candidate(node, number) for number, (_, node) in enumerate(ranked, 1)] + [
        candidate(node, None) for node in refused
    ]


def node_rank(node: NodeView, wants: Wants, needed_mb: int | None, facts: ModelFacts) -> Rank | None:
    """Return where a node stands: the least is chosen.  None: it cannot take the worker."""
    if node.state is not NodeState.READY or node.is_drained:
        return None
    name = node.name
    if (wants.node is not None and name != wants.node) or name in wants.excluded:
        return None
    room = node.room(wants)
    if room is None or (needed_mb is not None and needed_mb > room.free_mb):
        return None
    if wants.labels and missing_labels(wants.labels, node.labels):
        return None
    is_here = facts.is_on(name)
    if not is_here and (wants.on_disk or _lacks_disk(node, facts)):
        return None
    return (
        0 if is_here else 1 if facts.has_neighbour else 2,
        room.backend == _CPU,
        -room.size_class if needed_mb is None else room.size_class,
        -speed_class(facts.speeds.get(name, 0.0)) if facts.speeds else 0,
        facts.loads.get(name, 0) if facts.loads else 0,
        name,
    )


def _lacks_disk(node: NodeView, facts: ModelFacts) -> bool:
    return facts.disk_mb is not None and node.disk_free_mb is not None and facts.disk_mb > node.disk_free_mb


# --- In words ----------------------------------------------------------------------------------


def refusal_of(node: NodeView, wants: Wants, needed_mb: int | None, facts: ModelFacts) -> Refusal:
    """Return why a node cannot take the worker, with numbers."""
    return Refusal(node.name, *(_unfit(node, wants, facts) or _too_small(node, wants, needed_mb)))


def unfit(node: NodeView, wants: Wants, facts: ModelFacts) -> Refusal | None:
    """Return why a node cannot take the worker however much memory is free; None: it is memory alone."""
    found = _unfit(node, wants, facts)
    return Refusal(node.name, *found) if found is not None else None


def _unfit(node: NodeView, wants: Wants, facts: ModelFacts) -> Refused | None:
    away = _away(node)
    if away is not None:
        return away
    if wants.node is not None and node.name != wants.node:
        return ErrorCode.NO_CAPACITY, f"is not {wants.node}, which was asked for"
    if node.name in wants.excluded:
        return ErrorCode.NO_CAPACITY, "refused it already"
    missing = missing_labels(wants.labels, node.labels)
    if missing:
        return ErrorCode.NO_CAPACITY, f"lacks the label {missing}"
    if wants.on_disk and not facts.is_on(node.name):
        return ErrorCode.MODEL_NOT_FOUND, f"does not have {wants.model_ref}"
    if node.room(wants) is None:
        return _no_room(node, wants)
    if not facts.is_on(node.name) and _lacks_disk(node, facts):
        assert facts.disk_mb is not None and node.disk_free_mb is not None
        return (
            ErrorCode.INSUFFICIENT_DISK,
            f"has {gib(node.disk_free_mb)} GiB of disk free, fetching it takes {gib(facts.disk_mb)} GiB",
        )
    return None


def _away(node: NodeView) -> Refused | None:
    if node.is_drained or node.state is NodeState.DRAINING:
        return ErrorCode.NODE_DRAINING, "takes no new work: it is drained"
    if node.state is NodeState.READY:
        return None
    why = f": {node.error}" if node.error else ""
    code = ErrorCode.NODE_UNREACHABLE
    if node.error_code is ErrorCode.VERSION_MISMATCH:
        code = ErrorCode.VERSION_MISMATCH
    return code, f"is {node.state}{why}"


def _no_room(node: NodeView, wants: Wants) -> Refused:
    ids = [device.id for device in node.devices]
    if wants.device is not None and wants.device not in ids:
        has = ", ".join(ids) or "none"
        return ErrorCode.DEVICE_NOT_FOUND, f"has the devices {has}, {wants.device} was asked for"
    has = ", ".join(node.backends) or "none"
    if wants.backend is not None:
        return ErrorCode.BACKEND_UNAVAILABLE, f"has the backends {has}, {wants.backend} was asked for"
    unused = [d for d in node.devices if d.backend != _CPU and d.backend not in node.backends]
    if unused and wants.device is None:
        return (
            ErrorCode.BACKEND_UNAVAILABLE,
            f"has {unused[0].name}, and its engine computes with {has} alone: install the one for "
            f"{unused[0].backend} (`{install_command(node.name)}`), or ask for --backend cpu",
        )
    return ErrorCode.BACKEND_UNAVAILABLE, f"offers no device that computes; backends: {has}"


def _too_small(node: NodeView, wants: Wants, needed_mb: int | None) -> Refused:
    room = node.room(wants)
    assert room is not None and needed_mb is not None, "only memory is left to refuse by"
    code = ErrorCode.INSUFFICIENT_RAM if room.is_host else ErrorCode.INSUFFICIENT_VRAM
    where = "" if room.is_host else f" on {room.device}"
    promised = f" ({gib(room.promised_mb)} promised)" if room.promised_mb > 0 else ""
    return (
        code,
        f"has {gib(max(room.free_mb, 0))} GiB free{where}{promised}, the model needs {gib(needed_mb)} GiB",
    )


def _message(node: NodeView, wants: Wants, needed_mb: int | None) -> str:
    room = node.room(wants)
    assert room is not None, "it was chosen"
    free = f"{node.name} has {gib(room.free_mb)} GiB free"
    if needed_mb is None:
        return f"{free}: chosen"
    return f"{free}, the model needs {gib(needed_mb)} GiB: chosen"


def refuse(choice: NodeChoice, wants: Wants) -> NoReturn:
    """Raise why no node was chosen; where only one could be, its advice bears that one's name."""
    refused = {refusal.candidate: refusal.why for refusal in choice.refused}
    details = {"node": choice.refused[0].candidate} if len(refused) == 1 else {}
    fail(
        choice.code or ErrorCode.NO_CAPACITY,
        choice.message,
        model_ref=wants.model_ref,
        refused=refused,
        **details,
    )


def _none(known: list[NodeView], wants: Wants, needed_mb: int | None, facts: ModelFacts) -> NodeChoice:
    """Return why no node was chosen."""
    if wants.node is not None:
        known = [node for node in known if node.name == wants.node]
        if not known:
            return NodeChoice(None, ErrorCode.NODE_NOT_FOUND, f"no node is called {wants.node!r}")
    if not known:
        return NodeChoice(None, ErrorCode.NODE_UNREACHABLE, "the pool has no node yet: is an agent running?")
    known.sort(key=lambda node: node.name)
    refused = tuple(refusal_of(node, wants, needed_mb, facts) for node in known)
    codes = {refusal.code for refusal in refused}
    code = codes.pop() if len(codes) == 1 else ErrorCode.NO_CAPACITY
    return NodeChoice(None, code, "; ".join(f"{r.candidate} {r.why}" for r in refused), refused)
