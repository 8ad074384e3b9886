"""Which shapes do the lists and look-ups of agent and orchestrator answer with?

The same from agent, orchestrator and `--json`.  Contracts only grow: new fields have defaults.
"""

from typing import Final

import msgspec

from arriero.contracts.errors import ErrorBody
from arriero.contracts.names import FileName, ModelId, Sha256, SizeBytes
from arriero.contracts.states import DownloadState, NodeState, TaskState, WorkerState


class WorkerExit(msgspec.Struct, frozen=True, kw_only=True):
    """How a worker's process ended."""

    #: As a shell would say it: 128 + signal for a killed one; None if nobody saw it (after an adoption).
    exit_code: int | None = None
    #: Name of the signal that killed it, such as SIGKILL.
    signal: str | None = None
    #: An error code of the registry: OUT_OF_MEMORY, WORKER_START_FAILED, WORKER_LOST, LOADING_TIMEOUT…
    code: str | None = None
    message: str = ""
    log_tail: list[str] = []


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One worker.  `url` is loopback in the agent's answers, a proxy route in the orchestrator's."""

    worker_id: str
    node: str
    url: str
    model_ref: str
    backend: str
    device: str
    state: WorkerState
    slots_total: int
    slots_available: int
    pid: int
    started_unix: float
    last_activity_unix: float
    data_address: str | None = None
    engine: str = "llamacpp"
    #: Context of one slot in tokens; 0 until the model is loaded.
    context_tokens: int = 0
    #: Resident memory of worker and engine in MiB, as last seen.
    memory_mb: int = 0
    #: Requests waiting in the worker's own queue.
    queued: int = 0
    #: Fraction of the model that is loaded, 0..1.
    load_fraction: float = 0.0
    is_embedding: bool = False
    #: How fast it generates one answer, as its requests showed; 0: not measured yet.
    tokens_per_s: float = 0.0
    exit: WorkerExit | None = None


class DeviceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One device that can compute: the CPU, a CUDA card, a Metal GPU."""

    #: "cpu", "cuda:0", "metal:0"
    id: str
    backend: str
    name: str
    memory_mb: int
    memory_free_mb: int
    driver: str = ""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine has, as its agent answers `GET /v1/capabilities`."""

    name: str
    version: str
    api_version: int
    backends: list[str]
    devices: list[DeviceRecord]
    engines: dict[str, str]
    ram_mb: int
    #: Available memory: the smaller of the host's and the memory cgroup's.
    ram_free_mb: int
    disk_free_mb: int
    cpu_cores: int
    os: str
    arch: str
    #: What is wrong with the machine that a person should know: sentences with what to do.
    advice: list[str] = []
    #: The same for all agents that share a machine's memory; empty where that is not known.
    machine_id: str = ""


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One machine of the pool."""

    name: str
    status: NodeState
    version: str
    backends: list[str]
    devices: list[DeviceRecord]
    ram_mb: int
    ram_free_mb: int
    disk_free_mb: int
    labels: dict[str, str] = {}
    last_connected_unix: float = 0.0
    #: False for the machine of the orchestrator itself, whose agent is found and not dialled.
    is_remote: bool = False
    #: How it is reached, as `nodes add` was told: "user@host:port"; empty for this machine.
    ssh: str = ""
    user: str = ""
    host: str = ""
    port: int | None = None
    #: Path of the private key on the orchestrator's machine; empty: those OpenSSH would use.
    key_path: str = ""
    #: SHA-256 of the host key that is accepted besides those of known_hosts.
    host_key: str = ""
    install_path: str = ""
    #: Hardware address that wakes the machine, empty if it cannot be woken.
    mac: str = ""
    engines: dict[str, str] = {}
    os: str = ""
    arch: str = ""
    cpu_cores: int = 0
    #: Whether a person asked that it takes no new work; kept over restarts.
    is_drained: bool = False
    #: Fencing number of the lease that the orchestrator holds on it; rises with each new connection.
    lease: int = 0
    #: Why it does not answer, while it does not.
    error: ErrorBody | None = None
    advice: list[str] = []
    #: Time of one round trip over the connection, 0 where none was measured.
    latency_ms: float = 0.0
    #: How many are in its catalog, as its agent told last.
    models: int = 0
    machine_id: str = ""
    #: The other nodes that are the same machine.
    same_machine_as: list[str] = []


class DownloadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One download, running or ended."""

    download_id: str
    model_ref: str
    state: DownloadState
    bytes_downloaded: int
    #: None where the source does not tell.
    bytes_total: int | None
    speed_mbps: float = 0.0
    eta_s: float | None = None
    attempt: int = 1
    started_unix: float = 0.0
    error: ErrorBody | None = None
    #: The node that fetches it; empty in the agent's own answers.
    node: str = ""
    #: How many asked for it and did not leave again; the last one to leave cancels it.
    holders: int = 0
    #: Where the bytes come from: "hub", "https", "node NAME"…; empty until it is known.
    source: str = ""
    #: Why the last attempt ended and when the next one begins, while one is waited for.
    retry_reason: str | None = None
    retry_in_s: float | None = None
    #: A node that it came from was lost: the way to it, or to others, is to be told (`PUT …/peers`).
    wants_peers: bool = False


class ModelFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a model, as it was when it was verified."""

    name: FileName
    size_bytes: SizeBytes
    sha256: Sha256
    #: When the file was last changed as it was hashed: tells a changed external file.
    modified_ns: int = 0


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One verified model of a machine's catalog."""

    #: Also the name of its folder.
    model_id: ModelId
    model_ref: str
    provider: str
    #: Names of its files within its folder, the one to load first.
    files: list[FileName]
    size_bytes: SizeBytes
    sha256: Sha256
    added_unix: float
    last_used_unix: float = 0.0
    times_used: int = 0
    #: True where the file lies outside our folder (file:, demo) and is never removed by us.
    is_external: bool = False
    architecture: str = ""
    quantisation: str = ""
    context_length: int = 0
    block_count: int = 0
    parameters: int = 0
    is_embedding: bool = False
    has_chat_template: bool = False
    #: `gguf` or `safetensors`.
    format: str = "gguf"
    #: The commit of the Hub that its files are of.
    revision: str = ""
    #: Where it came from, for people: "hub", "node attic", "ollama llama3.2:3b", "import"…
    source: str = ""
    #: Name of the file among `files` that is a multimodal projector, empty if there is none.
    projector: str = ""
    #: Never pruned.
    is_pinned: bool = False
    head_count: int = 0
    head_count_kv: int = 0
    embedding_length: int = 0
    vocabulary_size: int = 0
    #: `files` with their sizes and checksums; empty in lists of nodes that do not tell.
    parts: list[ModelFile] = []


class DeviceEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a model would need on one device, and whether it would fit there now."""

    device: str
    backend: str
    host_mb: int
    device_mb: int
    fits: bool
    #: Error code and sentence where it does not fit.
    code: str | None = None
    why: str = ""


class ModelEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/models/{id}/estimate` of an agent: by the engine's dry run, no weights read."""

    model_id: str
    model_ref: str
    node: str
    #: Context of one slot that was reckoned with, in tokens.
    context_tokens: int
    slots: int
    devices: list[DeviceEstimate]


class FoundModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that another program keeps on this machine."""

    #: "hf-cache", "ollama", "lm-studio" or "llama.cpp".
    source: str
    #: What that program calls it.
    name: str
    model_ref: str
    size_bytes: int
    files: list[str]
    #: "new", "known" (in the catalog already), "entered" (by this scan) or "refused".
    status: str = "new"
    #: Error code and sentence where it is refused.
    code: str | None = None
    why: str = ""


class FoundList(msgspec.Struct, frozen=True):
    """`POST /v1/models/scan` of an agent."""

    found: list[FoundModel]


class PruneResult(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/models/prune` of an agent."""

    removed: list[ModelRecord]
    freed_bytes: int
    #: What was asked for; more than `freed_bytes` where nothing else may go.
    wanted_bytes: int
    is_dry_run: bool = False


