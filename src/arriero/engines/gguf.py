"""What does a GGUF file say of itself, and can its header be believed?

A bounded reader: every count, length and nesting has a limit, long arrays are stepped over and
never built, so that neither a vocabulary of 150,000 tokens nor a hostile file costs a second or
10 MB.  The engine aborts on some broken files, so nothing reaches it unread.

Messages name the file, never its folder: they cross the network.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines import gguf_aborts, gguf_parts, gguf_tables
from arriero.engines.base import ModelFacts
from arriero.engines.gguf_tables import Skipped, Tables, Tensor, integer
from arriero.engines.gguf_types import (
    BLOCKS_MAX,
    CONTEXT_MAX,
    EMBEDDING_ARCHITECTURES,
    EMBEDDING_MAX,
    FILE_TYPES,
    PARAMETERS_MAX,
    TOKENS_KEY,
    VOCABULARY_MAX,
)
from arriero.engines.gguf_window import Budget, TakeToken, shown
from arriero.engines.model_file import shown_name

_ARCHITECTURE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_POOLING_NONE: Final = 0
#: What the architecture of a projector is called.
_PROJECTOR: Final = "clip"


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The facts, and what only the adapter of the engine needs."""

    facts: ModelFacts
    #: Key-value heads of all layers together, and the length of one head's key and value: what
    #: the cache is reckoned from where the engine gives no estimate.
    heads_kv_sum: int
    key_length: int
    value_length: int
    #: Kind of tokenizer: "gpt2" (byte-level), "llama" (SentencePiece), "bert"…
    tokenizer: str
    #: Where the tensors' bytes begin.
    data_offset: int
    #: Of the first part alone, where the model is split.
    tensor_count: int
    split_count: int

    @property
    def embedding_length(self) -> int:
        """Numbers of one embedded token."""
        return self.facts.embedding_length


def inspect(path: Path) -> ModelFacts:
    """Return the facts of the model in `path`; where it is split, `path` is its first part.

    The further parts are checked as well: the engine reads them.  Raises INVALID_MODEL_PATH (no
    such file, not a file, no rights) and MODEL_CORRUPTED (what is wrong, and where).
    """
    return read_header(path).facts


def read_header(path: Path, take_token: TakeToken | None = None) -> GgufHeader:
    """Read and check the header of the model in `path`; raises as `inspect` does.

    `take_token` is given each token of the vocabulary, its number and how the file writes it.
    """
    budget = Budget()
    with gguf_tables.opened(path, budget) as window:
        tables = gguf_tables.read(window, take_token)
    parts = gguf_parts.check(path, tables, budget)
    return _Model(shown_name(path), tables).header(parts)


def check_projector(path: Path) -> None:
    """Check the header of a multimodal projector, which lies beside a model and is no model itself.

    Raises as `inspect` does.
    """
    with gguf_tables.opened(path, Budget()) as window:
        tables = gguf_tables.read(window)
        kind = tables.values.get("general.type", "mmproj")
        if tables.values.get("general.architecture") != _PROJECTOR or kind != "mmproj":
            window.corrupted("is no multimodal projector (general.type, general.architecture)")


