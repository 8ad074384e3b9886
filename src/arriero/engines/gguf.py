"""What does a GGUF file say of itself, and can its header be believed?

A bounded reader: every count, length and nesting has a limit, long arrays are stepped over and
never built, so that neither a vocabulary of 150,000 tokens nor a hostile file costs a second or
10 MB.  The engine aborts on some broken files, so nothing reaches it unread.

Messages name the file, never its folder: they cross the network.
"""

import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn, TypeAlias

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines.base import ModelFacts
from arriero.engines.gguf_types import (
    ALIGNMENT_MAX,
    ARRAY,
    ARRAY_ELEMENTS_MAX,
    ARRAY_STRINGS_MAX,
    BLOCKS_MAX,
    CONTEXT_MAX,
    DIMENSIONS_MAX,
    ELEMENTS_MAX,
    EMBEDDING_ARCHITECTURES,
    EMBEDDING_MAX,
    FILE_TYPES,
    HEADER_BYTES_MAX,
    KEPT_NUMBERS_MAX,
    KEPT_STRING_BYTES_MAX,
    KEPT_STRINGS_MAX,
    KEY_BYTES_MAX,
    KEYS_MAX,
    NESTING_MAX,
    PARTS_MAX,
    SCALARS,
    STRING,
    STRING_BYTES_MAX,
    TENSOR_NAME_BYTES_MAX,
    TENSOR_TYPES,
    TENSORS_MAX,
    TOKEN_BYTES_MAX,
    TOKENS_KEY,
    VOCABULARY_MAX,
)

_WINDOW_BYTES: Final = 256 << 10
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_SPLIT_NAME: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_POOLING_NONE: Final = 0
TakeToken: TypeAlias = Callable[[int, bytes], None]


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The facts, and what only the adapter of the engine needs."""

    facts: ModelFacts
    embedding_length: int
    #: Key-value heads of all layers together, and the length of one head's key and value: what
    #: the cache is reckoned from where the engine gives no estimate.
    heads_kv_sum: int
    key_length: int
    value_length: int
    #: Kind of tokenizer: "gpt2" (byte-level), "llama" (SentencePiece), "bert"…
    tokenizer: str
    #: Where the tensors' bytes begin.
    data_offset: int
    tensor_count: int
    split_count: int


def inspect(path: Path) -> ModelFacts:
    """Return the facts of the model in `path`.

    Raises INVALID_MODEL_PATH (no such file, not a file, no rights) and MODEL_CORRUPTED (what is
    wrong, and where).
    """
    return read_header(path).facts


def read_header(path: Path, take_token: TakeToken | None = None) -> GgufHeader:
    """Read and check the header of the model in `path`; raises as `inspect` does.

    `take_token` is given each token of the vocabulary, its number and how the file writes it.
    """
    name = shown_name(path)
    try:
        # Not blocking: a FIFO put there meanwhile must not hold us.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ArrieroError(ErrorCode.INVALID_MODEL_PATH, f"{name}: no such file", file=name) from error
    except PermissionError as error:
        raise ArrieroError(
            ErrorCode.INVALID_MODEL_PATH, f"{name}: no rights to read it", file=name
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path.
        reason = error.strerror if isinstance(error, OSError) else "not a path"
        raise ArrieroError(ErrorCode.INVALID_MODEL_PATH, f"{name}: {reason}", file=name) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ArrieroError(ErrorCode.INVALID_MODEL_PATH, f"{name}: not a regular file", file=name)
        with os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
            return _Reader(file, name, status.st_size, take_token).read(path)
    finally:
        os.close(descriptor)


def shown_name(path: Path) -> str:
    """Return the file's name as it may be told: no folder, no bytes that JSON cannot hold."""
    return path.name.encode("utf-8", "replace").decode()


@dataclass(slots=True)
class _Tensor:
    name: str
    offset: int
    size: int
    elements: int
    type_name: str


@dataclass(frozen=True, slots=True)
class _Skipped:
    """What was stepped over: its length, and its numbers where they are wanted."""

    count: int
    numbers: tuple[int, ...] = ()


