"""How does a test get a GGUF model of any size, or a broken one?

`llama_file` describes a random-weight Llama with a byte-level tokenizer and a chat template, which
the real engine loads; its answers mean nothing and are the same each time.  A test that wants a
broken file edits the description before `write`, or the bytes afterwards.
"""

import functools
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from arriero.engines.token_pieces import byte_letters

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_FORMATS: Final = dict(
    zip((U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64), "BbHhIif?Qqd", strict=True)
)
TENSOR_F32: Final = 0
TENSOR_F16: Final = 1
_TENSOR_BYTES: Final = {TENSOR_F32: 4, TENSOR_F16: 2}

#: What the random model's tokenizer joins, so that not every token is one byte.
MERGES: Final = ("Ġ t", "h e", "Ġt he", "i n", "o n", "a n", "an d", "Ġ a", "r e", "e r", "l l", "o u", "1 0")
SPECIALS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE: Final = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass(slots=True)
class Tensor:
    """One tensor, as the file shall describe it."""

    name: str
    shape: tuple[int, ...]
    type_number: int = TENSOR_F16
    #: What every element is; None: random numbers.
    constant: float | None = None
    #: Rows from this one on are zero (rows are as long as the first dimension).
    zero_from_row: int | None = None
    #: What the file claims instead of the truth.
    claimed_offset: int | None = None
    claimed_dimensions: int | None = None

    def size_bytes(self) -> int:
        """Return the bytes of its data."""
        elements = 1
        for length in self.shape:
            elements *= length
        return elements * _TENSOR_BYTES.get(self.type_number, 2)


@dataclass(slots=True)
class GgufFile:
    """A GGUF file to be: edit it as you like, then `write` it."""

    keys: list[tuple[str, int, Any]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    alignment: int = 32
    claimed_keys: int | None = None
    claimed_tensors: int | None = None
    seed: int = 1

    def set(self, key: str, value_type: int, value: Any) -> None:
        """Set `key`, in its place if it is there already."""
        for index, (name, _, _) in enumerate(self.keys):
            if name == key:
                self.keys[index] = (key, value_type, value)
                return
        self.keys.append((key, value_type, value))

    def remove(self, key: str) -> None:
        """Remove `key`."""
        self.keys = [row for row in self.keys if row[0] != key]

    def header(self) -> bytes:
        """Return everything before the tensors' bytes, padded."""
        tensor_count = len(self.tensors) if self.claimed_tensors is None else self.claimed_tensors
        key_count = len(self.keys) if self.claimed_keys is None else self.claimed_keys
        parts = [self.magic, struct.pack("<IQQ", self.version, tensor_count, key_count)]
        for key, value_type, value in self.keys:
            parts += [_text(key), struct.pack("<I", value_type), _value(value_type, value)]
        offset = 0
        for tensor in self.tensors:
            claimed = offset if tensor.claimed_offset is None else tensor.claimed_offset
            dimensions = tensor.claimed_dimensions
            parts.append(_text(tensor.name))
            parts.append(struct.pack("<I", len(tensor.shape) if dimensions is None else dimensions))
            parts.append(struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape))
            parts.append(struct.pack("<IQ", tensor.type_number, claimed % (1 << 64)))
            offset += self._padded(tensor.size_bytes())
        head = b"".join(parts)
        return head + b"\0" * (self._padded(len(head)) - len(head))

    def write(self, path: Path) -> Path:
        """Write the file, real bytes without holes, and return its path."""
        pool = _numbers(self.seed)
        with path.open("wb") as file:
            file.write(self.header())
            for number, tensor in enumerate(self.tensors):
                size = tensor.size_bytes()
                _write_numbers(file, tensor, pool, number)
                file.write(b"\0" * (self._padded(size) - size))
        return path

    def _padded(self, size: int) -> int:
        return size + -size % self.alignment


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """How large the random Llama is; the default one has 100,000 parameters."""

    layers: int = 2
    embedding: int = 64
    heads: int = 4
    heads_kv: int = 2
    feed_forward: int = 128
    context: int = 4096
    tensor_type: int = TENSOR_F16
    #: It says nothing but ASCII, and never ends by itself; else any byte may follow any other.
    is_ascii: bool = True


#: About 300 MB: enough for loading to have steps.
LARGE: Final = LlamaShape(layers=12, embedding=1024, heads=16, heads_kv=4, feed_forward=3072)


