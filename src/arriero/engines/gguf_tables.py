"""What do the two tables of a GGUF header hold, its keys and its tensors, and do they fit the file?

Nothing here knows of models: projectors and the further parts of a split model have the same tables.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from arriero.engines import model_file
from arriero.engines.gguf_types import (
    ALIGNMENT_MAX,
    ARRAY,
    ARRAY_ELEMENTS_MAX,
    DIMENSIONS_MAX,
    ELEMENTS_MAX,
    KEPT_STRING_BYTES_MAX,
    KEY_BYTES_MAX,
    KEYS_MAX,
    NESTING_MAX,
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
from arriero.engines.gguf_window import Budget, TakeToken, Window, shown

ALIGNMENT_KEY: Final = "general.alignment"
_INTEGERS: Final = frozenset({0, 1, 2, 3, 4, 5, 10, 11})
#: Keys whose arrays of numbers are kept: one number a layer.
_KEPT_NUMBERS: Final = (".head_count", ".head_count_kv")


@dataclass(slots=True)
class Tensor:
    """One tensor as the header describes it; `offset` counts from where the tensors' bytes begin."""

    name: str
    offset: int
    size: int
    elements: int
    type_name: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """What was stepped over: its length, what it is made of, and its numbers where they are wanted."""

    count: int
    #: None: a long text, not an array.
    element_type: int | None = None
    numbers: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"a thing of {self.count} elements"


@dataclass(frozen=True, slots=True)
class Tables:
    """What one header says; `types` are the numbers of the values' types."""

    values: dict[str, Any]
    types: dict[str, int]
    tensors: list[Tensor]
    #: Where the tensors' bytes begin.
    data_offset: int
    size_bytes: int


@contextmanager
def opened(path: Path, budget: Budget) -> Generator[Window, None, None]:
    """Open a file for reading its header; raises INVALID_MODEL_PATH if it is none or may not be read."""
    with model_file.opened(path) as file:
        yield Window(file.file, name=file.name, size=file.size_bytes, budget=budget)


def read(window: Window, take_token: TakeToken | None = None) -> Tables:
    """Read and check both tables; raises MODEL_CORRUPTED."""
    tensor_count, key_count = _preamble(window)
    values: dict[str, Any] = {}
    types: dict[str, int] = {}
    for number in range(key_count):
        where = f"key {number + 1} of {key_count}"
        key = window.text(KEY_BYTES_MAX, where)
        if key in values:
            window.corrupted(f"the key {shown(key)} occurs twice")
        types[key] = value_type = window.u32(where)
        values[key] = _value(window, value_type, key, take_token)
    tensors = [_tensor(window, number, tensor_count) for number in range(tensor_count)]
    alignment = integer(values.get(ALIGNMENT_KEY, 32))
    if alignment is None or not 1 <= alignment <= ALIGNMENT_MAX or alignment & (alignment - 1):
        window.corrupted(f"{ALIGNMENT_KEY} is {shown(values[ALIGNMENT_KEY])}, not a power of two")
    data_offset = window.position + -window.position % alignment
    _check_tensors(window, tensors, data_offset, alignment)
    window.finish()
    return Tables(values, types, tensors, data_offset, window.size)


