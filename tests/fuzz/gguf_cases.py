"""Which broken GGUF headers are tried?  Real ones, taken apart, changed in their structure, put together.

Every case comes from a seed and a number, so that one that fails can be made again.
"""

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from arriero.testing import gguf_writer as w

SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_FORMATS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U64_MAX: Final = (1 << 64) - 1
NUMBERS: Final = (
    0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 63, 64, 65, 127, 128, 255, 256, 257, 511, 512, 513, 1000, 1024, 4095, 4096, 4097,
    65535, 65536, 1 << 20, 1 << 24, 1 << 28, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 48, 1 << 60, 1 << 61,
    (1 << 63) - 1, 1 << 63, U64_MAX - 31, U64_MAX - 7, U64_MAX,
)  # fmt: skip
FLOATS: Final = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, float("nan"), float("inf"), float("-inf"))
TEXTS: Final = (
    b"", b"\0", b"a\0b", b"llama", b"llama\0x", b"gpt2", b"bert", b"spm", b"none", b"rwkv", b"t5", b"mamba", b"clip", b"qwen2",
    b"../../x", b"\x1b[2J\x1b[H", b"\xff\xfe\xfd", "\u202e\U0001f999".encode(), b"x" * 513, b"{{" * 300, b"{% for", b"adapter",
    b"{%- for x in range(9999) %}{%- for y in range(99) %}x{%- endfor %}{%- endfor %}", b"{{ messages[0]['content'] }}", b"split", b"mmproj",
)  # fmt: skip
NEW_KEYS: Final = (
    b"x", b"general.alignment", b"split.no", b"split.count", b"split.tensors.count", b"llama.expert_count", b"llama.pooling_type",
    b"llama.expert_used_count", b"llama.attention.key_length", b"llama.attention.value_length", b"llama.rope.scaling.type",
    b"llama.rope.scaling.factor", b"llama.attention.sliding_window", b"llama.vocab_size", b"llama.tensor_data_layout",
    b"tokenizer.ggml.scores", b"tokenizer.ggml.token_type", b"tokenizer.ggml.padding_token_id", b"tokenizer.ggml.unknown_token_id",
    b"tokenizer.ggml.precompiled_charsmap", b"tokenizer.ggml.eot_token_id", b"tokenizer.ggml.token_type_count",
    b"tokenizer.ggml.add_eos_token", b"general.type", b"general.file_type", b"general.quantization_version", b"a\0b",
    b"llama.block_count\0x", b"", b"k" * 1025, b"\xff\xfe", b"adapter.type", b"llama.attention.head_count\0",
)  # fmt: skip


@dataclass(slots=True)
class TensorEntry:
    name: bytes
    shape: tuple[int, ...]
    kind: int
    offset: int
    dimensions: int

    def raw(self) -> bytes:
        shape = struct.pack(f"<{len(self.shape)}Q", *self.shape)
        head = struct.pack("<Q", len(self.name)) + self.name + struct.pack("<I", self.dimensions)
        return head + shape + struct.pack("<IQ", self.kind, self.offset)


@dataclass(slots=True)
class Draft:
    """A header taken apart: keys as name, type and raw value."""

    keys: list[tuple[bytes, int, bytes]]
    tensors: list[TensorEntry]
    magic: bytes = b"GGUF"
    version: int = 3
    claimed_keys: int | None = None
    claimed_tensors: int | None = None
    alignment: int = 32

    def copy(self) -> "Draft":
        return replace(self, keys=self.keys.copy(), tensors=self.tensors.copy())

    def header(self) -> bytes:
        tensors = len(self.tensors) if self.claimed_tensors is None else self.claimed_tensors
        keys = len(self.keys) if self.claimed_keys is None else self.claimed_keys
        parts = [self.magic, struct.pack("<IQQ", self.version, tensors, keys)]
        for name, kind, value in self.keys:
            parts += (struct.pack("<Q", len(name)), name, struct.pack("<I", kind), value)
        parts += [tensor.raw() for tensor in self.tensors]
        head = b"".join(parts)
        return head + b"\0" * (-len(head) % self.alignment)


