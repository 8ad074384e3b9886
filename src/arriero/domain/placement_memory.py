"""How much memory will a worker take for a model?  A guess from the catalog, before anything runs.

Which node is worth asking is decided with it; the agent's preflight, which asks the engine, stays
the exact judge.
"""

from dataclasses import dataclass
from typing import Final

from arriero.contracts.records import ModelRecord

MIB: Final = 1024 * 1024
#: As the settings' defaults: slots of a worker, and the context of a slot where a model's is larger.
SLOTS: Final = 4
CONTEXT_MAX_TOKENS: Final = 8192
#: With less context than this an agent refuses a model (`agent/preflight.py`).
CONTEXT_LEAST_TOKENS: Final = 512
#: The interpreter, the engine's process and its compute buffers: the same guess as the engine's own
#: where it tells nothing (`engines/llamacpp_estimate.py`).
OVERHEAD_MB: Final = 276
#: Keys and values are kept as 16-bit floats.
_BYTES_PER_VALUE: Final = 2


@dataclass(frozen=True, slots=True)
class Needed:
    """What a worker will take, in MiB."""

    #: With the context that it would be given on an empty machine.
    full_mb: int
    #: With the least context that it would be started with.
    least_mb: int


def larger(some: Needed | None, more: Needed | None) -> Needed | None:
    """Return what suffices for both; None: of neither is anything known."""
    if some is None or more is None:
        return some or more
    return Needed(max(some.full_mb, more.full_mb), max(some.least_mb, more.least_mb))


def needed(model: ModelRecord, *, slots: int = SLOTS, context_max: int = CONTEXT_MAX_TOKENS) -> Needed:
    """Return what a worker with `slots` would take."""
    own = model.context_length or context_max
    return Needed(
        full_mb=memory_mb(model, slots=slots, context_tokens=min(own, context_max)),
        least_mb=memory_mb(model, slots=slots, context_tokens=min(own, context_max, CONTEXT_LEAST_TOKENS)),
    )


def memory_mb(model: ModelRecord, *, slots: int, context_tokens: int) -> int:
    """Return weights + cache of keys and values, and what a process takes, in MiB.

    The cache holds, for each token of each slot and each block, one key and one value of every
    key-value head: 2 × 2 bytes × blocks × heads_kv × (embedding / heads), as llama.cpp allocates it
    (`llama_kv_cache`: `n_embd_k_gqa` = `n_embd_head_k` × `n_head_kv`, type f16; the arithmetic of
    "grouped-query attention", Ainslie et al. 2023, section 2.2).  Models of which the catalog does not
    know the shape count without a cache, and so do those that keep less (sliding windows): with
    too much.
    """
    cache_bytes = 0
    if model.head_count > 0:
        width = model.embedding_length * (model.head_count_kv or model.head_count) // model.head_count
        cache_bytes = 2 * _BYTES_PER_VALUE * model.block_count * width * context_tokens * slots
    overhead_mb = OVERHEAD_MB if cache_bytes else 0
    return -(-(model.size_bytes + cache_bytes) // MIB) + overhead_mb