class ImportRefusal(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was not imported, and why."""

    #: Where it lay, within what was given.
    name: str
    code: str
    why: str


class ImportResult(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/models/import` of an agent: what became of each model that was found."""

    imported: list[ModelRecord]
    #: Those that were here before, with the same content.
    known: list[ModelRecord] = []
    refused: list[ImportRefusal] = []


class RestoreResult(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/models/restore` of an agent: what became of the entries of a backup."""

    restored: list[ModelRecord]
    #: A sentence for each entry that was left out.
    left_out: list[str]


class EngineBuild(msgspec.Struct, frozen=True, kw_only=True):
    """A build of the engine that is on a machine."""

    #: "cpu", "metal", "cu128"…
    name: str
    version: str
    #: Whether it belongs to arriero's own environment, and was not installed beside it.
    is_own: bool = False
    #: What it computes with here.
    backends: list[str] = []
    #: The devices as it calls them.
    devices: list[str] = []
    #: Checksum of the wheel it was installed from, where that is known.
    sha256: str = ""
    installed_unix: float = 0.0
    #: Why it cannot be used; empty: it can.
    problem: str = ""


class EngineList(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/engines` of an agent: the builds there are, and the one that suits the machine."""

    node: str
    builds: list[EngineBuild]
    wanted: str
    #: Why that one, in a sentence.
    why: str
    #: Branch of the driver that it needs at least; 0: none.
    driver_least: int = 0
    advice: list[str] = []


class UploadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`PUT /v1/engines/uploads/{name}` of an agent: how much of the file is there now."""

    name: str
    size_bytes: int


class TaskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One accepted inference."""

    task_id: str
    state: TaskState
    model: str
    created_unix: float
    finished_unix: float | None = None
    worker_id: str | None = None
    node: str | None = None
    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None
    error: ErrorBody | None = None


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`run/orchestrator.json` and `run/agent.json` (mode 0600): a daemon that answers."""

    pid: int
    url: str
    version: str
    started: float
    #: Demanded from every request where not empty.
    token: str = ""
    #: Start time of the pid in clock ticks since boot, and the boot's id: a pid alone proves nothing.
    pid_start_ticks: int = 0
    boot_id: str = ""
    log_path: str = ""


class WorkerRunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`run/workers/ID.json` (mode 0600): all that a next agent needs to adopt a worker."""

    record: WorkerRecord
    token: str
    pid_start_ticks: int
    boot_id: str
    log_path: str
    #: Directory of the memory cgroup the process was started in, and its oom_kill count then.
    cgroup_path: str = ""
    oom_kills_at_start: int = 0
    #: What preflight reckoned with: promised to the worker until it is loaded.
    estimated_host_mb: int = 0
    estimated_device_mb: int = 0
    #: The holder of the node's lease that it goes with; empty: it stays.
    bound_to: str = ""


class WorkerList(msgspec.Struct, frozen=True):
    """`GET /v1/workers`."""

    workers: list[WorkerRecord]


class NodeList(msgspec.Struct, frozen=True):
    """`GET /v1/nodes`."""

    nodes: list[NodeRecord]


#: Of `GET /v1/nodes/{name}/logs`: earlier lines than those that were sent are left out.
CUT_HEADER: Final = "x-arriero-cut"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at on a machine."""

    #: command, system, python, disk, gpu, clock, latency; environment, agent, keeper; pool, engine, memory.
    name: str
    is_ok: bool
    message: str
    #: Error code of what is wrong; None where all is well.
    code: str | None = None
    #: What to do; empty where all is well, and where the message says it.
    advice: str = ""


class FindingList(msgspec.Struct, frozen=True):
    """`GET /v1/nodes/{name}/doctor` of the orchestrator."""

    findings: list[Finding]


class DownloadList(msgspec.Struct, frozen=True):
    """`GET /v1/downloads`."""

    downloads: list[DownloadRecord]


class ModelList(msgspec.Struct, frozen=True):
    """`GET /v1/models` of an agent."""

    models: list[ModelRecord]
    #: What was found and put right when the agent started: sentences.
    notices: list[str] = []


class WorkerHealth(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/health` of a worker."""

    status: str
    worker_id: str
    model_ref: str
    state: WorkerState
    slots_total: int
    slots_busy: int
    queued: int
    context_tokens: int = 0
    memory_mb: int = 0
    load_fraction: float = 0.0
    #: Seconds since the last request ended; 0 while one runs.
    idle_s: float = 0.0
    #: How fast it generates one answer, as its requests showed; 0: not measured yet.
    tokens_per_s: float = 0.0
    is_embedding: bool = False
    engine_pid: int | None = None
    exit: WorkerExit | None = None


class WorkerReady(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/ready` of a worker."""

    ready: bool
    state: WorkerState
    progress_url: str
    model_loaded: bool


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/health` of an agent, `GET /health` of the orchestrator."""

    status: str
    version: str
    api_version: int
    name: str = ""
    pid: int = 0