@dataclass(frozen=True, slots=True)
class Base:
    """A real model: its header taken apart, and its tensors' bytes."""

    draft: Draft
    data: bytes


@dataclass(frozen=True, slots=True)
class Case:
    """One file: its header, then the base's data as far as `size_bytes` reaches, then a hole."""

    header: bytes
    size_bytes: int
    base: Base = field(repr=False)
    done: tuple[str, ...] = ()

    def write(self, path: Path, *, with_data: bool) -> None:
        with path.open("wb") as file:
            file.write(self.header[: self.size_bytes])
            if with_data:
                file.write(self.base.data[: max(0, self.size_bytes - len(self.header))])
            file.truncate(self.size_bytes)


def parse(raw: bytes) -> Base:
    """Take a good file apart."""
    position = 0

    def number(letter: str) -> int:
        nonlocal position
        value: int = struct.unpack_from(f"<{letter}", raw, position)[0]
        position += struct.calcsize(f"<{letter}")
        return value

    def text() -> bytes:
        nonlocal position
        length = number("Q")
        position += length
        return raw[position - length : position]

    def pass_over(kind: int) -> None:
        nonlocal position
        if kind == w.STRING:
            text()
        elif kind == w.ARRAY:
            inner, count = number("I"), number("Q")
            for _ in range(count):
                pass_over(inner)
        else:
            position += SIZES[kind]

    position = 8
    tensor_count, key_count = number("Q"), number("Q")
    keys = []
    for _ in range(key_count):
        name, kind = text(), number("I")
        start = position
        pass_over(kind)
        keys.append((name, kind, raw[start:position]))
    tensors = []
    for _ in range(tensor_count):
        name, dimensions = text(), number("I")
        shape = tuple(number("Q") for _ in range(dimensions))
        tensors.append(TensorEntry(name, shape, number("I"), number("Q"), dimensions))
    data = raw[position + -position % 32 :]
    return Base(Draft(keys, tensors), data)


# --- Changes: each takes the draft and a source of chance --------------------------------------

_F32: Final = 0


def _scalar(chance: random.Random, kind: int) -> bytes:
    if kind in (6, 12):
        return struct.pack(f"<{_FORMATS[kind]}", chance.choice(FLOATS))
    return (chance.choice(NUMBERS) & U64_MAX).to_bytes(8, "little")[: SIZES[kind]]


def _text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _array(kind: int, count: int, raw: bytes) -> bytes:
    return struct.pack("<IQ", kind & 0xFFFFFFFF, count & U64_MAX) + raw


def _any_array(chance: random.Random) -> bytes:
    what = chance.randrange(5)
    if what == 0:
        depth = chance.randrange(1, 9)
        return _array(9, 1, b"") * depth + _array(4, 0, b"")
    if what == 1:
        count = chance.randrange(50)
        return _array(8, count, b"".join(_text(chance.choice(TEXTS)) for _ in range(count)))
    kind = chance.choice(list(SIZES))
    count = chance.choice((0, 1, 2, 5, 300))
    if what == 2:
        return _array(kind, count, b"".join(_scalar(chance, kind) for _ in range(count)))
    if what == 3:
        return _array(chance.choice((4, 8, 9, 13, 77, 1 << 31)), chance.choice(NUMBERS), chance.randbytes(40))
    return _array(9, count, _array(kind, 1, bytes(SIZES[kind])) * count)


def _any_value(chance: random.Random) -> tuple[int, bytes]:
    what = chance.randrange(10)
    if what < 5:
        kind = chance.choice(list(SIZES))
        return kind, _scalar(chance, kind)
    if what < 7:
        return 8, _text(chance.choice(TEXTS))
    if what < 9:
        return 9, _any_array(chance)
    return chance.choice((13, 14, 255, 1 << 31)), chance.randbytes(8)


