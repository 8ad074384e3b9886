"""Which bodies do the routes take?  Unknown fields are refused on our own routes, kept on OpenAI's."""

import re
from typing import Annotated, Any, Final

import msgspec

from arriero.contracts.names import Sha256

PROMPT_CHARS_MAX = 8_000_000
PEERS_MAX = 64


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen; None leaves the engine's default."""

    #: None: until the context is full.
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repeat_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    #: How many alternatives to tell for each token; None: no logprobs.
    logprobs: int | None = None
    #: Do not stop at the model's end token.
    ignore_eos: bool = False


Temperature = Annotated[float, msgspec.Meta(ge=0.0, le=2.0)]
TokensMax = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
TimeoutS = Annotated[float, msgspec.Meta(gt=0.0, le=86_400.0)]
StopWord = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class InferenceBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/inference` and `/v1/inference/stream` of a worker.

    Exactly one of `prompt`, `prompt_ids` and `messages`; the route refuses others.
    """

    prompt: Annotated[str, msgspec.Meta(max_length=PROMPT_CHARS_MAX)] | None = None
    prompt_ids: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=1)] | None = None
    messages: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)] | None = None
    max_tokens: TokensMax | None = None
    temperature: Temperature | None = None
    seed: Annotated[int, msgspec.Meta(ge=-1, le=4_294_967_295)] | None = None
    stop: Annotated[list[StopWord], msgspec.Meta(max_length=16)] | StopWord | None = None
    top_p: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    ignore_eos: bool = False
    timeout: TimeoutS | None = None
    #: False: ALL_SLOTS_BUSY instead of waiting.
    queue: bool = True


LABEL: Final = re.compile(r"\A[A-Za-z0-9][A-Za-z0-9._/-]{0,62}\Z")
LABEL_VALUE: Final = re.compile(r"\A[A-Za-z0-9._/-]{0,63}\Z")
Label = Annotated[str, msgspec.Meta(pattern=LABEL.pattern)]
LabelValue = Annotated[str, msgspec.Meta(pattern=LABEL_VALUE.pattern)]
Labels = Annotated[dict[Label, LabelValue], msgspec.Meta(max_length=32)]


class Place(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a request may be computed: the object `arriero` in the body of an OpenAI route."""

    node: str | None = None
    backend: str | None = None
    device: str | None = None
    #: Only on nodes that have all of these.
    labels: Labels = {}


class TaskBody(InferenceBody, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/tasks` of the orchestrator; without `model` it takes the setting `default_model`."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=2048)] | None = None
    node: str | None = None
    backend: str | None = None
    device: str | None = None
    #: Only on nodes that have all of these.
    labels: Labels = {}


class SpawnBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`POST /v1/workers` of an agent."""

    model_ref: Annotated[str, msgspec.Meta(min_length=1, max_length=2048)]
    backend: str | None = None
    device: str | None = None
    slots: Annotated[int, msgspec.Meta(ge=1, le=64)] | None = None
    context_tokens: Annotated[int, msgspec.Meta(ge=64, le=1_048_576)] | None = None
    #: `llamacpp`, or `fake` with its knobs in `options`.
    engine: str = "llamacpp"
    options: dict[str, Any] = {}
    #: The worker goes with the orchestrator that asks (by its `X-Arriero-Fence`): when that one has let go
    #: of the node, was silent for long, or another one holds the node.
    bound: bool = False


class SpawnOnNode(SpawnBody, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """`POST /v1/workers` of the orchestrator: the agent's body, and where."""

    node: str | None = None
    #: Only on nodes that have all of these.
    labels: Labels = {}


class PeerSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another agent that may have a model.  The token is secret, and reads its models alone (`peers`)."""

    url: Annotated[str, msgspec.Meta(min_length=1, max_length=2048)]
    token: str = ""
    node: str = ""


class DownloadBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/models/download` of an agent, `POST /v1/downloads` of the orchestrator."""

    model_ref: Annotated[str, msgspec.Meta(min_length=1, max_length=2048)]
    node: str | None = None
    #: Agents that are asked for the model before the internet is.
    peers: Annotated[list[PeerSource], msgspec.Meta(max_length=PEERS_MAX)] = []
    #: What was fetched is removed if the download fails or is cancelled.
    clean: bool = False


class PeersBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`PUT /v1/downloads/{id}/peers` of an agent: where other agents are by now, for one that runs."""

    peers: Annotated[list[PeerSource], msgspec.Meta(max_length=PEERS_MAX)]


class ImportBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/models/import` of an agent: a file or a folder on its machine, copied in and verified."""

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    #: What the model is to be called; by default as its card says, else `file://…` of where it lay.
    model_ref: Annotated[str, msgspec.Meta(min_length=1, max_length=2048)] | None = None


class ScanBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/models/scan` of an agent."""

    #: Only list what is there; nothing is hashed or entered.
    dry_run: bool = False


class PruneBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/models/prune` of an agent: so much room is to be made."""

    free_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**60)]
    dry_run: bool = False


class PinBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`PUT /v1/models/{id}/pin` of an agent."""

    is_pinned: bool


class EngineInstallBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/engines/install` of an agent: a build of the engine is to be put beside the one there is."""

    #: None: the build that suits the machine.
    build: Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9.-]{0,31}\Z")] | None = None
    #: Name of a wheel that was uploaded before; None: as the settings say, else from the index.
    wheel: Annotated[str, msgspec.Meta(min_length=5, max_length=255)] | None = None
    #: Instead of the setting `engine_index_url`.
    index_url: Annotated[str, msgspec.Meta(min_length=1, max_length=2048)] | None = None
    #: What the wheel must hash to.
    sha256: Sha256 | None = None


NodeName = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9-]{0,62}\Z")]
Mac = Annotated[str, msgspec.Meta(pattern=r"\A([0-9a-fA-F]{2}[:-]){5}[0-9a-fA-F]{2}\Z")]


class NodeAddBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/nodes` of the orchestrator: a machine is to join; answered as an event stream."""

    name: NodeName
    #: host, user@host, user@host:port, ssh://user@[::1]:2222.
    ssh: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    key_path: str | None = None
    #: Fingerprint of a host key that known_hosts does not have, accepted by a person.
    accept_host_key: str | None = None
    #: Folder on that machine, absolute or below the user's home; None: the default.
    install_path: str | None = None
    labels: Labels = {}
    mac: Mac | None = None
    #: Packages are carried over even where the machine has an index of its own.
    carry: bool = False


class NodeUpdateBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`PATCH /v1/nodes/{name}` of the orchestrator; what is None stays as it is."""

    ssh: Annotated[str, msgspec.Meta(min_length=1, max_length=512)] | None = None
    #: Empty: the keys that OpenSSH would use.
    key_path: str | None = None
    accept_host_key: str | None = None
    #: These are set; an empty value takes a label away.
    labels: Labels = {}
    #: Empty: it cannot be woken any more.
    mac: Annotated[str, msgspec.Meta(pattern=r"\A(([0-9a-fA-F]{2}[:-]){5}[0-9a-fA-F]{2})?\Z")] | None = None

    @property
    def connects_anew(self) -> bool:
        """Whether it changes how the machine is reached."""
        return any(each is not None for each in (self.ssh, self.key_path, self.accept_host_key))


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent hands a worker on stdin, one JSON line.  The tokens are secret."""

    worker_id: str
    node: str
    model_ref: str
    model_path: str
    #: Bearer token that every request to the worker must carry.
    token: str
    #: Where the ready callback goes, and the token it carries; empty: no callback (a worker by hand).
    callback_url: str = ""
    callback_token: str = ""
    port_base: int = 8001
    engine: str = "llamacpp"
    engine_options: dict[str, Any] = {}
    backend: str = "cpu"
    device: str = "cpu"
    slots: int = 4
    queue_max: int = 64
    context_tokens: int | None = None
    #: Where the engine's socket goes: a short private directory.
    run_dir: str = ""
    #: After so long without its agent the worker drains and ends; 0: at once.
    lease_s: float = 600.0
    #: After so long without having delivered its ready callback the worker gives up.
    ready_timeout_s: float = 30.0
    stall_s: float = 60.0
    loading_stall_s: float = 60.0
    stop_grace_s: float = 30.0
    is_embedding: bool = False
    threads: int = 0
    #: Fencing number of the newest lease on the node when the worker was started; see `FenceBody`.
    fence: int = 0
    #: Folder of the engine's build to use; empty: that of arriero's own environment.
    engine_folder: str = ""


class EndBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/admin/drain` and `/v1/admin/shutdown` of a worker; an empty body is `{}`."""

    #: Running requests are cancelled after so long; None: never when draining, `stop_grace_s` when
    #: shutting down.
    grace_s: Annotated[float, msgspec.Meta(ge=0.0, le=86_400.0)] | None = None


class ShutdownBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/admin/shutdown` of an agent; an empty body is `{}`."""

    #: False: its workers go on, and the next agent adopts them.
    workers: bool = True


class FenceBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/admin/fence` of a worker: requests under a lease older than this number are over."""

    number: Annotated[int, msgspec.Meta(ge=0)]


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/tokenize` of a worker: a `text`, or `messages` to put through the chat template."""

    text: Annotated[str, msgspec.Meta(max_length=PROMPT_CHARS_MAX)] | None = None
    messages: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)] | None = None
    add_special: bool = True


class TokenizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The token ids, and the text they stand for (the rendered prompt where messages were given)."""

    token_ids: list[int]
    text: str


class ReadyCallback(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/workers/ready` of the agent: the worker's HTTP server is up (state `loading`)."""

    worker_id: str
    url: str
    model_ref: str
    backend: str
    device: str