def integer(value: object) -> int | None:
    """Return `value` if it is a whole number, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _preamble(window: Window) -> tuple[int, int]:
    if window.size < 4 or (magic := window.take(4, "the magic")) != b"GGUF":
        if window.size == 0:
            window.corrupted("the file is empty")
        seen = magic if window.size >= 4 else window.take(window.size, "the magic")
        window.corrupted(f"not a GGUF file: it begins with {seen!r}, not with b'GGUF'")
    version = window.u32("the version")
    if version not in (2, 3):
        if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, 2, 3):
            window.corrupted("a big-endian GGUF file; the engine reads little-endian ones")
        window.corrupted(f"GGUF version {version}; 2 and 3 can be read")
    tensor_count = window.u64("the number of tensors")
    key_count = window.u64("the number of keys")
    if tensor_count > TENSORS_MAX:
        window.corrupted(f"{tensor_count} tensors, at most {TENSORS_MAX} can be")
    if key_count > KEYS_MAX:
        window.corrupted(f"{key_count} keys, at most {KEYS_MAX} can be")
    return tensor_count, key_count


# --- Tensors -----------------------------------------------------------------------------------


def _tensor(window: Window, number: int, count: int) -> Tensor:
    where = f"tensor {number + 1} of {count}"
    name = window.text(TENSOR_NAME_BYTES_MAX, where)
    where = f"tensor {name}"
    dimensions = window.u32(where)
    if dimensions > DIMENSIONS_MAX:
        window.corrupted(f"{where} has {dimensions} dimensions, at most {DIMENSIONS_MAX} can be")
    shape = [window.u64(where) for _ in range(dimensions)]
    elements = 1
    for length in shape:
        elements *= length
        if not length >= 1 or elements > ELEMENTS_MAX:
            window.corrupted(f"{where} has the shape {shape}, which no tensor has")
    type_number = window.u32(where)
    if type_number not in TENSOR_TYPES:
        window.corrupted(f"{where} has the type {type_number}, which is not known")
    type_name, block, block_bytes = TENSOR_TYPES[type_number]
    row = shape[0] if shape else 1
    if row % block:
        window.corrupted(f"{where} has rows of {row}, not whole blocks of {block} ({type_name})")
    size = elements // block * block_bytes
    return Tensor(name, window.u64(where), size, elements, type_name)


def _check_tensors(window: Window, tensors: list[Tensor], data_offset: int, alignment: int) -> None:
    """Tensors lie one after the other, each aligned, all inside the file: so the engine wants it."""
    names: set[str] = set()
    expected = 0
    for tensor in tensors:
        if tensor.name in names:
            window.corrupted(f"tensor {tensor.name} occurs twice")
        names.add(tensor.name)
        if tensor.offset != expected:
            window.corrupted(
                f"tensor {tensor.name} begins at offset {tensor.offset}, where {expected} must be"
            )
        end = data_offset + tensor.offset + tensor.size
        if end > window.size:
            window.corrupted(
                f"tensor {tensor.name} ends at byte {end}, the file has {window.size}",
                expected_bytes=end,
                file_bytes=window.size,
            )
        expected = tensor.offset + tensor.size + -tensor.size % alignment


# --- Values ------------------------------------------------------------------------------------


def _value(window: Window, value_type: int, key: str, take_token: TakeToken | None) -> Any:
    """Return a number, a short string, or what is known of a thing that was stepped over."""
    scalar = SCALARS.get(value_type)
    if scalar is not None:
        return scalar.unpack(window.take(scalar.size, key))[0]
    if value_type == STRING:
        return _string(window, key)
    if value_type == ARRAY:
        return _array(window, key, take_token, depth=1)
    window.corrupted(f"the key {shown(key)} has the value type {value_type}, which is not known")


def _string(window: Window, key: str) -> Any:
    length = window.length(STRING_BYTES_MAX, key)
    if length > KEPT_STRING_BYTES_MAX or window.budget.kept_strings <= 0:
        window.skip(length, key)
        return Skipped(length)
    window.budget.kept_strings -= 1
    return window.take(length, key).decode("utf-8", "replace")


def _array(window: Window, key: str, take_token: TakeToken | None, *, depth: int) -> Skipped:
    if depth > NESTING_MAX:
        window.corrupted(f"the key {shown(key)} nests arrays deeper than {NESTING_MAX}")
    element_type = window.u32(key)
    count = window.u64(key)
    if count > ARRAY_ELEMENTS_MAX:
        window.corrupted(f"the key {shown(key)} has {count} elements, at most {ARRAY_ELEMENTS_MAX} can be")
    scalar = SCALARS.get(element_type)
    if scalar is not None:
        wants_numbers = depth == 1 and element_type in _INTEGERS and key.endswith(_KEPT_NUMBERS)
        if wants_numbers and count <= window.budget.kept_numbers:
            window.budget.kept_numbers -= count
            raw = window.take(count * scalar.size, key)
            return Skipped(count, element_type, tuple(item[0] for item in scalar.iter_unpack(raw)))
        window.skip(count * scalar.size, key)
    elif element_type == STRING:
        _strings(window, count, key, take_token if depth == 1 else None)
    elif element_type == ARRAY:
        window.budget.arrays -= count
        if window.budget.arrays < 0:
            window.corrupted(f"too many arrays in arrays, at the key {shown(key)}")
        for _ in range(count):
            _array(window, key, take_token, depth=depth + 1)
    else:
        window.corrupted(f"the key {shown(key)} has elements of type {element_type}, which is not known")
    return Skipped(count, element_type)


def _strings(window: Window, count: int, key: str, take_token: TakeToken | None) -> None:
    if key == TOKENS_KEY and count > VOCABULARY_MAX:
        window.corrupted(f"a vocabulary of {count} tokens, at most {VOCABULARY_MAX} can be")
    window.budget.array_strings -= count
    if window.budget.array_strings < 0:
        window.corrupted(f"too many texts in arrays, at the key {shown(key)}")
    if take_token is None or key != TOKENS_KEY:
        window.skip_strings(count, key)
        return
    for number in range(count):
        take_token(number, window.take(window.length(TOKEN_BYTES_MAX, key), key))
