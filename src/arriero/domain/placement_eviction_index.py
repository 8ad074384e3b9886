"""Which workers would have to go, found without a look at every node?  (`EvictionIndex`)

It answers as `plan_eviction` does.  Of each device it is known how much is free there, how much would
be without its largest worker, without its two largest, and so on.  So the devices that lose fewest
are found by comparing numbers, and of those the ones whose workers were used longest ago are looked
at first: mostly the first of them is the one.
"""

import heapq
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final, TypeAlias

from arriero.contracts.states import NodeState
from arriero.domain.placement_eviction import (
    ANY,
    IDLE_ONLY,
    READY_ONES,
    Eviction,
    Occupant,
    Stage,
    age,
    evicted,
    fewest,
    plan_eviction,
)
from arriero.domain.placement_nodes import NodeView, unfit
from arriero.domain.placement_wants import ModelFacts, Wants

_STAGES: Final = (IDLE_ONLY, READY_ONES, ANY)
#: Memory that devices of one shelf differ by at the most.
_STEP_MB: Final = 2048

#: When the last of some workers was used, at the earliest, and which node and device they are on.
_Spot: TypeAlias = tuple[float, str, str]
#: A node and a device of it.
_Place: TypeAlias = tuple[str, str]


@dataclass(slots=True, eq=False)
class _Row:
    """One device with the workers there that may go, if those in these stages may."""

    node: str
    device: str
    stages: frozenset[Stage]
    #: What may be asked for so that this device is meant: its id, its backend's name, None.
    keys: tuple[str | None, ...]
    free_mb: int
    #: The one used longest ago first.
    able: list[Occupant] = field(default_factory=list)
    #: Their memory, the largest first.
    largest_mb: list[int] = field(default_factory=list)
    #: By the number of workers that go: what is free then, at the most.
    reach_mb: tuple[int, ...] = ()
    #: With all of them gone.
    most_mb: int = 0
    #: By the number of workers that go: where the device would stand among others, at best.
    spots: tuple[_Spot, ...] = ()
    #: The step of `most_mb` that it stands at; None: not among the others.
    shelf: int | None = None

    def fill(self, able: list[Occupant], fewer: "_Row | None") -> None:
        """Take the workers that may go; `fewer`: the same device with some of these stages."""
        node, device = self.node, self.device
        self.able = able
        if fewer is not None and len(able) == len(fewer.able):
            # Then they are the same: a request's begin and end have this done.
            self.largest_mb, self.spots = fewer.largest_mb, fewer.spots
            self.reach_mb, self.most_mb = fewer.reach_mb, fewer.most_mb
            return
        self.largest_mb = sorted([occupant.memory_mb for occupant in able], reverse=True)
        self.spots = ((0.0, node, device), *[(occupant.last_used, node, device) for occupant in able])
        self.measure(self.free_mb)

    def measure(self, free_mb: int) -> None:
        """Take what is free."""
        self.free_mb = free_mb
        self.reach_mb = tuple(accumulate(self.largest_mb, initial=free_mb))
        self.most_mb = self.reach_mb[-1]


