"""What does a choice of a worker or a node see of the pool?  (`PoolViews`)

Kept up to date as news come in, so that a choice among thousands looks at ready-made numbers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from arriero.contracts import refs
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import NodeChanged, PoolEvent, PoolWorkerChanged
from arriero.contracts.records import DeviceRecord, ModelRecord, NodeRecord, WorkerRecord
from arriero.contracts.states import NodeState, WorkerState
from arriero.domain.placement_eviction import Occupant, Stage
from arriero.domain.placement_eviction_index import EvictionIndex
from arriero.domain.placement_index import NodeIndex
from arriero.domain.placement_ledger import Ledger, Movement
from arriero.domain.placement_memory import MIB, SLOTS, Needed, memory_mb, needed
from arriero.domain.placement_nodes import NodeView
from arriero.domain.placement_turns import Place
from arriero.domain.placement_wake import may_sleep
from arriero.domain.placement_wants import ModelFacts
from arriero.domain.placement_workers import WorkerIndex, WorkerView
from arriero.domain.worker_states import READY, WORKERS
from arriero.runtime.clock import Clock

_ANSWERS: Final = frozenset({NodeState.READY, NodeState.DRAINING})


@dataclass(slots=True)
class _Seen:
    """A node as its last news told."""

    record: NodeRecord
    ram_free_mb: int
    disk_free_mb: int
    devices: tuple[DeviceRecord, ...]
    promised_mb: Mapping[str, int] = field(default_factory=dict)
    models: dict[str, ModelRecord] = field(default_factory=dict)


@dataclass(slots=True)
class _Use:
    """How a worker is used, as we see it ourselves."""

    in_flight: int = 0
    #: When it took requests for the first time; None: not yet.
    ready_s: float | None = None
    #: When its last request ended.
    ended_s: float | None = None
    ended_unix: float = 0.0


class PoolViews:
    """Workers and nodes as choices see them, and what we sent them ourselves."""

    def __init__(self, clock: Clock, *, wake_cost_s: float = 60.0) -> None:
        self._clock = clock
        self._wake_cost_s = wake_cost_s
        self._records: dict[str, WorkerRecord] = {}
        self._uses: dict[str, _Use] = {}
        self._leaving: dict[str, str] = {}
        self._seen: dict[str, _Seen] = {}
        self._nodes: dict[str, NodeView] = {}
        self._asleep: dict[str, NodeView] = {}
        self._holders: dict[str, dict[str, ModelRecord]] = {}
        self._loads: dict[str, int] = {}
        self._ledger = Ledger()
        #: Tokens a second by model and node, as their workers told last; kept when those are gone.
        self._speeds: dict[str, dict[str, float]] = {}
        self.workers = WorkerIndex()
        self.index = NodeIndex()
        self.evictions = EvictionIndex()
        #: Workers that are being made, by node: how many `evictions` knows of.
        self._being_made: dict[str, int] = {}

    # --- Read by choices --------------------------------------------------------------------

    def nodes(self) -> Iterable[NodeView]:
        """Return the nodes."""
        return self._nodes.values()

    def asleep(self) -> Iterable[NodeView]:
        """Return the nodes that could be woken."""
        return self._asleep.values()

    def node(self, name: str) -> NodeView | None:
        """Return a node, or None."""
        return self._nodes.get(name)

    @property
    def requests_in_flight(self) -> int:
        """How many requests are with workers now."""
        return sum(self._loads.values())

    def requests_on(self, node: str) -> int:
        """Return how many requests are with the workers of a node now, whatever road they came."""
        told = sum(self.place(view.worker_id).requests for view in self.workers.of_node(node))
        return max(told, self._loads.get(node, 0))

    def facts(self, model_ref: str) -> ModelFacts:
        """Return what is known of a model."""
        holders = self._holders.get(model_ref, {})
        model = self.model(model_ref)
        return ModelFacts(
            holders=holders.keys(),
            has_neighbour=any(
                view.state is NodeState.READY
                for view in (self._nodes.get(name) for name in holders)
                if view is not None
            ),
            is_everywhere=is_local(model_ref),
            disk_mb=-(-model.size_bytes // MIB) if model is not None else None,
            speeds=self._speeds.get(model_ref, {}),
            loads=self._loads,
        )

    def model(self, model_ref: str) -> ModelRecord | None:
        """Return a model's record of the first node that has it; None if no node is known to have it."""
        holders = self._holders.get(model_ref)
        return holders[min(holders)] if holders else None

    def models(self) -> list[ModelRecord]:
        """Return the models of all nodes that answer, by node and reference."""
        return [
            seen.models[model_ref]
            for name, seen in sorted(self._seen.items())
            if self._nodes[name].state in (NodeState.READY, NodeState.DRAINING)
            for model_ref in sorted(seen.models)
        ]

    def has_model(self, node: str, model_ref: str) -> bool:
        """Return whether a node has a model without fetching it."""
        return is_local(model_ref) or node in self._holders.get(model_ref, {})

    def needed(
        self, model_ref: str, *, slots: int | None = None, context_tokens: int | None = None
    ) -> Needed | None:
        """Return what a worker will take for a model; None: not known before it was fetched.

        A context that somebody asks for is not reduced.
        """
        model = self.model(model_ref)
        if model is None:
            return None
        if context_tokens is None:
            return needed(model, slots=slots or SLOTS)
        exact_mb = memory_mb(model, slots=slots or SLOTS, context_tokens=context_tokens)
        return Needed(exact_mb, exact_mb)

    def occupants(self, node: str) -> list[Occupant]:
        """Return the workers of a node, with the memory they hold and what they do with it."""
        here = [self._occupant(view) for view in self.workers.of_node(node)]
        return here + self._promised(node)

    def place(self, worker_id: str) -> Place:
        """Return how a worker that would make room is used."""
        now_s = self._clock.monotonic_s()
        use = self._uses.get(worker_id, _Use())
        record = self._records.get(worker_id)
        since_s = use.ready_s if use.ready_s is not None else now_s
        return Place(
            requests=max(use.in_flight, _requests(record) if record is not None else 0),
            quiet_s=now_s - max(since_s, use.ended_s if use.ended_s is not None else since_s),
            resident_s=now_s - since_s,
        )

    def _occupant(self, view: WorkerView) -> Occupant:
        record = self._records[view.worker_id]
        use = self._uses.get(view.worker_id, _Use())
        if record.state not in READY or view.leaves_for:
            stage = Stage.MOVING
        elif use.in_flight or _requests(record):
            stage = Stage.BUSY
        else:
            stage = Stage.IDLE
        model = self._own_model(record)
        return Occupant(
            worker_id=record.worker_id,
            device=record.device,
            model_ref=record.model_ref,
            memory_mb=self._memory_mb(record),
            stage=stage,
            last_used=max(record.last_activity_unix, use.ended_unix),
            is_pinned=model is not None and model.is_pinned,
        )

    def _promised(self, node: str) -> list[Occupant]:
        return [_being_made(number, taken) for number, taken in enumerate(self._ledger.taken(node))]

    def _own_model(self, record: WorkerRecord) -> ModelRecord | None:
        """Return the model of a worker as its own node has it."""
        seen = self._seen.get(record.node)
        return seen.models.get(record.model_ref) if seen is not None else None

    def _memory_mb(self, record: WorkerRecord) -> int:
        """Return what a worker holds on its device: seen for the host, reckoned for an accelerator."""
        is_host = record.device == record.backend
        if is_host and record.memory_mb > 0:
            return record.memory_mb
        model = self._own_model(record)
        if model is None:
            return 0
        if record.context_tokens <= 0:
            return needed(model, slots=record.slots_total).full_mb
        return memory_mb(model, slots=record.slots_total, context_tokens=record.context_tokens)

    # --- Told by whoever hears --------------------------------------------------------------

    def take(self, event: PoolEvent) -> None:
        """Take what the live feed tells of a node or a worker."""
        if isinstance(event, NodeChanged):
            self._node_changed(event.node)
        elif isinstance(event, PoolWorkerChanged):
            self._worker_changed(event.worker)

    def beat(
        self, name: str, *, ram_free_mb: int, disk_free_mb: int, devices: Sequence[DeviceRecord],
        promised_mb: Mapping[str, int],
    ) -> None:  # fmt: skip
        """Take what a node has free now."""
        seen = self._seen.get(name)
        if seen is None:
            return
        seen.ram_free_mb = ram_free_mb
        seen.disk_free_mb = disk_free_mb
        seen.devices = tuple(devices)
        seen.promised_mb = promised_mb
        self._ledger.beat(name)
        self._moved(seen)

    def models_told(self, name: str, models: Iterable[ModelRecord]) -> None:
        """Take a node's catalog."""
        seen = self._seen.get(name)
        if seen is None:
            return
        self._forget_models(name)
        seen.models = {model.model_ref: model for model in models}
        for model_ref, model in seen.models.items():
            self._holders.setdefault(model_ref, {})[name] = model
        self._show_all(name)

    def leased(self, worker_id: str) -> None:
        """Take note that a request is given to a worker."""
        record = self._records[worker_id]
        self._uses.setdefault(worker_id, _Use()).in_flight += 1
        self._count(record.node, 1)
        self._show(record)

    def released(self, worker_id: str, node: str) -> None:
        """Take note that a request is with its worker no more."""
        self._count(node, -1)
        use = self._uses.get(worker_id)
        if use is None:
            return
        use.in_flight -= 1
        use.ended_s = self._clock.monotonic_s()
        use.ended_unix = self._clock.wall_s()
        record = self._records.get(worker_id)
        if record is not None:
            self._show(record)
        elif not use.in_flight:
            del self._uses[worker_id]

    def _count(self, name: str, change: int) -> None:
        load = self._loads.get(name, 0) + change
        if load:
            self._loads[name] = load
        else:
            del self._loads[name]
        node = self._nodes.get(name)
        if node is not None:
            self.index.put(node, load)

    def leave(self, worker_ids: Iterable[str], model_ref: str) -> None:
        """Give these workers no new request: they make room for a model."""
        for worker_id in worker_ids:
            record = self._records.get(worker_id)
            if record is not None:
                self._leaving[worker_id] = model_ref
                self._show(record)

    def stay(self, worker_ids: Iterable[str]) -> None:
        """Give workers requests again, those that are still there."""
        for worker_id in worker_ids:
            self._leaving.pop(worker_id, None)
            record = self._records.get(worker_id)
            if record is not None:
                self._show(record)

    def reserve(self, node: str, device: str, needed_mb: int) -> Movement:
        """Count memory as given away, for a worker that is being made."""
        movement = self._ledger.take(node, device, needed_mb)
        self._moved(self._seen[node])
        return movement

    def made(self, movement: Movement, worker_id: str) -> None:
        """Note which worker was made in what was reserved, right after whoever made it answered."""
        self._ledger.made(movement, worker_id, is_told=worker_id in self._records)

    def told(self, node: str, worker_id: str) -> None:
        """Take note that an agent told of a worker, whether or not it is as we know it."""
        self._ledger.told(node, worker_id)

    def unreserve(self, movement: Movement) -> None:
        """Take a reservation back; safe to call twice."""
        self._ledger.cancel(movement)
        if movement.node in self._seen:
            self._moved(self._seen[movement.node])

    # --- Views ------------------------------------------------------------------------------

    def _node_changed(self, record: NodeRecord) -> None:
        before = self._nodes.get(record.name)
        if record.status is NodeState.REMOVED:
            self._forget_models(record.name)
            self._seen.pop(record.name, None)
            self._nodes.pop(record.name, None)
            self._asleep.pop(record.name, None)
            self.index.drop(record.name)
            self.evictions.drop_node(record.name)
            return
        seen = self._seen.get(record.name)
        if seen is None:
            seen = _Seen(record, record.ram_free_mb, record.disk_free_mb, tuple(record.devices))
            self._seen[record.name] = seen
            self._show_all(record.name)
        seen.record = record
        seen.ram_free_mb, seen.disk_free_mb = record.ram_free_mb, record.disk_free_mb
        seen.devices = tuple(record.devices)
        view = self._see(seen)
        if before is None or (before.state, before.labels) != (view.state, view.labels):
            self.workers.change_node(
                record.name, lambda worker: replace(worker, node_state=view.state, labels=view.labels)
            )

    def _moved(self, seen: _Seen) -> None:
        """Take note of what is promised on a node, for all nodes that are the same machine."""
        self._see(seen)
        for name in seen.record.same_machine_as:
            if name in self._seen:
                self._see(self._seen[name])

    def _promised_mb(self, seen: _Seen) -> Mapping[str, int]:
        """Return the memory of a node's machine that is not free any more though nobody uses it yet."""
        found: Mapping[str, int] = seen.promised_mb
        others = [self._seen[name] for name in seen.record.same_machine_as if name in self._seen]
        for told in [other.promised_mb for other in others if other.record.status in _ANSWERS]:
            found = _added(found, told)
        for name in (seen.record.name, *seen.record.same_machine_as):
            if not self._ledger.is_empty(name):
                found = _added(found, self._ledger.of(name))
        return found

    def _see(self, seen: _Seen) -> NodeView:
        record = seen.record
        promised_mb = self._promised_mb(seen)
        view = NodeView(
            name=record.name,
            state=record.status,
            backends=tuple(record.backends),
            devices=seen.devices,
            ram_free_mb=seen.ram_free_mb,
            ram_mb=record.ram_mb,
            disk_free_mb=seen.disk_free_mb,
            labels=record.labels,
            promised_mb=promised_mb,
            is_drained=record.is_drained,
            error_code=_code(record),
            error=record.error.message if record.error is not None else "",
            mac=record.mac,
            wake_cost_s=self._wake_cost_s,
        )
        self._nodes[record.name] = view
        if may_sleep(view):
            self._asleep[record.name] = view
        else:
            self._asleep.pop(record.name, None)
        self.index.put(view, self._loads.get(record.name, 0))
        self.evictions.put_node(view)
        if record.name in self._being_made or not self._ledger.is_empty(record.name):
            self._show_promised(record.name)
        return view

    def _show_promised(self, name: str) -> None:
        promised = self._promised(name)
        for number in range(len(promised), self._being_made.pop(name, 0)):
            self.evictions.drop(name, _being_made_id(number))
        for occupant in promised:
            self.evictions.put(name, occupant)
        if promised:
            self._being_made[name] = len(promised)

    def _show_all(self, name: str) -> None:
        for view in self.workers.of_node(name):
            self.evictions.put(name, self._occupant(view))

    def _forget_models(self, name: str) -> None:
        seen = self._seen.get(name)
        for model_ref in seen.models if seen is not None else ():
            holders = self._holders.get(model_ref, {})
            holders.pop(name, None)
            if not holders:
                self._holders.pop(model_ref, None)

    def _worker_changed(self, record: WorkerRecord) -> None:
        worker_id = record.worker_id
        if record.state in WORKERS.final:
            before = self._records.pop(worker_id, None)
            self._leaving.pop(worker_id, None)
            self.workers.drop(worker_id)
            if before is not None:
                self.evictions.drop(before.node, worker_id)
            use = self._uses.get(worker_id)
            if use is not None and not use.in_flight:
                del self._uses[worker_id]
            if before is not None and record.node in self._seen:
                self._ledger.gave_back(record.node, record.device, self._memory_mb(before))
                self._moved(self._seen[record.node])
            return
        before = self._records.get(worker_id)
        if before is not None and before.node != record.node:
            self.evictions.drop(before.node, worker_id)
        self._records[worker_id] = record
        if record.tokens_per_s > 0:
            self._speeds.setdefault(record.model_ref, {})[record.node] = record.tokens_per_s
        use = self._uses.setdefault(worker_id, _Use())
        if use.ready_s is None and record.state in READY:
            use.ready_s = self._clock.monotonic_s()
        self._show(record)

    def _show(self, record: WorkerRecord) -> None:
        # The record lags behind what we sent just now: the worse of both counts.
        total = record.slots_total
        use = self._uses.get(record.worker_id)
        sent = use.in_flight if use is not None else 0
        node = self._nodes.get(record.node)
        view = WorkerView(
            worker_id=record.worker_id,
            node=record.node,
            model_ref=record.model_ref,
            backend=record.backend,
            device=record.device,
            state=record.state,
            slots_free=min(record.slots_available, total - sent),
            queued=max(record.queued, sent - total, 0),
            node_state=node.state if node is not None else NodeState.UNREACHABLE,
            load_fraction=record.load_fraction,
            speed=record.tokens_per_s or self._speeds.get(record.model_ref, {}).get(record.node, 0.0),
            labels=node.labels if node is not None else {},
            leaves_for=self._leaving.get(record.worker_id, ""),
        )
        self.workers.put(view)
        self.evictions.put(record.node, self._occupant(view))


def _added(some_mb: Mapping[str, int], more_mb: Mapping[str, int]) -> Mapping[str, int]:
    return {device: some_mb.get(device, 0) + more_mb.get(device, 0) for device in {*some_mb, *more_mb}}


def is_local(model_ref: str) -> bool:
    """Return whether an agent has the model without fetching it."""
    try:
        return isinstance(refs.parse(model_ref), refs.DemoRef | refs.FileRef)
    except ArrieroError:
        return False


def _requests(record: WorkerRecord) -> int:
    """Return how many requests are with a worker, as it told last."""
    busy = record.slots_total - record.slots_available if record.state is WorkerState.BUSY else 0
    return max(busy, 1 if record.state is WorkerState.BUSY else 0) + record.queued


def _being_made(number: int, movement: Movement) -> Occupant:
    return Occupant(
        worker_id=_being_made_id(number),
        device=movement.device,
        model_ref="",
        memory_mb=movement.memory_mb,
        stage=Stage.MOVING,
        last_used=0.0,
    )


def _being_made_id(number: int) -> str:
    return f"(being made {number})"


def _code(record: NodeRecord) -> ErrorCode | None:
    if record.error is None:
        return None
    try:
        return ErrorCode(record.error.code)
    except ValueError:
        return None
