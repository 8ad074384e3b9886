"""What does an engine promise to the worker that owns it?

Every adapter passes the conformance suite in `arriero.testing.engine_suite`.  An ability that an
engine lacks is declared in `Abilities`, never discovered by a failing request.

Order of calls: `load` once, read to its end (`LoadReady`), then any number of concurrent
`stream`, `embed`, `tokenize`… calls, then `unload`.  An engine that ended by itself shows it in
`exited()`; it is never loaded twice.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from arriero.contracts.requests import Sampling


@dataclass(frozen=True, slots=True)
class Abilities:
    """What this engine can do; a worker refuses the rest with INVALID_REQUEST."""

    chat: bool = True
    embeddings: bool = True
    token_ids: bool = True
    grammar: bool = False


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model's file says of itself, read without the engine."""

    architecture: str
    block_count: int
    context_length: int
    vocabulary_size: int
    quantisation: str
    parameters: int
    file_bytes: int
    has_chat_template: bool
    is_embedding: bool
    name: str = ""
    #: `gguf` or `safetensors`.
    format: str = "gguf"
    #: Attention heads of a layer, and those of keys and values (the most any layer has).
    head_count: int = 0
    head_count_kv: int = 0
    embedding_length: int = 0


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """How a model is to be loaded."""

    model_path: Path
    slots: int = 4
    #: Context of one slot in tokens; None: the model's own, up to 8192.
    context_tokens: int | None = None
    backend: str = "cpu"
    #: The device's id as `runtime.devices` gives it ("cpu", "cuda:0", "metal:0").
    device: str = "cpu"
    #: Where the engine may put its socket: short (the path limit is 107 bytes) and private (0700).
    run_dir: Path = Path("/nonexistent")
    #: 0: as many as the machine has physical cores.
    threads: int = 0
    #: Loading that does not advance for so long has failed.
    loading_stall_s: float = 60.0
    #: Folder of the engine's build to use; None: that of arriero's own environment.
    engine_folder: Path | None = None
    #: Knobs of one kind of engine (the fake one's script); unknown keys are refused.
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What loading will take, in MiB."""

    host_mb: int
    device_mb: int
    #: Context of one slot that was reckoned with, in tokens.
    context_tokens: int


# --- What `load` tells -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """A step of loading; `fraction` never falls and stays within 0..1."""

    fraction: float
    layers_loaded: int
    layers_total: int
    memory_mb: int
    stage: str = "loading"


@dataclass(frozen=True, slots=True)
class LoadReady:
    """The last event of a load that succeeded."""

    slots: int
    #: Context of one slot in tokens, as the engine really made it.
    context_tokens: int
    memory_mb: int
    #: Pid of the process that computes, None where the engine has none of its own.
    pid: int | None = None


LoadEvent: TypeAlias = LoadProgress | LoadReady


# --- What `stream` tells ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One generation.  Exactly one of `prompt`, `prompt_ids` and `messages` is given."""

    request_id: str
    prompt: str | None = None
    prompt_ids: Sequence[int] | None = None
    messages: Sequence[dict[str, Any]] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    #: OpenAI's `tools`, `tool_choice`, `response_format`… as the client gave them (chat only).
    chat_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PromptProgress:
    """So many of the prompt's tokens are computed (`cached` of them were not computed anew)."""

    processed: int
    total: int
    cached: int = 0


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text, and the ids of the tokens it came from where the engine tells them.

    A token that holds only a part of a character comes with empty text; the text follows with the
    token that completes it, so `token_ids` is exact and texts join to the whole answer.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    #: OpenAI's logprobs entries for these tokens, where asked for.
    logprobs: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Text a model thinks aloud, apart from its answer (OpenAI-compatible `reasoning_content`)."""

    text: str
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call, in OpenAI's streaming form."""

    index: int
    call_id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class StreamFinished:
    """The last event of a stream that succeeded.  `finish_reason`: stop, length or tool_calls."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    #: The stop string that ended it, if one did.
    stopping_word: str = ""


StreamEvent: TypeAlias = PromptProgress | TextDelta | ReasoningDelta | ToolCallDelta | StreamFinished


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine started."""

    slots_busy: int
    prompt_tokens: int
    completion_tokens: int
    memory_mb: int
    #: Tokens computed in all (prompt batches and generated ones), also for cancelled requests:
    #: what the cancel tests count.
    tokens_computed: int = 0


@dataclass(frozen=True, slots=True)
class EngineExit:
    """How an engine's process ended by itself."""

    exit_code: int | None
    signal: int | None
    #: The memory cgroup's oom_kill count rose over the engine's life.
    is_out_of_memory: bool
    log_tail: tuple[str, ...] = ()


class Engine(Protocol):
    """One model in one engine.  Raises `ArrieroError` for everything expected."""

    abilities: Abilities

    def load(self, spec: EngineSpec) -> AsyncGenerator[LoadEvent, None]:
        """Load the model, telling progress; ends after `LoadReady`.

        Raises WORKER_START_FAILED (details: `log_tail`) when the engine refuses or dies,
        OUT_OF_MEMORY when the kernel killed it for memory, LOADING_TIMEOUT after 60 s without
        progress.  Closing the iterator early stops the engine.
        """
        ...

    def stream(self, request: EngineRequest) -> AsyncGenerator[StreamEvent, None]:
        """Generate; ends after `StreamFinished`.  Closing the iterator cancels the computation.

        Raises CONTEXT_LENGTH_EXCEEDED or INVALID_REQUEST before the first event, WORKER_LOST or
        OUT_OF_MEMORY when the engine dies underneath.
        """
        ...

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return the token ids of `text`; special tokens written in it are recognised."""
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`."""
        ...

    async def count_tokens(self, text: str) -> int:
        """Return how many tokens `text` has."""
        ...

    async def apply_template(self, messages: Sequence[dict[str, Any]], options: dict[str, Any]) -> str:
        """Return the prompt that the model's chat template makes of `messages`."""
        ...

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        """Return a vector for each input (text or token ids), and the prompt tokens used in all."""
        ...

    async def stats(self) -> EngineStats:
        """Return the counts since start."""
        ...

    async def health(self) -> bool:
        """Return whether the engine answers now; waits 2 s at most."""
        ...

    def exited(self) -> EngineExit | None:
        """Return how the engine ended by itself, None while it lives or when we stopped it."""
        ...

    async def wait_exited(self) -> EngineExit:
        """Wait, without a limit, until the engine ends by itself; never returns after `unload`."""
        ...

    async def unload(self, grace_s: float) -> None:
        """Stop the engine: ask, wait `grace_s`, then kill.  Safe to call twice, and before load."""
        ...


class EngineKind(Protocol):
    """What can be asked of a kind of engine before there is one (the registry's row)."""

    name: str

    def probe(self) -> dict[str, str]:
        """Return versions and abilities of the installed engine.

        Raises BACKEND_UNAVAILABLE if it cannot be imported.
        """
        ...

    def inspect(self, path: Path) -> ModelFacts:
        """Read a model's header with bounds on everything.

        Raises MODEL_CORRUPTED (what is wrong, where) and INVALID_MODEL_PATH (no such file, no rights).
        """
        ...

    async def estimate(self, spec: EngineSpec) -> Estimate:
        """Return the memory that loading will take, without reading weights (under 2 s)."""
        ...

    def create(self) -> Engine:
        """Return a new engine that has loaded nothing."""
        ...
