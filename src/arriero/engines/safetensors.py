"""What does a safetensors file say of itself, and can its header be believed?

The header is one JSON object: for each tensor its type, shape and place, and `__metadata__`.  It is
read entry by entry and never built as a whole, so nothing that it nests or repeats costs memory, and a
key that occurs twice is seen (readers differ in which one they believe).
"""

import math
import re
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Final, NoReturn

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines.base import ModelFacts
from arriero.engines.model_file import opened

#: The format allows 100 MB; real headers have up to 10, and this is held in memory.
HEADER_BYTES_MAX: Final = 16 << 20
TENSORS_MAX: Final = 32_768
METADATA_KEYS_MAX: Final = 1_024
NAME_BYTES_MAX: Final = 1_024
#: A tensor's entry holds a type, two offsets and up to eight lengths.
ENTRY_BYTES_MAX: Final = 1_024
DIMENSIONS_MAX: Final = 8
LENGTH_MAX: Final = 1 << 48
PARAMETERS_MAX: Final = 1 << 53

#: Bits of one element.
TYPE_BITS: Final = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

# Possessive: nothing is tried twice, so a text of megabytes costs one pass and no memory.
_SPACE: Final = rb"[ \t\r\n]*+"
_TEXT: Final = rb'"[^"\\\x00-\x1f]*+(?:\\[^\x00-\x1f][^"\\\x00-\x1f]*+)*+"'
_NAME: Final = rb'"(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f]){0,%d}+"' % NAME_BYTES_MAX
_OPEN: Final = re.compile(_SPACE + rb"\{" + _SPACE + rb"(\})?")
_KEY: Final = re.compile(_SPACE + rb"(" + _NAME + rb")" + _SPACE + rb":" + _SPACE)
_VALUE: Final = re.compile(_TEXT)
#: All that a tensor's entry can be: an object without others in it, and no text of it has a brace.
_ENTRY: Final = re.compile(rb"\{[^{}]{0,%d}+\}" % ENTRY_BYTES_MAX)
_NEXT: Final = re.compile(_SPACE + rb"([,}])")
_ARCHITECTURE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ARCHITECTURE_KEYS: Final = ("general.architecture", "architecture", "modelspec.architecture")
_METADATA: Final = "__metadata__"