def _pick(draft: Draft, chance: random.Random) -> int:
    return chance.randrange(len(draft.keys))


def counts(draft: Draft, chance: random.Random) -> None:
    if chance.random() < 0.5:
        draft.claimed_keys = chance.choice((*NUMBERS, len(draft.keys) + 1, len(draft.keys) - 1))
    else:
        draft.claimed_tensors = chance.choice((*NUMBERS, len(draft.tensors) + 1, len(draft.tensors) - 1))


def drop_key(draft: Draft, chance: random.Random) -> None:
    if len(draft.keys) > 1:
        del draft.keys[_pick(draft, chance)]


def repeat_key(draft: Draft, chance: random.Random) -> None:
    name, kind, value = draft.keys[_pick(draft, chance)]
    draft.keys.insert(
        chance.randrange(len(draft.keys) + 1), (name + chance.choice((b"", b"\0", b"\0x")), kind, value)
    )


def shuffle_keys(draft: Draft, chance: random.Random) -> None:
    chance.shuffle(draft.keys)


def swap_values(draft: Draft, chance: random.Random) -> None:
    a, b = _pick(draft, chance), _pick(draft, chance)
    one, other = draft.keys[a], draft.keys[b]
    draft.keys[a], draft.keys[b] = (one[0], other[1], other[2]), (other[0], one[1], one[2])


def change_value(draft: Draft, chance: random.Random) -> None:
    index = _pick(draft, chance)
    draft.keys[index] = (draft.keys[index][0], *_any_value(chance))


def change_scalar(draft: Draft, chance: random.Random) -> None:
    """The type stays: such files often pass."""
    for _ in range(8):
        index = _pick(draft, chance)
        name, kind, value = draft.keys[index]
        if kind in SIZES:
            if kind not in (6, 12) and chance.random() < 0.4:
                number = int.from_bytes(value, "little")
                near = (number + chance.choice((-2, -1, 1, 2, number))) & U64_MAX
                draft.keys[index] = (name, kind, near.to_bytes(9, "little")[: SIZES[kind]])
            else:
                draft.keys[index] = (name, kind, _scalar(chance, kind))
            return


def change_type(draft: Draft, chance: random.Random) -> None:
    index = _pick(draft, chance)
    name, _, value = draft.keys[index]
    draft.keys[index] = (name, chance.choice((*SIZES, 8, 9, 13, 99)), value)


def change_text(draft: Draft, chance: random.Random) -> None:
    texts = [index for index, key in enumerate(draft.keys) if key[1] == w.STRING]
    if texts:
        index = chance.choice(texts)
        raw = _text(chance.choice(TEXTS))
        if chance.random() < 0.2:
            raw = struct.pack("<Q", chance.choice(NUMBERS)) + raw[8:]
        draft.keys[index] = (draft.keys[index][0], w.STRING, raw)


