"""Which values, each well-formed, make the engine abort that reads them?

llama.cpp answers most nonsense with an error, and some with an assertion: its process is gone then.
What is listed here was found by giving it broken headers (`python -m tests.fuzz.engine`).  It
still aborts for tokens that occur twice, which would cost a table of the whole vocabulary to see.
"""

from arriero.engines.gguf_tables import Skipped, Tables, integer
from arriero.engines.gguf_window import shown

#: Its LLAMA_MAX_EXPERTS.
EXPERTS_MAX = 512
POOLING_MAX = 4
_ROPE_SCALINGS = frozenset({"none", "linear", "yarn", "longrope"})
_EPSILONS = ("layer_norm_rms_epsilon", "layer_norm_epsilon", "group_norm_epsilon")
_NO_TOKENIZERS = frozenset({"none", "no_vocab"})
#: It has no products of these types, and calls them all the same.
_NO_WEIGHTS = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})
#: The one tensor of weights that holds indices (which experts a token goes to).
_INDICES = ".ffn_gate_tid2eid.weight"


def reason(architecture: str, tables: Tables) -> str | None:
    """Return what the engine would abort on, None if nothing is seen."""
    return _experts(architecture, tables) or _numbers(architecture, tables) or _tensors(tables)


def _experts(architecture: str, tables: Tables) -> str | None:
    key, used_key = f"{architecture}.expert_count", f"{architecture}.expert_used_count"
    experts = integer(tables.values.get(key, 0))
    used = integer(tables.values.get(used_key, 0))
    if experts is None or used is None:
        return None  # Arrays and other types it refuses in words, or reads layer by layer.
    if not 0 <= experts <= EXPERTS_MAX:
        return f"{key} is {experts}, outside 0..{EXPERTS_MAX}"
    if not min(1, experts) <= used <= experts:
        return f"{used_key} is {used}, outside {min(1, experts)}..{experts}"
    return None


def _numbers(architecture: str, tables: Tables) -> str | None:
    for name in _EPSILONS:
        key = f"{architecture}.attention.{name}"
        value = tables.values.get(key, 0.0)
        if isinstance(value, float) and not value >= 0.0:  # Not a number is no number above 0, either.
            return f"{key} is {value}, less than 0"
    key = f"{architecture}.rope.scaling.type"
    scaling = tables.values.get(key, "none")
    if isinstance(scaling, str | Skipped) and scaling not in _ROPE_SCALINGS:
        return f"{key} is {shown(scaling)}, none of {', '.join(sorted(_ROPE_SCALINGS))}"
    if tables.values.get("tokenizer.ggml.model") in _NO_TOKENIZERS:
        return "it has no tokenizer (tokenizer.ggml.model), so no text can be given to it"
    key = f"{architecture}.pooling_type"
    pooling = integer(tables.values.get(key, 0))
    if pooling is not None and not 0 <= pooling <= POOLING_MAX:
        return f"{key} is {pooling}, outside 0..{POOLING_MAX}"
    return None


def _tensors(tables: Tables) -> str | None:
    for tensor in tables.tensors:
        if tensor.name.endswith(("_norm.weight", ".bias")) and tensor.type_name != "F32":
            return f"tensor {tensor.name} has the type {tensor.type_name}; norms and biases are F32"
        is_weight = tensor.name.endswith(".weight") and not tensor.name.endswith(_INDICES)
        if is_weight and tensor.type_name in _NO_WEIGHTS:
            return f"tensor {tensor.name} has the type {tensor.type_name}, which weights cannot have"
    return None
