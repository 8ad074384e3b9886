"""With which parameters is llama.cpp started for a specification?

Pure: `EngineSpec` and header in, the child's line and environment out.
"""

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.engines.base import EngineSpec
from arriero.engines.gguf import GgufHeader

CONTEXT_DEFAULT_MAX: Final = 8_192
#: One batch is what a cancelled prompt still costs; on a CPU more than 512 brings no speed.
BATCH_CPU: Final = 256
BATCH_GPU: Final = 512
#: An embedding model computes an input in one batch, so its batch bounds the input.
BATCH_EMBEDDING_MAX: Final = 8_192
ALL_LAYERS: Final = 9_999
#: llama.cpp takes a host name with this ending for a unix socket's path.
SOCKET_NAME: Final = "e.sock"
SOCKET_PATH_BYTES_MAX: Final = 107
#: llama.cpp's levels: 2 is warnings, 4 shows the memory table that the estimate reads.
VERBOSITY: Final = 2
VERBOSITY_ESTIMATE: Final = 4

_LOAD_MODES: Final = {
    # Read into memory: loading has steps, and what is told as memory is what is used.
    "none": "LLAMA_LOAD_MODE_NONE",
    "mmap": "LLAMA_LOAD_MODE_MMAP",
    "direct_io": "LLAMA_LOAD_MODE_DIRECT_IO",
}
#: By which variable each backend is shown one device of several.
_DEVICE_VARIABLES: Final = {
    "cuda": "CUDA_VISIBLE_DEVICES",
    "rocm": "HIP_VISIBLE_DEVICES",
    "vulkan": "GGML_VK_VISIBLE_DEVICES",
}
BACKENDS: Final = ("cpu", "cuda", "rocm", "vulkan", "metal")


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """What `EngineSpec.options` may hold for this engine; unknown keys are refused."""

    batch_tokens: int = 0
    cache_ram_mib: int = 0
    load_mode: str = "none"
    #: None: as the specification says.
    loading_stall_s: float | None = None


def options_of(spec: EngineSpec) -> LlamaOptions:
    """Return the knobs of a specification.  Raises INVALID_REQUEST for an unknown or wrong one."""
    known = sorted(field.name for field in fields(LlamaOptions))
    for key in spec.options:
        if key not in known:
            fail(
                ErrorCode.INVALID_REQUEST,
                f"the engine llamacpp has no option {key!r}; it has {', '.join(known)}",
                param=key,
            )
    try:
        options = msgspec.convert(spec.options, LlamaOptions)
    except msgspec.ValidationError as error:
        raise ArrieroError(ErrorCode.INVALID_REQUEST, f"an option of the engine llamacpp: {error}") from error
    if options.load_mode not in _LOAD_MODES:
        fail(ErrorCode.INVALID_REQUEST, f"load_mode is one of {', '.join(_LOAD_MODES)}", param="load_mode")
    if not 0 <= options.batch_tokens <= BATCH_EMBEDDING_MAX or not 0 <= options.cache_ram_mib <= 1 << 20:
        fail(ErrorCode.INVALID_REQUEST, "batch_tokens and cache_ram_mib are 0 or more")
    return options


def context_of(spec: EngineSpec, header: GgufHeader) -> int:
    """Return the context of one slot that is asked for: the model's own up to 8192 by default."""
    if spec.context_tokens is not None:
        return spec.context_tokens
    return min(header.facts.context_length, CONTEXT_DEFAULT_MAX)


def batch_of(spec: EngineSpec, header: GgufHeader, options: LlamaOptions) -> int:
    """Return how many tokens are computed at once."""
    if options.batch_tokens:
        return options.batch_tokens
    batch = BATCH_CPU if spec.backend == "cpu" else BATCH_GPU
    if header.facts.is_embedding:
        return max(batch, min(context_of(spec, header), BATCH_EMBEDDING_MAX))
    return batch