def change_array(draft: Draft, chance: random.Random) -> None:
    arrays = [index for index, key in enumerate(draft.keys) if key[1] == w.ARRAY and len(key[2]) >= 12]
    if not arrays:
        return
    index = chance.choice(arrays)
    name, _, value = draft.keys[index]
    kind, count = struct.unpack_from("<IQ", value)
    what = chance.randrange(6)
    if what == 0:
        value = _any_array(chance)
    elif what == 1:
        value = _array(kind, chance.choice((*NUMBERS, count + 1, count - 1)), value[12:])
    elif what == 2:
        value = _array(chance.choice((*SIZES, 8, 9, 13)), count, value[12:])
    elif what == 3:
        value = value[: chance.randrange(len(value) + 1)]
    elif kind in SIZES and count:
        # Whole, but shorter or longer than the vocabulary that it speaks of.
        fewer = min(chance.choice((0, 1, count - 1, count // 2, count + 1, count * 2)), len(value))
        value = _array(kind, fewer, (value[12:] * 3)[: fewer * SIZES[kind]])
    elif kind == w.STRING:
        texts = _texts_of(value)
        change = chance.randrange(4)
        if change == 0:
            texts = texts[: chance.randrange(len(texts) + 1)]
        elif change == 1:
            texts += [chance.choice(TEXTS) for _ in range(chance.randrange(1, 20))]
        else:
            for _ in range(chance.randrange(1, 6)):
                texts[chance.randrange(len(texts))] = chance.choice((*TEXTS, *texts[:40]))
        value = _array(8, len(texts), b"".join(map(_text, texts)))
    draft.keys[index] = (name, w.ARRAY, value)


def _texts_of(value: bytes) -> list[bytes]:
    texts, position = [], 12
    while position + 8 <= len(value):
        (length,) = struct.unpack_from("<Q", value, position)
        texts.append(value[position + 8 : position + 8 + length])
        position += 8 + length
    return texts or [b""]


def add_key(draft: Draft, chance: random.Random) -> None:
    name = chance.choice(NEW_KEYS)
    names = [key[0] for key in draft.keys]
    value = _any_value(chance)
    if name in names and chance.random() < 0.8:
        draft.keys[names.index(name)] = (name, *value)
    else:
        draft.keys.insert(chance.randrange(len(draft.keys) + 1), (name, *value))


def add_small_key(draft: Draft, chance: random.Random) -> None:
    """A key that the engine looks for, of the type it wants, with a number that it may not."""
    name = chance.choice(NEW_KEYS[1:24])
    if name not in [key[0] for key in draft.keys]:
        number = chance.choice(NUMBERS) & 0xFFFFFFFF
        draft.keys.append((name, w.U32, struct.pack("<I", number)))


def add_numbers_a_layer(draft: Draft, chance: random.Random) -> None:
    names = [key[0] for key in draft.keys]
    name = chance.choice(
        (b"llama.attention.head_count", b"llama.attention.head_count_kv", b"llama.feed_forward_length")
    )
    kind = chance.choice((4, 5, 6, 10, 11, 12))
    count = chance.choice((0, 1, 2, 4, 513, 2000))
    value = _array(kind, count, b"".join(_scalar(chance, kind) for _ in range(count)))
    if name in names:
        draft.keys[names.index(name)] = (name, w.ARRAY, value)


def split(draft: Draft, chance: random.Random) -> None:
    for name in (b"split.no", b"split.count", b"split.tensors.count"):
        if chance.random() < 0.7:
            kind = chance.choice((2, 2, 2, *SIZES))
            draft.keys.append((name, kind, _scalar(chance, kind)))


def alignment(draft: Draft, chance: random.Random) -> None:
    kind = chance.choice((4, 4, 4, *SIZES))
    raw = (chance.choice((0, 1, 2, 8, 16, 31, 32, 48, 64, 4096, 65536, 1 << 31)) & U64_MAX).to_bytes(
        8, "little"
    )
    draft.keys.append((b"general.alignment", kind, raw[: SIZES[kind]]))
    told = int.from_bytes(raw, "little")
    if 1 <= told <= 65536 and chance.random() < 0.6:
        draft.alignment = told
        lay_out(draft)


def lay_out(draft: Draft) -> None:
    """Give every tensor the offset that it must have, as far as its type is known here."""
    offset = 0
    for index, tensor in enumerate(draft.tensors):
        draft.tensors[index] = replace(tensor, offset=offset & U64_MAX)
        size = 4 if tensor.kind == _F32 else 2
        for length in tensor.shape:
            size *= length
        offset += size + -size % draft.alignment


def change_tensor(draft: Draft, chance: random.Random) -> None:
    if not draft.tensors:
        return
    index = chance.randrange(len(draft.tensors))
    tensor = draft.tensors[index]
    what = chance.randrange(7)
    if what == 0:
        tensor = replace(tensor, dimensions=chance.choice((0, 1, 2, 3, 4, 5, 100, 1 << 31)))
    elif what == 1 and tensor.shape:
        lengths = list(tensor.shape)
        lengths[chance.randrange(len(lengths))] = chance.choice(NUMBERS)
        tensor = replace(tensor, shape=tuple(lengths))
    elif what == 2:
        tensor = replace(tensor, kind=chance.choice((*range(44), 1 << 31)))
    elif what == 3:
        tensor = replace(
            tensor, offset=chance.choice((*NUMBERS, tensor.offset + 32, tensor.offset - 32 & U64_MAX))
        )
    elif what == 4:
        names = [other.name for other in draft.tensors]
        name = chance.choice(
            (*names, b"", b"a\0b", tensor.name + b"\0", b"n" * 63, b"n" * 64, b"\xff", tensor.name + b"x")
        )
        tensor = replace(tensor, name=name)
    elif what == 5:
        shape = tuple(chance.choice((1, 2, 32, 64, 256)) for _ in range(chance.randrange(5)))
        tensor = replace(tensor, shape=shape, dimensions=len(shape))
    else:
        del draft.tensors[index]
        draft.tensors += [tensor] * chance.randrange(2)
        if chance.random() < 0.7:
            lay_out(draft)
        return
    draft.tensors[index] = tensor
    if chance.random() < 0.5:
        lay_out(draft)


def add_tensors(draft: Draft, chance: random.Random) -> None:
    for number in range(chance.choice((1, 3, 50))):
        shape = tuple(chance.choice((1, 2, 32, 64)) for _ in range(chance.randrange(1, 5)))
        draft.tensors.append(TensorEntry(b"extra.%d" % number, shape, _F32, 0, len(shape)))
    lay_out(draft)


def preamble(draft: Draft, chance: random.Random) -> None:
    if chance.random() < 0.3:
        draft.magic = chance.choice((b"GGML", b"\0\0\0\0", b"FUGG", b"\x80\x04\x95\0", b"PK\x03\x04"))
    else:
        draft.version = chance.choice((0, 1, 2, 2, 4, 3 << 24, (1 << 32) - 1))


Change = Callable[[Draft, random.Random], None]
#: With their weights: those that leave a file whole come often, so that many files pass.
CHANGES: Final[dict[Change, int]] = {
    counts: 3, drop_key: 4, repeat_key: 3, shuffle_keys: 3, swap_values: 4, change_value: 6, change_scalar: 16,
    change_type: 4, change_text: 6, change_array: 10, add_key: 6, add_small_key: 10, add_numbers_a_layer: 5, split: 4,
    alignment: 3, change_tensor: 10, add_tensors: 2, preamble: 1,
}  # fmt: skip
_CHANGES: Final = list(CHANGES)
_WEIGHTS: Final = list(CHANGES.values())


def make(bases: list[Base], *, seed: int, number: int) -> Case:
    """Return case `number` of a seed."""
    chance = random.Random(seed << 32 | number)
    base = chance.choice(bases)
    draft = base.draft.copy()
    changes = chance.choices(_CHANGES, _WEIGHTS, k=chance.choice((1, 1, 2, 3)))
    for change in changes:
        change(draft, chance)
    header = draft.header()
    done = [change.__name__ for change in changes]
    if chance.random() < 0.15:
        header = _with_wild_bytes(header, chance)
        done.append("wild bytes")
    size_bytes = len(header) + len(base.data)
    what = chance.random()
    if what < 0.08:
        size_bytes = chance.randrange(chance.choice((40, len(header), size_bytes)) + 1)
        done.append("cut")
    elif what < 0.14:
        size_bytes += chance.choice((1, 4096, 1 << 20, 1 << 32, 1 << 40))
        done.append("hole")
    return Case(header, size_bytes, base, tuple(done))


def _with_wild_bytes(header: bytes, chance: random.Random) -> bytes:
    raw = bytearray(header)
    for _ in range(chance.randrange(1, 5)):
        position = chance.randrange(len(raw))
        if chance.random() < 0.5:
            raw[position] ^= 1 << chance.randrange(8)
        else:
            raw[position : position + 8] = struct.pack("<Q", chance.choice(NUMBERS))
    return bytes(raw)