class _Model:
    """Makes facts of the two tables of a model."""

    def __init__(self, name: str, tables: Tables) -> None:
        self._name = name
        self._tables = tables
        self._values = tables.values
        architecture = self._values.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            self._corrupted("general.architecture is missing")
        if not _ARCHITECTURE.fullmatch(architecture):
            self._corrupted(f"general.architecture is {shown(architecture)}, no plain word")
        kind = self._values.get("general.type", "model")
        if kind != "model":
            self._corrupted(f"holds {shown(kind)}, not a model (general.type)")
        self._architecture = architecture

    def header(self, parts: gguf_parts.Parts) -> GgufHeader:
        """Return everything; `parts` is what the other files of a split model add."""
        blocks = self._number("block_count", BLOCKS_MAX)
        context = self._number("context_length", CONTEXT_MAX)
        embedding = self._number("embedding_length", EMBEDDING_MAX)
        heads, _ = self._heads("attention.head_count", 0, blocks)
        heads_kv, heads_kv_sum = self._heads("attention.head_count_kv", heads, blocks)
        parameters = sum(tensor.elements for tensor in self._tables.tensors) + parts.parameters
        if parameters > PARAMETERS_MAX:
            self._corrupted(f"{parameters} parameters, at most {PARAMETERS_MAX} can be")
        if why := gguf_aborts.reason(self._architecture, self._tables):
            self._corrupted(why)
        pooling = integer(self._of("pooling_type", _POOLING_NONE))
        facts = ModelFacts(
            architecture=self._architecture,
            block_count=blocks,
            context_length=context,
            vocabulary_size=self._vocabulary(),
            quantisation=_quantisation(self._values, self._tables.tensors),
            parameters=parameters,
            file_bytes=self._tables.size_bytes + parts.size_bytes,
            has_chat_template="tokenizer.chat_template" in self._values,
            is_embedding=self._architecture in EMBEDDING_ARCHITECTURES or pooling != _POOLING_NONE,
            name=_printable(self._values.get("general.name")),
            head_count=heads,
            head_count_kv=heads_kv,
            embedding_length=embedding,
        )
        per_head = embedding // heads if heads else 0
        return GgufHeader(
            facts=facts,
            heads_kv_sum=heads_kv_sum,
            key_length=self._length("attention.key_length", per_head),
            value_length=self._length("attention.value_length", per_head),
            tokenizer=_printable(self._values.get("tokenizer.ggml.model")),
            data_offset=self._tables.data_offset,
            tensor_count=len(self._tables.tensors),
            split_count=parts.count,
        )

    def _of(self, name: str, default: Any = None) -> Any:
        return self._values.get(f"{self._architecture}.{name}", default)

    def _number(self, name: str, maximum: int) -> int:
        key = f"{self._architecture}.{name}"
        if key not in self._values:
            self._corrupted(f"{key} is missing")
        number = integer(self._values[key])
        if number is None or not 1 <= number <= maximum:
            self._corrupted(f"{key} is {shown(self._values[key])}, outside 1..{maximum}")
        return number

    def _length(self, name: str, default: int) -> int:
        number = integer(self._of(name, default)) or default
        if not 0 <= number <= EMBEDDING_MAX:
            self._corrupted(f"{self._architecture}.{name} is {number}, outside 0..{EMBEDDING_MAX}")
        return number

    def _heads(self, name: str, default: int, blocks: int) -> tuple[int, int]:
        """Return the heads of the layer that has most, and those of all layers together."""
        value = self._of(name, default)
        if isinstance(value, Skipped):
            numbers = value.numbers or (default,) * blocks
        else:
            numbers = (integer(value) or 0,) * blocks
        least, most = min(numbers), max(numbers)
        if least < 0 or most > EMBEDDING_MAX:
            wrong = least if least < 0 else most
            self._corrupted(f"{self._architecture}.{name} is {wrong}, outside 0..{EMBEDDING_MAX}")
        return most, sum(numbers)

    def _vocabulary(self) -> int:
        tokens = self._values.get(TOKENS_KEY)
        vocabulary = tokens.count if isinstance(tokens, Skipped) else 0
        vocabulary = vocabulary or integer(self._of("vocab_size", 0)) or 0
        if not 0 <= vocabulary <= VOCABULARY_MAX:
            self._corrupted(f"a vocabulary of {vocabulary} tokens, at most {VOCABULARY_MAX} can be")
        return vocabulary

    def _corrupted(self, message: str) -> NoReturn:
        raise ArrieroError(ErrorCode.MODEL_CORRUPTED, f"{self._name}: {message}", file=self._name)


def _printable(value: object) -> str:
    """Return a text as it may be shown on a terminal, nothing for what is none."""
    return "".join(c if c.isprintable() else "?" for c in value) if isinstance(value, str) else ""


def _quantisation(values: dict[str, Any], tensors: list[Tensor]) -> str:
    """Return what the file says of itself, else the type that most of its bytes have."""
    number = integer(values.get("general.file_type"))
    if number in FILE_TYPES:
        return FILE_TYPES[number]
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type_name] += tensor.size
    return max(sizes, key=lambda name: (sizes[name], name), default="unknown")