class EvictionIndex:
    """The workers of a pool by the memory that they hold."""

    def __init__(self) -> None:
        self._views: dict[str, NodeView] = {}
        #: What a node's rows are made from, besides numbers; False: it takes no work.
        self._shapes: dict[str, object] = {}
        self._occupants: dict[str, dict[str, Occupant]] = {}
        #: By node and device, one for each of `_STAGES`; only of nodes that take work and have workers.
        self._rows: dict[str, dict[str, tuple[_Row, ...]]] = {}
        #: By what is asked for and which stages, then by step of memory.
        self._shelves: dict[tuple[str | None, frozenset[Stage]], dict[int, dict[_Place, _Row]]] = {}

    # --- Told -------------------------------------------------------------------------------

    def put_node(self, view: NodeView) -> None:
        """Take a node as it is now."""
        name = view.name
        self._views[name] = view
        takes_work = view.state is NodeState.READY and not view.is_drained
        shape = takes_work and (view.backends, [(device.id, device.backend) for device in view.devices])
        if self._shapes.get(name) != shape:
            self._shapes[name] = shape
            self._build(name)
            return
        rows = self._rows.get(name)
        if rows is not None:
            for _, room in view.asked():
                for row in rows[room.device]:
                    if row.free_mb != room.free_mb:
                        row.measure(room.free_mb)
                        self._place(row)

    def drop_node(self, name: str) -> None:
        """Forget a node; nothing happens if it is not known."""
        self._views.pop(name, None)
        self._shapes.pop(name, None)
        self._build(name)

    def put(self, node: str, occupant: Occupant) -> None:
        """Take a worker of a node as it is now."""
        here = self._occupants.setdefault(node, {})
        before = here.get(occupant.worker_id)
        if before == occupant:
            return
        here[occupant.worker_id] = occupant
        if node not in self._rows:
            self._build(node)
            return
        if before is not None and before.device != occupant.device:
            self._fill(node, before.device)
            before = None
        self._fill(node, occupant.device, _same_for(before, occupant))

    def drop(self, node: str, worker_id: str) -> None:
        """Forget a worker; nothing happens if it is not known."""
        here = self._occupants.get(node, {})
        before = here.pop(worker_id, None)
        if before is None:
            return
        if here:
            self._fill(node, before.device)
        else:
            del self._occupants[node]
            self._build(node)

    def _build(self, name: str) -> None:
        """Make the rows of a node anew."""
        for of_device in self._rows.pop(name, {}).values():
            for row in of_device:
                self._take_away(row)
        view = self._views.get(name)
        if view is None or name not in self._occupants or not self._shapes[name]:
            return
        asked = list(view.asked())
        rows = self._rows[name] = {}
        for device, room in {room.device: room for _, room in asked}.items():
            keys = tuple(
                key
                for key, meant in asked
                if key == device or (key in (None, room.backend) and meant.backend == room.backend)
            )
            rows[device] = tuple(_Row(name, device, stages, keys, room.free_mb) for stages in _STAGES)
            self._fill(name, device)

    def _fill(self, node: str, device: str, same_for: Container[frozenset[Stage]] = ()) -> None:
        rows = self._rows.get(node, {}).get(device)
        if rows is None:
            return
        here = self._occupants[node].values()
        able = [o for o in here if o.device == device and o.memory_mb > 0 and not o.is_pinned]
        able.sort(key=age)
        fewer: _Row | None = None
        for row in rows:
            if row.stages not in same_for:
                row.fill([occupant for occupant in able if occupant.stage in row.stages], fewer)
                self._place(row)
            fewer = row

    def _place(self, row: _Row) -> None:
        shelf = row.most_mb // _STEP_MB
        if shelf == row.shelf:
            return
        self._take_away(row)
        row.shelf = shelf
        for key in row.keys:
            shelves = self._shelves.setdefault((key, row.stages), {})
            shelves.setdefault(shelf, {})[row.node, row.device] = row

    def _take_away(self, row: _Row) -> None:
        if row.shelf is None:
            return
        for key in row.keys:
            shelves = self._shelves[key, row.stages]
            del shelves[row.shelf][row.node, row.device]
            if not shelves[row.shelf]:
                del shelves[row.shelf]
        row.shelf = None

    # --- Asked ------------------------------------------------------------------------------

    def plan(
        self, wants: Wants, needed_mb: int, *, facts: ModelFacts, stages: frozenset[Stage]
    ) -> Eviction | None:
        """Return what `plan_eviction` does; `stages` is IDLE_ONLY, READY_ONES or ANY."""
        if wants.node is not None:
            nodes = [self._views[wants.node]] if wants.node in self._views else []
            occupants = {wants.node: list(self._occupants.get(wants.node, {}).values())}
            return plan_eviction(nodes, occupants, wants, needed_mb, facts=facts, stages=stages)
        shelves = self._shelves.get((wants.device or wants.backend, stages), {})
        least = needed_mb // _STEP_MB
        stage = _STAGES.index(stages)
        by_number: defaultdict[int, list[_Row]] = defaultdict(list)
        for shelf, here in shelves.items():
            if shelf >= least:
                for row in here.values():
                    if row.most_mb >= needed_mb:
                        by_number[bisect_left(row.reach_mb, needed_mb)].append(row)
        for number in sorted(by_number):
            for rows in _by_disk(by_number[number], facts):
                best = self._oldest(rows, number, stage, wants, needed_mb, facts)
                if best is not None:
                    return best
        return None

    def _oldest(
        self, rows: list[_Row], number: int, stage: int, wants: Wants, needed_mb: int, facts: ModelFacts
    ) -> Eviction | None:
        """Return the plan for the device whose workers were used longest ago; `number` of them go."""
        heap = [row.spots[number] for row in rows]
        heapq.heapify(heap)
        best: tuple[_Spot, Eviction] | None = None
        while heap and (best is None or heap[0] < best[0]):
            _, node, device = heapq.heappop(heap)
            row = self._rows[node][device][stage]
            view = self._views[node]
            if unfit(view, wants, facts) is not None:
                continue
            room = next((room for room in view.rooms(wants) if room.device == device), None)
            victims = fewest(row.able, needed_mb - row.free_mb)
            if room is None or victims is None:
                continue
            spot = (max((victim.last_used for victim in victims), default=0.0), node, device)
            if best is None or spot < best[0]:
                best = (spot, evicted(node, room, victims))
        return best[1] if best is not None else None


def _same_for(before: Occupant | None, now: Occupant) -> tuple[frozenset[Stage], ...]:
    """Return the stages for which a worker that changed is what it was."""
    if before is None:
        return ()
    if (before.memory_mb, before.last_used, before.is_pinned) != (
        now.memory_mb, now.last_used, now.is_pinned,
    ):  # fmt: skip
        return ()
    return tuple(stages for stages in _STAGES if before.stage in stages and now.stage in stages)


def _by_disk(rows: list[_Row], facts: ModelFacts) -> Iterator[list[_Row]]:
    """Yield those on nodes that have the model, then the others."""
    holders: Container[str] = () if facts.is_everywhere else facts.holders
    yield [row for row in rows if row.node in holders]
    yield [row for row in rows if row.node not in holders]
