"""Which worker takes a request?

Feasible, ranked, chosen.  Ties break by id, so the answer does not depend on the order of the input.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from arriero.contracts.errors import ErrorCode
from arriero.contracts.states import NodeState, WorkerState
from arriero.domain.engine_builds import CPU
from arriero.domain.placement_wants import Refusal, Wants, count, missing_labels
from arriero.domain.worker_states import READY

_WAITED_FOR: Final = frozenset({WorkerState.STARTING, WorkerState.LOADING})
_USABLE: Final = READY | _WAITED_FOR
#: Entries of a heap that are old, beyond those that are true, before it is built anew.
_STALE_MAX: Final = 32
#: Steps a doubling of speed is divided in: what differs by less than a fifth counts as the same.
_SPEED_STEPS: Final = 4
_NEVER_MEASURED: Final = 1_000_000

Rank: TypeAlias = tuple[bool, bool, int, int, int, float, str]


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
    #: Tokens a second of its node with its model, as measured; 0: not measured yet.
    speed: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)
    #: The model that it makes room for; empty: it stays.
    leaves_for: str = ""


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
    """Choose among the workers that have the model.

    Ready ones first, with a free slot first, on the node that is fastest with the model, with most
    free slots, with the shortest queue.
    """
    refused: list[Refusal] = []
    feasible: list[WorkerView] = []
    for worker in sorted(workers, key=lambda w: w.worker_id):
        refusal = worker_refusal(worker, wants)
        if refusal is None:
            feasible.append(worker)
        elif worker.model_ref == wants.model_ref:
            refused.append(Refusal(worker.worker_id, *refusal))
    best = min(feasible, key=worker_rank, default=None)
    if best is not None:
        return chosen(best, tuple(refused))
    why = "; ".join(f"{r.candidate} {r.why}" for r in refused)
    message = f"no worker has {wants.model_ref}" + (f" ({why})" if why else "")
    return WorkerChoice(None, False, message, tuple(refused))


def chosen(worker: WorkerView, refused: tuple[Refusal, ...] = ()) -> WorkerChoice:
    """Return the choice of a worker."""
    return WorkerChoice(worker.worker_id, worker.state in READY, _worker_message(worker), refused)


def worker_rank(worker: WorkerView) -> Rank:
    """Return where a worker stands among those that can take a request: the least is chosen."""
    slots_free = max(worker.slots_free, 0)
    return (
        worker.state not in READY,
        slots_free == 0,
        -speed_class(worker.speed),
        -slots_free,
        worker.queued,
        -worker.load_fraction,
        worker.worker_id,
    )


def speed_class(tokens_per_s: float) -> int:
    """Return a speed as a step that small differences do not change.

    One that was never measured counts as the fastest: it is tried, and known then.
    """
    if tokens_per_s <= 0:
        return _NEVER_MEASURED
    return round(_SPEED_STEPS * math.log2(tokens_per_s))


def widened(best: WorkerView, workers: Iterable[WorkerView], wants: Wants) -> Wants | None:
    """Return where one more worker of a model is wanted, whose slots are all taken; None: none is.

    `best`: the worker that takes the request all the same; the new one is for those that come later.  It
    goes to a node that has none: a second one beside the first would share what that computes with.  One
    that loads already is waited for.
    """
    others = [worker for worker in workers if worker.node_state is NodeState.READY]
    if best.slots_free > 0 or any(worker.state in _WAITED_FOR for worker in others):
        return None
    return replace(wants, excluded=frozenset(worker.node for worker in others))


def keeps_pace(best: WorkerView, backends: Iterable[str]) -> bool:
    """Return whether a node of these backends may help `best`: none without an accelerator helps one.

    Who comes later is sent to whatever slot is free, and would get a far slower answer than in the queue.
    """
    return best.backend == CPU or any(backend != CPU for backend in backends)


def _worker_message(worker: WorkerView) -> str:
    name = f"{worker.worker_id} on {worker.node}"
    if worker.state not in READY:
        return f"{name} is {worker.state}: waiting for it"
    if worker.slots_free > 0:
        return f"{name} has {count(worker.slots_free, 'free slot')}: chosen"
    return f"{name} is busy, {count(worker.queued, 'request')} wait before this one: chosen"


def worker_refusal(worker: WorkerView, wants: Wants) -> tuple[ErrorCode, str] | None:
    """Return why a worker cannot take a request; None: it can."""
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
    if wants.labels and (missing := missing_labels(wants.labels, worker.labels)):
        return ErrorCode.NO_WORKERS, f"is on {worker.node}, which lacks {missing}"
    if worker.state not in _USABLE:
        return ErrorCode.NO_READY_WORKERS, f"is {worker.state}"
    if worker.leaves_for:
        return ErrorCode.NO_READY_WORKERS, f"makes room for {worker.leaves_for}"
    if worker.node_state is NodeState.DRAINING:
        return ErrorCode.NODE_DRAINING, f"is on {worker.node}, which takes no new work"
    if worker.node_state is not NodeState.READY:
        return ErrorCode.NODE_UNREACHABLE, f"is on {worker.node}, which is {worker.node_state}"
    return None


class WorkerIndex:
    """The workers of a pool, of each model the best one at hand.

    `best` answers as `choose_worker` does, without looking at all of them: a heap for each model,
    whose old entries are passed over.
    """

    def __init__(self) -> None:
        self._views: dict[str, WorkerView] = {}
        self._by_model: dict[str, dict[str, WorkerView]] = {}
        self._by_node: dict[str, dict[str, WorkerView]] = {}
        self._heaps: dict[str, list[tuple[Rank, int, WorkerView]]] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._views)

    def put(self, view: WorkerView) -> None:
        """Take a worker as it is now."""
        before = self._views.get(view.worker_id)
        if before is not None and (before.model_ref, before.node) != (view.model_ref, view.node):
            self.drop(view.worker_id)
        self._views[view.worker_id] = view
        self._by_model.setdefault(view.model_ref, {})[view.worker_id] = view
        self._by_node.setdefault(view.node, {})[view.worker_id] = view
        if view.state in _USABLE and view.node_state is NodeState.READY and not view.leaves_for:
            self._number += 1
            heap = self._heaps.setdefault(view.model_ref, [])
            heapq.heappush(heap, (worker_rank(view), self._number, view))
            if len(heap) > 2 * len(self._by_model[view.model_ref]) + _STALE_MAX:
                heap[:] = [entry for entry in heap if self._views.get(entry[2].worker_id) is entry[2]]
                heapq.heapify(heap)

    def drop(self, worker_id: str) -> None:
        """Forget a worker; nothing happens if it is not known."""
        view = self._views.pop(worker_id, None)
        if view is None:
            return
        for index, key in ((self._by_model, view.model_ref), (self._by_node, view.node)):
            del index[key][worker_id]
            if not index[key]:
                del index[key]
        if view.model_ref not in self._by_model:
            self._heaps.pop(view.model_ref, None)

    def find(self, worker_id: str) -> WorkerView | None:
        """Return a worker, or None."""
        return self._views.get(worker_id)

    def of_model(self, model_ref: str) -> list[WorkerView]:
        """Return the workers that have a model."""
        return list(self._by_model.get(model_ref, {}).values())

    def of_node(self, node: str) -> list[WorkerView]:
        """Return the workers on a node."""
        return list(self._by_node.get(node, {}).values())

    def best(self, wants: Wants) -> WorkerView | None:
        """Return the worker that takes a request; None if there is none that can."""
        if wants.node is not None:
            here = self._by_node.get(wants.node, {}).values()
            feasible = [view for view in here if worker_refusal(view, wants) is None]
            return min(feasible, key=worker_rank, default=None)
        heap = self._heaps.get(wants.model_ref)
        if not heap:
            return None
        aside: list[tuple[Rank, int, WorkerView]] = []
        found = None
        while heap:
            view = heap[0][2]
            if self._views.get(view.worker_id) is not view:
                heapq.heappop(heap)
            elif worker_refusal(view, wants) is None:
                found = view
                break
            else:
                aside.append(heapq.heappop(heap))
        for entry in aside:
            heapq.heappush(heap, entry)
        return found

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(list(self._views.values()))

    def change_node(self, node: str, change: Callable[[WorkerView], WorkerView]) -> None:
        """Change all workers of a node."""
        for view in self.of_node(node):
            self.put(change(view))
