"""Which events do the streams carry?

Tagged unions where several kinds share a stream: the tag is the field `type`.  A worker's native
token stream has no tags on the wire (see `TokenFrame` and its siblings): a frame is known by its
fields, as clients expect that read it with `EventSource`.
"""

from typing import Final, TypeAlias

import msgspec

from arriero.contracts.errors import ErrorBody
from arriero.contracts.records import (
    Capabilities,
    DownloadRecord,
    ModelRecord,
    NodeRecord,
    TaskRecord,
    WorkerRecord,
)
from arriero.contracts.states import DownloadState

# --- GET /v1/progress of a worker -------------------------------------------------------------


class LoadingFrame(msgspec.Struct, frozen=True, kw_only=True):
    """One frame of loading; the last one of a load that succeeded has the stage `ready`."""

    stage: str
    fraction: float
    layers_loaded: int
    layers_total: int
    memory_mb: int


# --- POST /v1/inference/stream of a worker ----------------------------------------------------


class StartedFrame(msgspec.Struct, frozen=True, kw_only=True):
    """First frame."""

    request_id: str
    started: bool = True


class QueuedFrame(msgspec.Struct, frozen=True, kw_only=True):
    """All slots compute: `position` requests, this one counted, wait; told at each change."""

    position: int
    queued: bool = True


class PromptFrame(msgspec.Struct, frozen=True, kw_only=True):
    """So much of the prompt is computed."""

    prompt_processed: int
    prompt_total: int


class TokenFrame(msgspec.Struct, frozen=True, kw_only=True):
    """One token.  `token` is its text, empty where a character is not complete yet."""

    token: str
    id: int
    index: int


class DoneFrame(msgspec.Struct, frozen=True, kw_only=True):
    """Last frame before `[DONE]`."""

    total_tokens: int
    duration_ms: int
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int = 0
    done: bool = True


class InferenceAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/inference`: the whole answer at once."""

    request_id: str
    text: str
    token_ids: list[int]
    total_tokens: int
    prompt_tokens: int
    duration_ms: int
    finish_reason: str


# --- GET /v1/models/download/progress of an agent ---------------------------------------------


class DownloadFrame(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One frame of a download; the last one of a download that succeeded has the stage `complete`."""

    stage: DownloadState
    bytes_downloaded: int
    bytes_total: int | None
    speed_mbps: float
    eta_s: float | None
    download_id: str
    attempt: int = 1
    #: Why the last attempt ended and when the next one begins, while one is waited for.
    retry_reason: str | None = None
    retry_in_s: float | None = None
    local_path: str | None = None
    #: Where the bytes come from: "hub", "https", "node NAME", "hf-cache"…
    source: str = ""


class CheckFrame(msgspec.Struct, frozen=True, kw_only=True):
    """One frame of files being read through, by a verify, a scan or an import that is followed as SSE."""

    #: What is being read, for people.
    what: str
    bytes_read: int
    bytes_total: int


# --- GET /v1/events of an agent (held by the orchestrator) ------------------------------------


class AgentSnapshot(msgspec.Struct, frozen=True, kw_only=True, tag="snapshot"):
    """First event: everything.  `worker_tokens` by worker id: only the orchestrator may read this stream."""

    capabilities: Capabilities
    workers: list[WorkerRecord]
    worker_tokens: dict[str, str]
    downloads: list[DownloadRecord]
    models: list[ModelRecord] = []


class WorkerChanged(msgspec.Struct, frozen=True, kw_only=True, tag="worker"):
    """A worker is new or changed; a final state is its last event."""

    worker: WorkerRecord
    worker_token: str


class DownloadChanged(msgspec.Struct, frozen=True, kw_only=True, tag="download"):
    """A download is new or changed."""

    download: DownloadRecord


class ModelsChanged(msgspec.Struct, frozen=True, kw_only=True, tag="models"):
    """The catalog is another one now: all of it.  That a model was used is no change."""

    models: list[ModelRecord]


class AgentBeat(msgspec.Struct, frozen=True, kw_only=True, tag="beat"):
    """Once a second: the agent lives; what it has free now."""

    ram_free_mb: int
    disk_free_mb: int
    unix: float
    #: Free memory of each device, by its id.
    device_free_mb: dict[str, int] = {}
    #: Memory promised to workers that still load, by device; "cpu" is the host's.  Not free any more.
    promised_mb: dict[str, int] = {}


AgentEvent: TypeAlias = AgentSnapshot | WorkerChanged | DownloadChanged | ModelsChanged | AgentBeat


# --- POST /v1/nodes, /v1/nodes/{name}:upgrade, … of the orchestrator --------------------------


#: The step after which a machine that is being added stays, whatever happens.
JOINED: Final = "joined"


class NodeStep(msgspec.Struct, frozen=True, kw_only=True, tag="step", omit_defaults=True):
    """One step of adding, upgrading or removing a node: a sentence, told when it begins or has ended."""

    #: key, connect, host_key, login, command, system, python, disk, gpu, clock, latency, package, install,
    #: agent, health, joined, engine, drain, stop, clean, rollback…
    step: str
    message: str
    #: Who tells it: the node's name, or "orchestrator".
    actor: str = "orchestrator"
    #: 0..1 where it takes long.
    fraction: float | None = None


class NodeDone(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """Last event of a stream that succeeded."""

    message: str
    #: None after a removal.
    node: NodeRecord | None = None


NodeProgress: TypeAlias = NodeStep | NodeDone


# --- GET /v1/tasks/{id}/events of the orchestrator --------------------------------------------


class TaskStep(msgspec.Struct, frozen=True, kw_only=True):
    """What every task event tells besides its own fields: one sentence with an actor."""

    #: orchestrator, agent, worker…; empty for tokens.
    actor: str = ""
    message: str = ""


class TaskAccepted(TaskStep, frozen=True, kw_only=True, tag="accepted"):
    """The request is valid and has an id."""

    task_id: str


class TaskQueued(TaskStep, frozen=True, kw_only=True, tag="queued"):
    """The task waits for a slot as number `position`."""

    position: int


class TaskPlacing(TaskStep, frozen=True, kw_only=True, tag="placing"):
    """A node or a worker is chosen; `message` says why."""

    node: str | None = None
    worker_id: str | None = None


class TaskDownloading(TaskStep, frozen=True, kw_only=True, tag="downloading"):
    """The model is being fetched."""

    bytes_downloaded: int
    bytes_total: int | None
    speed_mbps: float = 0.0
    eta_s: float | None = None


class TaskLoading(TaskStep, frozen=True, kw_only=True, tag="loading"):
    """The model is being loaded by a worker."""

    fraction: float
    stage: str = "loading"


class TaskToken(TaskStep, frozen=True, kw_only=True, tag="token", omit_defaults=True):
    """One token of the answer."""

    token: str
    id: int
    index: int


class TaskUsage(TaskStep, frozen=True, kw_only=True, tag="usage"):
    """What was computed."""

    prompt_tokens: int
    completion_tokens: int
    duration_ms: int


class TaskEnd(TaskStep, frozen=True, kw_only=True, tag="end"):
    """The answer is whole."""

    finish_reason: str


class TaskFailed(TaskStep, frozen=True, kw_only=True, tag="error"):
    """The task failed; what came so far stays valid.  Sent as `event: error`, `data: {"error": {…}}`."""

    error: ErrorBody


TaskEvent: TypeAlias = (
    TaskAccepted
    | TaskQueued
    | TaskPlacing
    | TaskDownloading
    | TaskLoading
    | TaskToken
    | TaskUsage
    | TaskEnd
    | TaskFailed
)


# --- GET /v1/events of the orchestrator -------------------------------------------------------


class PoolSnapshot(msgspec.Struct, frozen=True, kw_only=True, tag="snapshot"):
    """First event: everything that is so now."""

    nodes: list[NodeRecord]
    workers: list[WorkerRecord]
    downloads: list[DownloadRecord]
    #: Those that are not finished.
    tasks: list[TaskRecord]


class NodeChanged(msgspec.Struct, frozen=True, kw_only=True, tag="node"):
    """A node is new, or its state or what it has changed."""

    node: NodeRecord


class PoolWorkerChanged(msgspec.Struct, frozen=True, kw_only=True, tag="worker"):
    """A worker is new or changed; a final state is its last event."""

    worker: WorkerRecord


class TaskChanged(msgspec.Struct, frozen=True, kw_only=True, tag="task"):
    """A task is new or its state changed (its text is not told here)."""

    task: TaskRecord


PoolEvent: TypeAlias = PoolSnapshot | NodeChanged | PoolWorkerChanged | DownloadChanged | TaskChanged