def llama_file(shape: LlamaShape | None = None, *, seed: int = 1) -> GgufFile:
    """Return the description of a random-weight Llama."""
    shape = shape or LlamaShape()
    tokens = [*byte_letters(), *(merge.replace(" ", "") for merge in MERGES), *SPECIALS]
    types = [1] * (len(tokens) - len(SPECIALS)) + [3] * len(SPECIALS)
    head = shape.embedding // shape.heads
    file = GgufFile(seed=seed)
    for key, value_type, value in (
        ("general.architecture", STRING, "llama"),
        ("general.type", STRING, "model"),
        ("general.name", STRING, "random llama"),
        ("general.file_type", U32, 1 if shape.tensor_type == TENSOR_F16 else 0),
        ("llama.block_count", U32, shape.layers),
        ("llama.context_length", U32, shape.context),
        ("llama.embedding_length", U32, shape.embedding),
        ("llama.feed_forward_length", U32, shape.feed_forward),
        ("llama.attention.head_count", U32, shape.heads),
        ("llama.attention.head_count_kv", U32, shape.heads_kv),
        ("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        ("llama.rope.dimension_count", U32, head),
        ("llama.rope.freq_base", F32, 10000.0),
        ("llama.vocab_size", U32, len(tokens)),
        ("tokenizer.ggml.model", STRING, "gpt2"),
        ("tokenizer.ggml.pre", STRING, "gpt-2"),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
        ("tokenizer.ggml.token_type", ARRAY, (I32, types)),
        ("tokenizer.ggml.merges", ARRAY, (STRING, MERGES)),
        ("tokenizer.ggml.bos_token_id", U32, len(tokens) - 3),
        ("tokenizer.ggml.eos_token_id", U32, len(tokens) - 1),
        ("tokenizer.ggml.add_bos_token", BOOL, False),
        ("tokenizer.chat_template", STRING, CHAT_TEMPLATE),
    ):
        file.set(key, value_type, value)
    file.tensors = list(_llama_tensors(shape, len(tokens)))
    return file


def write_llama(path: Path, shape: LlamaShape | None = None, *, seed: int = 1) -> Path:
    """Write a random-weight Llama that the real engine loads, and return its path."""
    return llama_file(shape, seed=seed).write(path)


def _llama_tensors(shape: LlamaShape, vocabulary: int) -> Iterator[Tensor]:
    width, kv_width = shape.embedding, shape.embedding // shape.heads * shape.heads_kv
    matrix = shape.tensor_type
    yield Tensor("token_embd.weight", (width, vocabulary), matrix)
    yield Tensor("output_norm.weight", (width,), TENSOR_F32, constant=1.0)
    # A token whose row is zero has the logit zero: many others are always more likely.
    yield Tensor("output.weight", (width, vocabulary), matrix, zero_from_row=128 if shape.is_ascii else None)
    for layer in range(shape.layers):
        prefix = f"blk.{layer}."
        yield Tensor(f"{prefix}attn_norm.weight", (width,), TENSOR_F32, constant=1.0)
        yield Tensor(f"{prefix}attn_q.weight", (width, width), matrix)
        yield Tensor(f"{prefix}attn_k.weight", (width, kv_width), matrix)
        yield Tensor(f"{prefix}attn_v.weight", (width, kv_width), matrix)
        yield Tensor(f"{prefix}attn_output.weight", (width, width), matrix)
        yield Tensor(f"{prefix}ffn_norm.weight", (width,), TENSOR_F32, constant=1.0)
        yield Tensor(f"{prefix}ffn_gate.weight", (width, shape.feed_forward), matrix)
        yield Tensor(f"{prefix}ffn_up.weight", (width, shape.feed_forward), matrix)
        yield Tensor(f"{prefix}ffn_down.weight", (shape.feed_forward, width), matrix)


#: Prime, so that the rows of a matrix that repeats the pool do not repeat.
_POOL: Final = 65_521


@functools.lru_cache(maxsize=4)
def _numbers(seed: int) -> tuple[float, ...]:
    chance = random.Random(seed)
    return tuple(chance.gauss(0.0, 0.2) for _ in range(_POOL))


def _write_numbers(file: BinaryIO, tensor: Tensor, pool: tuple[float, ...], number: int) -> None:
    """Write the tensor's elements: the pool over and over, from a place of this tensor's own."""
    if tensor.constant is not None:
        pool = (tensor.constant,)
    start = number * 7_919 % len(pool)
    letter = "e" if tensor.type_number == TENSOR_F16 else "f"
    raw = struct.pack(f"<{len(pool)}{letter}", *pool[start:], *pool[:start])
    size = tensor.size_bytes()
    told = size
    if tensor.zero_from_row is not None:
        told = tensor.zero_from_row * tensor.shape[0] * struct.calcsize(letter)
    whole, rest = divmod(told, len(raw))
    for _ in range(whole):
        file.write(raw)
    file.write(raw[:rest])
    file.write(b"\0" * (size - told))


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value_type: int, value: Any) -> bytes:
    """Return the bytes of a value; raw bytes are taken as they are (for broken files)."""
    if isinstance(value, bytes):
        return value
    if value_type == STRING:
        return _text(value)
    if value_type == ARRAY:
        element_type, elements = value
        head = struct.pack("<IQ", element_type, len(elements))
        if element_type in _FORMATS:
            return head + struct.pack(f"<{len(elements)}{_FORMATS[element_type]}", *elements)
        return head + b"".join(_value(element_type, element) for element in elements)
    return struct.pack(f"<{_FORMATS[value_type]}", value)