class _Reader:
    """One pass over one header, through a window that moves forward."""

    def __init__(self, file: BinaryIO, name: str, size: int, take_token: TakeToken | None) -> None:
        self._file = file
        self._take_token = take_token
        self._name = name
        self._size = size
        self._window = b""
        self._window_start = 0
        self._position = 0
        self._array_strings = 0
        self._kept_strings = 0

    # --- The whole header ---------------------------------------------------------------------

    def read(self, path: Path) -> GgufHeader:
        tensor_count, key_count = self._preamble()
        values: dict[str, Any] = {}
        for number in range(key_count):
            where = f"key {number + 1} of {key_count}"
            key = self._text(KEY_BYTES_MAX, where)
            if key in values:
                self._corrupted(f"the key {_shown(key)} occurs twice")
            values[key] = self._value(self._u32(where), key)
        tensors = [self._tensor(number, tensor_count) for number in range(tensor_count)]
        alignment = _integer(values.get("general.alignment", 32))
        if alignment is None or not 1 <= alignment <= ALIGNMENT_MAX or alignment & (alignment - 1):
            self._corrupted(f"general.alignment is {_shown(values['general.alignment'])}, not a power of two")
        data_offset = self._position + -self._position % alignment
        self._check_tensors(tensors, data_offset, alignment)
        return self._header(path, values, tensors, data_offset)

    def _preamble(self) -> tuple[int, int]:
        if self._size < 4 or (magic := self._bytes(4, "the magic")) != b"GGUF":
            if self._size == 0:
                self._corrupted("the file is empty")
            seen = magic if self._size >= 4 else self._bytes(self._size, "the magic")
            self._corrupted(f"not a GGUF file: it begins with {seen!r}, not with b'GGUF'")
        version = self._u32("the version")
        if version not in (2, 3):
            if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
                self._corrupted("a big-endian GGUF file; the engine reads little-endian ones")
            self._corrupted(f"GGUF version {version}; 2 and 3 can be read")
        tensor_count = self._u64("the number of tensors")
        key_count = self._u64("the number of keys")
        if tensor_count > TENSORS_MAX:
            self._corrupted(f"{tensor_count} tensors, at most {TENSORS_MAX} can be")
        if key_count > KEYS_MAX:
            self._corrupted(f"{key_count} keys, at most {KEYS_MAX} can be")
        return tensor_count, key_count

    def _header(
        self, path: Path, values: dict[str, Any], tensors: list[_Tensor], data_offset: int
    ) -> GgufHeader:
        architecture = values.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            self._corrupted("general.architecture is missing")
        kind = values.get("general.type", "model")
        if kind != "model":
            self._corrupted(f"holds {_shown(kind)}, not a model (general.type)")
        blocks = self._number(values, f"{architecture}.block_count", BLOCKS_MAX)
        context = self._number(values, f"{architecture}.context_length", CONTEXT_MAX)
        embedding = self._number(values, f"{architecture}.embedding_length", EMBEDDING_MAX)
        split_count = self._split(values)
        tokens = values.get(TOKENS_KEY)
        vocabulary = tokens.count if isinstance(tokens, _Skipped) else 0
        if not vocabulary:
            vocabulary = _integer(values.get(f"{architecture}.vocab_size", 0)) or 0
        if not 0 <= vocabulary <= VOCABULARY_MAX:
            self._corrupted(f"a vocabulary of {vocabulary} tokens, at most {VOCABULARY_MAX} can be")
        pooling = _integer(values.get(f"{architecture}.pooling_type", _POOLING_NONE))
        facts = ModelFacts(
            architecture=architecture,
            block_count=blocks,
            context_length=context,
            vocabulary_size=vocabulary,
            quantisation=_quantisation(values, tensors),
            parameters=sum(tensor.elements for tensor in tensors),
            file_bytes=_bytes_of_all_parts(path, self._size, split_count),
            has_chat_template="tokenizer.chat_template" in values,
            is_embedding=architecture in EMBEDDING_ARCHITECTURES or pooling != _POOLING_NONE,
            name=_text_or_empty(values.get("general.name")),
        )
        return self._with_cache_shape(facts, values, embedding, data_offset, len(tensors), split_count)

    def _with_cache_shape(
        self,
        facts: ModelFacts,
        values: dict[str, Any],
        embedding: int,
        data_offset: int,
        tensor_count: int,
        split_count: int,
    ) -> GgufHeader:
        prefix = f"{facts.architecture}.attention."
        heads = _integer(values.get(f"{prefix}head_count", 0)) or 0
        if not 0 <= heads <= EMBEDDING_MAX:
            self._corrupted(f"{prefix}head_count is {heads}, outside 0..{EMBEDDING_MAX}")
        heads_kv = values.get(f"{prefix}head_count_kv", heads)
        if isinstance(heads_kv, _Skipped):
            numbers = heads_kv.numbers or (heads,) * facts.block_count
            heads_kv_sum = sum(numbers)
        else:
            heads_kv_sum = (_integer(heads_kv) or 0) * facts.block_count
        if not 0 <= heads_kv_sum <= EMBEDDING_MAX * BLOCKS_MAX:
            self._corrupted(f"{prefix}head_count_kv sums to {heads_kv_sum}")
        per_head = embedding // heads if heads else 0
        return GgufHeader(
            facts=facts,
            embedding_length=embedding,
            heads_kv_sum=heads_kv_sum,
            key_length=_integer(values.get(f"{prefix}key_length", per_head)) or per_head,
            value_length=_integer(values.get(f"{prefix}value_length", per_head)) or per_head,
            tokenizer=_text_or_empty(values.get("tokenizer.ggml.model")),
            data_offset=data_offset,
            tensor_count=tensor_count,
            split_count=split_count,
        )

    def _split(self, values: dict[str, Any]) -> int:
        """Return of how many parts the model is; this must be the first."""
        count = _integer(values.get("split.count", 0))
        number = _integer(values.get("split.no", 0))
        if count is None or number is None or not 0 <= count <= PARTS_MAX:
            self._corrupted("split.count and split.no are not numbers of parts")
        if number:
            self._corrupted(f"part {number + 1} of {count} of a model: give its first part")
        return max(1, count)

    def _number(self, values: dict[str, Any], key: str, maximum: int) -> int:
        if key not in values:
            self._corrupted(f"{key} is missing")
        number = _integer(values[key])
        if number is None or not 1 <= number <= maximum:
            self._corrupted(f"{key} is {_shown(values[key])}, outside 1..{maximum}")
        return number

    # --- Tensors ------------------------------------------------------------------------------

    def _tensor(self, number: int, count: int) -> _Tensor:
        where = f"tensor {number + 1} of {count}"
        name = self._text(TENSOR_NAME_BYTES_MAX, where)
        where = f"tensor {name}"
        dimensions = self._u32(where)
        if dimensions > DIMENSIONS_MAX:
            self._corrupted(f"{where} has {dimensions} dimensions, at most {DIMENSIONS_MAX} can be")
        shape = [self._u64(where) for _ in range(dimensions)]
        elements = 1
        for length in shape:
            elements *= length
            if not length >= 1 or elements > ELEMENTS_MAX:
                self._corrupted(f"{where} has the shape {shape}, which no tensor has")
        type_number = self._u32(where)
        if type_number not in TENSOR_TYPES:
            self._corrupted(f"{where} has the type {type_number}, which is not known")
        type_name, block, block_bytes = TENSOR_TYPES[type_number]
        row = shape[0] if shape else 1
        if row % block:
            self._corrupted(f"{where} has rows of {row}, not whole blocks of {block} ({type_name})")
        size = elements // block * block_bytes
        return _Tensor(name, self._u64(where), size, elements, type_name)

    def _check_tensors(self, tensors: list[_Tensor], data_offset: int, alignment: int) -> None:
        """Tensors lie one after the other, each aligned, all inside the file: so the engine wants it."""
        names: set[str] = set()
        expected = 0
        for tensor in tensors:
            if tensor.name in names:
                self._corrupted(f"tensor {tensor.name} occurs twice")
            names.add(tensor.name)
            if tensor.offset != expected:
                self._corrupted(
                    f"tensor {tensor.name} begins at offset {tensor.offset}, where {expected} must be"
                )
            end = data_offset + tensor.offset + tensor.size
            if end > self._size:
                self._corrupted(
                    f"tensor {tensor.name} ends at byte {end}, the file has {self._size}",
                    expected_bytes=end,
                    file_bytes=self._size,
                )
            expected = tensor.offset + tensor.size + -tensor.size % alignment

    # --- Values -------------------------------------------------------------------------------

    def _value(self, value_type: int, key: str) -> Any:
        """Return a number, a short string, or what is known of a thing that was stepped over."""
        scalar = SCALARS.get(value_type)
        if scalar is not None:
            return scalar.unpack(self._bytes(scalar.size, key))[0]
        if value_type == STRING:
            return self._string(key)
        if value_type == ARRAY:
            return self._array(key, depth=1)
        self._corrupted(f"the key {_shown(key)} has the value type {value_type}, which is not known")

    def _length(self, length_max: int, key: str) -> int:
        length = self._u64(key)
        if length > length_max:
            self._corrupted(
                f"the key {_shown(key)} has a text of {length} bytes, at most {length_max} can be"
            )
        return length

    def _string(self, key: str) -> Any:
        length = self._length(STRING_BYTES_MAX, key)
        if length > KEPT_STRING_BYTES_MAX or self._kept_strings >= KEPT_STRINGS_MAX:
            self._skip(length, key)
            return _Skipped(length)
        self._kept_strings += 1
        return self._bytes(length, key).decode("utf-8", "replace")

    def _array(self, key: str, *, depth: int) -> "_Skipped":
        if depth > NESTING_MAX:
            self._corrupted(f"the key {_shown(key)} nests arrays deeper than {NESTING_MAX}")
        element_type = self._u32(key)
        count = self._u64(key)
        if count > ARRAY_ELEMENTS_MAX:
            self._corrupted(
                f"the key {_shown(key)} has {count} elements, at most {ARRAY_ELEMENTS_MAX} can be"
            )
        scalar = SCALARS.get(element_type)
        if scalar is not None:
            if key.endswith(".head_count_kv") and depth == 1 and count <= KEPT_NUMBERS_MAX:
                raw = self._bytes(count * scalar.size, key)
                return _Skipped(count, tuple(int(item[0]) for item in scalar.iter_unpack(raw)))
            self._skip(count * scalar.size, key)
        elif element_type == STRING:
            self._count_strings(count, key)
            if self._take_token is not None and key == TOKENS_KEY:
                for number in range(count):
                    self._take_token(number, self._bytes(self._length(TOKEN_BYTES_MAX, key), key))
            else:
                self._skip_strings(count, key)
        elif element_type == ARRAY:
            self._count_strings(count, key)  # An array in an array costs a step as well.
            for _ in range(count):
                self._array(key, depth=depth + 1)
        else:
            self._corrupted(f"the key {_shown(key)} has elements of type {element_type}, which is not known")
        return _Skipped(count)

    def _count_strings(self, count: int, key: str) -> None:
        self._array_strings += count
        if self._array_strings > ARRAY_STRINGS_MAX:
            self._corrupted(f"more than {ARRAY_STRINGS_MAX} texts in arrays, at the key {_shown(key)}")

    def _skip_strings(self, count: int, key: str) -> None:
        """Step over `count` strings: the one hot loop, hence its own copy of the window's rules."""
        unpack = _U64.unpack_from
        window, start = self._window, self._window_start
        position = self._position
        limit = start + len(window) - 8
        for _ in range(count):
            if position > limit:
                self._position = position
                self._fill(8, key)
                window, start = self._window, self._window_start
                limit = start + len(window) - 8
            length = unpack(window, position - start)[0]
            if length > STRING_BYTES_MAX:
                self._position = position
                self._corrupted(
                    f"the key {_shown(key)} has a text of {length} bytes, at most {STRING_BYTES_MAX} can be"
                )
            position += 8 + length
        self._position = position
        self._skip(0, key)

    # --- Bytes --------------------------------------------------------------------------------

    def _u32(self, where: str) -> int:
        value: int = _U32.unpack(self._bytes(4, where))[0]
        return value

    def _u64(self, where: str) -> int:
        value: int = _U64.unpack(self._bytes(8, where))[0]
        return value

    def _text(self, length_max: int, where: str) -> str:
        length = self._u64(where)
        if not 1 <= length <= length_max:
            self._corrupted(f"the name of {where} has {length} bytes, outside 1..{length_max}")
        text = self._bytes(length, where).decode("utf-8", "replace")
        return text if text.isprintable() else repr(text)

    def _bytes(self, count: int, where: str) -> bytes:
        start = self._position - self._window_start
        if start < 0 or start + count > len(self._window):
            self._fill(count, where)
            start = 0
        self._position += count
        return self._window[start : start + count]

    def _skip(self, count: int, where: str) -> None:
        self._position += count
        if self._position > self._size:
            self._truncated(where)
        if self._position > HEADER_BYTES_MAX:
            self._corrupted(f"the header is longer than {HEADER_BYTES_MAX} bytes, at {where}")

    def _fill(self, count: int, where: str) -> None:
        """Move the window to the position; it then holds at least `count` bytes."""
        self._skip(0, where)
        wanted = max(count, _WINDOW_BYTES)
        self._file.seek(self._position)
        parts = b""
        while len(parts) < count:
            part = self._file.read(wanted - len(parts))
            if not part:
                self._truncated(where)
            parts += part
        self._window, self._window_start = parts, self._position

    def _truncated(self, where: str) -> NoReturn:
        self._corrupted(f"the file ends at byte {self._size}, inside its header, at {where}")

    def _corrupted(self, message: str, **details: Any) -> NoReturn:
        raise ArrieroError(ErrorCode.MODEL_CORRUPTED, f"{self._name}: {message}", file=self._name, **details)


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text_or_empty(value: object) -> str:
    return value if isinstance(value, str) else ""


def _shown(value: object) -> str:
    """Return a value of the file as a message may hold it."""
    if isinstance(value, _Skipped):
        return f"a thing of {value.count} elements"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _quantisation(values: dict[str, Any], tensors: list[_Tensor]) -> str:
    """Return what the file says of itself, else the type that most of its bytes have."""
    number = _integer(values.get("general.file_type"))
    if number in FILE_TYPES:
        return FILE_TYPES[number]
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.type_name] += tensor.size
    return max(sizes, key=lambda name: (sizes[name], name), default="unknown")


def _bytes_of_all_parts(path: Path, size: int, count: int) -> int:
    """Return the model's bytes; a part that is not there (yet) counts nothing."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if count == 1 or match is None or int(match["count"]) != count:
        return size
    for number in range(2, count + 1):
        try:
            size += path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf").stat().st_size
        except OSError:
            continue
    return size
