"""Which node takes a new worker, found without a look at every node?  (`NodeIndex`)

It answers as `choose_node` does.  Nodes stand on shelves: by what may be asked for, whether that is
the CPU, and how much memory is free there; on each shelf by load and name.  Mostly the first node of
the first shelf with enough room is the one.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from typing import TypeAlias

from arriero.contracts.states import NodeState
from arriero.domain.placement_nodes import NodeView, Rank, node_rank, size_class
from arriero.domain.placement_wants import ModelFacts, Wants
from arriero.domain.placement_workers import speed_class

#: Whether it is the CPU, and the size class of its free memory.
_Shelf: TypeAlias = tuple[bool, int]
_Spot: TypeAlias = tuple[str | None, _Shelf, tuple[int, str]]
#: So many nodes that have the model are looked at one by one.
_FEW: int = 32


class NodeIndex:
    """The nodes of a pool that take work."""

    def __init__(self) -> None:
        self._views: dict[str, NodeView] = {}
        #: What is free there, by what may be asked for.
        self._free_mb: dict[str, dict[str | None, int]] = {}
        self._spots: dict[str, tuple[_Spot, ...]] = {}
        self._shelves: dict[str | None, dict[_Shelf, list[tuple[int, str]]]] = {}

    def put(self, view: NodeView, load: int) -> None:
        """Take a node as it is now, with the requests that it computes."""
        self._views[view.name] = view
        self._free_mb[view.name] = {key: room.free_mb for key, room in view.asked()}
        spots: tuple[_Spot, ...] = ()
        if view.state is NodeState.READY and not view.is_drained:
            spots = tuple(
                (key, (room.is_host, room.size_class), (load, view.name)) for key, room in view.asked()
            )
        self._move(view.name, spots)

    def drop(self, name: str) -> None:
        """Forget a node; nothing happens if it is not known."""
        self._views.pop(name, None)
        self._free_mb.pop(name, None)
        self._move(name, ())

    def _move(self, name: str, spots: tuple[_Spot, ...]) -> None:
        before = self._spots.get(name, ())
        if spots == before:
            return
        for key, shelf, place in before:
            shelves = self._shelves[key]
            places = shelves[shelf]
            del places[bisect_left(places, place)]
            if not places:
                del shelves[shelf]
        for key, shelf, place in spots:
            insort(self._shelves.setdefault(key, {}).setdefault(shelf, []), place)
        if spots:
            self._spots[name] = spots
        else:
            self._spots.pop(name, None)

    def best(self, wants: Wants, needed_mb: int | None, facts: ModelFacts) -> NodeView | None:
        """Return the node that takes a new worker; None if there is none that can."""
        if wants.node is not None:
            return self._best_of([wants.node], wants, needed_mb, facts)
        if facts.is_everywhere:
            return self._walk(wants, needed_mb, facts, lambda _: True)
        if len(facts.holders) <= _FEW:
            found = self._best_of(facts.holders, wants, needed_mb, facts)
        else:
            found = self._walk(wants, needed_mb, facts, lambda name: name in facts.holders)
        if found is not None or wants.on_disk:
            return found
        return self._walk(wants, needed_mb, facts, lambda name: name not in facts.holders)

    def _best_of(
        self, names: Iterable[str], wants: Wants, needed_mb: int | None, facts: ModelFacts
    ) -> NodeView | None:
        best: tuple[Rank, NodeView] | None = None
        for name in names:
            view = self._views.get(name)
            rank = node_rank(view, wants, needed_mb, facts) if view is not None else None
            if view is not None and rank is not None and (best is None or rank < best[0]):
                best = (rank, view)
        return best[1] if best is not None else None

    def _walk(
        self, wants: Wants, needed_mb: int | None, facts: ModelFacts, is_meant: Callable[[str], bool]
    ) -> NodeView | None:
        """Return the best of those that are meant, shelf by shelf."""
        key = wants.device or wants.backend
        shelves, free_mb = self._shelves.get(key, {}), self._free_mb
        if needed_mb is None:
            order = sorted(shelves, key=lambda shelf: (shelf[0], -shelf[1]))
        else:
            least = size_class(needed_mb)
            order = sorted(shelf for shelf in shelves if shelf[1] >= least)
        for shelf in order:
            best: tuple[int, NodeView] | None = None
            for _, name in shelves[shelf]:
                # Where the pool is full, all of it may stand on the one shelf that is just too small.
                if needed_mb is not None and free_mb[name][key] < needed_mb:
                    continue
                if not is_meant(name):
                    continue
                view = self._views[name]
                if node_rank(view, wants, needed_mb, facts) is None:
                    continue
                speed = speed_class(facts.speeds.get(name, 0.0))
                if best is None or speed > best[0]:
                    best = (speed, view)
                if name not in facts.speeds:
                    break
            if best is not None:
                return best[1]
        return None