Length = Annotated[int, msgspec.Meta(ge=0, le=LENGTH_MAX)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[list[Length], msgspec.Meta(max_length=DIMENSIONS_MAX)]
    data_offsets: tuple[Length, Length]


_entries: Final = msgspec.json.Decoder(_Entry)
_texts: Final = msgspec.json.Decoder(str)


def is_safetensors(head: bytes, size_bytes: int) -> bool:
    """Return whether a file that begins with `head` (9 bytes or more) looks like one."""
    length = int.from_bytes(head[:8], "little")
    return len(head) >= 9 and head[8:9] == b"{" and 2 <= length <= size_bytes - 8


def inspect(path: Path) -> ModelFacts:
    """Return the facts of the model in `path`; what the file does not say is 0 or "unknown".

    Raises INVALID_MODEL_PATH (no such file, not a file, no rights) and MODEL_CORRUPTED (what is
    wrong, and where).
    """
    with opened(path) as file:
        reader = _Reader(file.name)
        if file.size_bytes < 8:
            reader.corrupted(f"{file.size_bytes} bytes are no safetensors file")
        length = int.from_bytes(file.read_at(0, 8), "little")
        if length > HEADER_BYTES_MAX:
            reader.corrupted(f"a header of {length} bytes, at most {HEADER_BYTES_MAX} can be")
        if length > file.size_bytes - 8:
            reader.corrupted(f"a header of {length} bytes in a file of {file.size_bytes}")
        reader.read(file.read_at(8, length))
        return reader.facts(file.size_bytes, data_bytes=file.size_bytes - 8 - length)


class _Reader:
    """One pass over one header."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._raw = b""
        self._position = 0
        self._metadata: dict[str, str] = {}
        self._spans: list[tuple[int, int]] = []
        self._elements = 0
        self._bytes_by_type: dict[str, int] = {}

    def read(self, raw: bytes) -> None:
        """Take the whole header."""
        self._raw = raw
        names: set[str] = set()
        for name in self._keys("the header", TENSORS_MAX + 1, names):
            if name == _METADATA:
                for key in self._keys(_METADATA, METADATA_KEYS_MAX, set()):
                    value = self._match(_VALUE, f"{_METADATA} has no text for the key {key[:40]!r}")[0]
                    self._metadata[key] = self._text(value) if len(value) <= NAME_BYTES_MAX else ""
            else:
                self._tensor(name, self._match(_ENTRY, f"tensor {name[:80]!r} has no entry as it must be")[0])
        if raw[self._position :].strip(b" "):
            self.corrupted(f"its header goes on after its end, at byte {self._position}")

    def _keys(self, where: str, count_max: int, seen: set[str]) -> Generator[str, None, None]:
        """Yield each key of the object that begins here; the caller steps over its value."""
        if self._match(_OPEN, f"{where} is no JSON object")[1]:
            return
        while True:
            otherwise = f"{where} is no JSON object with texts of up to {NAME_BYTES_MAX} bytes for keys"
            key = self._text(self._match(_KEY, otherwise)[1])
            if key in seen:
                self.corrupted(f"{where} has {key[:80]!r} twice")
            if len(seen) >= count_max:
                self.corrupted(f"{where} has more than {count_max} entries")
            seen.add(key)
            yield key
            if self._match(_NEXT, f"{where} is no JSON object")[1] == b"}":
                return

    def _match(self, pattern: re.Pattern[bytes], otherwise: str) -> re.Match[bytes]:
        match = pattern.match(self._raw, self._position)
        if match is None:
            self.corrupted(f"{otherwise}, at byte {self._position}")
        self._position = match.end()
        return match

    def _text(self, raw: bytes) -> str:
        try:
            return _texts.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self.corrupted(f"a text that is none, before byte {self._position}")

    def _tensor(self, name: str, raw: bytes) -> None:
        where = f"tensor {name[:80]!r}"
        try:
            entry = _entries.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            self.corrupted(f"{where} has no entry as it must be: {str(error)[:120]!r}")
        bits = TYPE_BITS.get(entry.dtype)
        if bits is None:
            self.corrupted(f"{where} has the type {entry.dtype[:40]!r}, which is not known")
        elements = math.prod(entry.shape)
        start, end = entry.data_offsets
        if elements > LENGTH_MAX or elements * bits != (end - start) * 8:
            self.corrupted(
                f"{where} has the shape {entry.shape} of {entry.dtype}, and {end - start} bytes for it"
            )
        self._elements += elements
        self._bytes_by_type[entry.dtype] = self._bytes_by_type.get(entry.dtype, 0) + end - start
        self._spans.append((start, end))

    def facts(self, size_bytes: int, *, data_bytes: int) -> ModelFacts:
        """Check that the tensors cover the rest of the file, each byte once, and return the facts."""
        expected = 0
        for start, end in sorted(self._spans):
            if start != expected:
                self.corrupted(f"a tensor begins at offset {start}, where {expected} must be")
            expected = end
        if expected != data_bytes:
            self.corrupted(f"its tensors end at offset {expected}, its bytes at {data_bytes}")
        if self._elements > PARAMETERS_MAX:
            self.corrupted(f"{self._elements} parameters, at most {PARAMETERS_MAX} can be")
        told = (self._metadata.get(key, "") for key in _ARCHITECTURE_KEYS)
        architecture = next((text for text in told if _ARCHITECTURE.fullmatch(text)), "unknown")
        types = self._bytes_by_type
        return ModelFacts(
            architecture=architecture,
            block_count=0,
            context_length=0,
            vocabulary_size=0,
            quantisation=max(types, key=lambda kind: (types[kind], kind), default="unknown"),
            parameters=self._elements,
            file_bytes=size_bytes,
            has_chat_template=False,
            is_embedding=False,
            format="safetensors",
        )

    def corrupted(self, message: str) -> NoReturn:
        """Raise MODEL_CORRUPTED, naming the file."""
        raise ArrieroError(ErrorCode.MODEL_CORRUPTED, f"{self._name}: {message}", file=self._name)
