"""What does `POST /v1/placements:explain` answer?  Where a request would go now; nothing is done."""

import msgspec


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate that was not taken, and why."""

    candidate: str
    code: str
    why: str


class NodeCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """One node with the numbers that the choice compared."""

    name: str
    status: str
    #: From 1, the order in which they would be taken; None: refused.
    rank: int | None
    #: The device that would be used, empty where there is none.
    device: str = ""
    #: Memory of that device in MiB: free without what is promised to others, and what is promised.
    free_mb: int | None = None
    promised_mb: int = 0
    disk_free_mb: int | None = None
    has_model: bool = False
    #: Whether it would fetch the model from another node.
    is_fetched_from_neighbour: bool = False
    #: Tokens a second with this model, as measured; 0: not measured yet.
    speed_tokens_per_s: float = 0.0
    #: Requests that its workers compute now.
    load: int = 0
    labels: dict[str, str] = {}
    code: str | None = None
    why: str = ""


class WorkerCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """One worker that has the model."""

    worker_id: str
    node: str
    state: str
    rank: int | None
    slots_free: int
    queued: int
    speed_tokens_per_s: float = 0.0
    code: str | None = None
    why: str = ""


class Evicted(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that would be stopped to make room."""

    worker_id: str
    node: str
    model_ref: str
    memory_mb: int
    #: Whether it computes now and would be waited for.
    is_busy: bool = False


class BeingMade(msgspec.Struct, frozen=True, kw_only=True):
    """A worker that is being made for others already."""

    #: Where; None: its place is being looked for.
    node: str | None
    #: The last step that was told of it.
    message: str


class PlacementExplained(msgspec.Struct, frozen=True, kw_only=True):
    """What would happen to a request now."""

    model_ref: str = ""
    #: The worker that would take it; None: a new one is needed.
    worker_id: str | None
    #: The node that would take a new worker, or has one made; None: there is a worker, or no node can.
    node: str | None
    code: str | None
    message: str
    refused_workers: list[Refused]
    refused_nodes: list[Refused]
    #: What a worker would take, in MiB: with its full context, and with the least that it is started
    #: with.  None: not known before the model was fetched.
    needed_mb: int | None = None
    needed_least_mb: int | None = None
    workers: list[WorkerCandidate] = []
    nodes: list[NodeCandidate] = []
    #: The worker being made that the request would wait for together with others; what is told of nodes is
    #: of one more beside it.
    would_join: BeingMade | None = None
    would_evict: list[Evicted] = []
    #: The node whose workers load or end now, and would be waited for.
    would_wait_for: str | None = None
    #: The machine that would be woken, and what that is reckoned to cost.
    would_wake: str | None = None
    wake_cost_s: float | None = None