def environment_of(spec: EngineSpec) -> dict[str, str]:
    """Return what is added to the child's environment."""
    environment = {
        # Any value makes llama.cpp tell its loading on stdout and end with stdin.
        "LLAMA_SERVER_ROUTER_PORT": "1",
        # Otherwise a crash starts a debugger on itself, where there is one.
        "GGML_NO_BACKTRACE": "1",
    }
    index = spec.device.partition(":")[2]
    if spec.backend == "cpu":
        environment |= dict.fromkeys(_DEVICE_VARIABLES.values(), "-1")
    elif index and spec.backend in _DEVICE_VARIABLES:
        environment[_DEVICE_VARIABLES[spec.backend]] = index
        if spec.backend == "cuda":
            # The order in which NVML, and so our devices' ids, number them.
            environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return environment


def line_of(
    spec: EngineSpec, header: GgufHeader, socket_path: Path, *, threads: int, is_estimate: bool = False
) -> bytes:
    """Return the line that the child reads from its stdin.

    Raises BACKEND_UNAVAILABLE for a backend that llama.cpp does not have, STATE_DIR_UNUSABLE if
    the socket's path is too long.
    """
    if spec.backend not in BACKENDS:
        fail(
            ErrorCode.BACKEND_UNAVAILABLE,
            f"llama.cpp has no backend {spec.backend!r}; it has {', '.join(BACKENDS)}",
            backend=spec.backend,
        )
    length = len(os.fsencode(socket_path))
    if length > SOCKET_PATH_BYTES_MAX:
        fail(
            ErrorCode.STATE_DIR_UNUSABLE,
            f"the engine's socket has a path of {length} bytes, at most {SOCKET_PATH_BYTES_MAX} can be",
        )
    options = options_of(spec)
    is_cpu = spec.backend == "cpu"
    batch = batch_of(spec, header, options)
    params: dict[str, Any] = {
        "model.path": os.fspath(spec.model_path),
        "hostnames": [os.fspath(socket_path)],
        "model_alias": {"set": ["model"]},
        "n_parallel": spec.slots,
        "n_ctx": spec.slots * context_of(spec, header),
        "n_batch": batch,
        "n_ubatch": batch,
        "cpuparams.n_threads": threads,
        "cpuparams_batch.n_threads": threads,
        "n_gpu_layers": 0 if is_cpu else ALL_LAYERS,
        # Fitting would move layers to the CPU by itself; nothing does that here.
        "fit_params": is_estimate,
        "verbosity": VERBOSITY_ESTIMATE if is_estimate else VERBOSITY,
        "load_mode": {"enum": f"llama_load_mode.{_LOAD_MODES[options.load_mode]}"},
        "cache_ram_mib": options.cache_ram_mib,
        "cache_idle_slots": options.cache_ram_mib > 0,
        "ui": False,
        "cors_origins": "",
        "endpoint_metrics": True,
        "endpoint_slots": False,
        # Harmless to generation (same tokens, same speed), so that every model has vectors.
        "embedding": True,
        # One run of all weights, which reading them into memory has done already.
        "warmup": not is_cpu,
    }
    if header.facts.is_embedding:
        # With a cache for each slot, inputs of unequal length that are computed together are cut, and
        # a mean is taken of the last piece alone (seen: cosine 0.79 to the right vector).
        params["kv_unified"] = True
    else:
        # The only pooling that is right when an input is cut, so also the one without a length limit.
        params["pooling_type"] = {"enum": "llama_pooling_type.LLAMA_POOLING_TYPE_LAST"}
    folder = os.fspath(spec.engine_folder) if spec.engine_folder is not None else ""
    line = {"owner_pid": os.getpid(), "gpu": not is_cpu, "folder": folder, "params": params}
    # Surrogates (a path that is no UTF-8) go through JSON as escapes, and back.
    return json.dumps(line).encode() + b"\n"
