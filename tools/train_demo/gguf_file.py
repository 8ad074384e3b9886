"""How is a GGUF file laid out? A writer and a reader for the few types the demo model uses."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Value: TypeAlias = int | float | bool | str | Sequence[str] | Sequence[int]
Floats: TypeAlias = NDArray[Any]

_MAGIC: Final = b"GGUF"
_VERSION: Final = 3
_ALIGNMENT: Final = 32
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_TYPE_F32, _TYPE_Q8_0 = 0, 8
#: Q8_0 keeps 32 weights as one float16 scale and 32 signed bytes.
_BLOCK_WEIGHTS: Final = 32
_BLOCK: Final = np.dtype([("scale", "<f2"), ("weights", "i1", (_BLOCK_WEIGHTS,))])


@dataclass(frozen=True)
class GgufFile:
    """What a file says: its metadata, and its tensors as float32."""

    metadata: Mapping[str, Value]
    tensors: Mapping[str, Floats]


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, Floats]) -> None:
    """Write a model file; matrices become Q8_0, vectors stay float32."""
    head = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        head.append(_string(key) + _tagged(value))
    body: list[bytes] = []
    offset = 0
    for name, tensor in tensors.items():
        kind = _TYPE_Q8_0 if tensor.ndim == 2 else _TYPE_F32
        packed = quantised(tensor).tobytes() if kind == _TYPE_Q8_0 else tensor.astype("<f4").tobytes()
        head.append(_string(name) + struct.pack("<I", tensor.ndim))
        head.append(struct.pack(f"<{tensor.ndim}Q", *reversed(tensor.shape)))
        head.append(struct.pack("<IQ", kind, offset))
        body.append(packed + _padding(len(packed)))
        offset += len(body[-1])
    start = b"".join(head)
    path.write_bytes(start + _padding(len(start)) + b"".join(body))


def read_gguf(path: Path) -> GgufFile:
    """Return what `write_gguf` wrote, the weights as the engine sees them."""
    reader = _Reader(path.read_bytes())
    if reader.take(4) != _MAGIC or reader.number("<I") != _VERSION:
        raise ValueError(f"{path.name} is no GGUF file of version {_VERSION}")
    tensor_count, metadata_count = reader.number("<Q"), reader.number("<Q")
    metadata = {}
    for _ in range(metadata_count):
        key = reader.string()
        metadata[key] = reader.value(reader.number("<I"))
    places: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(tensor_count):
        name, dimensions = reader.string(), reader.number("<I")
        shape = tuple(reversed([reader.number("<Q") for _ in range(dimensions)]))
        places.append((name, shape, reader.number("<I"), reader.number("<Q")))
    start = reader.position + len(_padding(reader.position))
    tensors: dict[str, Floats] = {}
    for name, shape, kind, offset in places:
        count = int(np.prod(shape))
        if kind == _TYPE_Q8_0:
            blocks = np.frombuffer(reader.content, _BLOCK, count // _BLOCK_WEIGHTS, start + offset)
            flat = dequantised(blocks)
        else:
            flat = np.frombuffer(reader.content, "<f4", count, start + offset).astype(np.float32)
        tensors[name] = flat.reshape(shape)
    return GgufFile(metadata, tensors)


def quantised(matrix: Floats) -> NDArray[np.void]:
    """Return a matrix as Q8_0 blocks, rounded as llama.cpp does."""
    groups = matrix.reshape(-1, _BLOCK_WEIGHTS)
    scales = np.abs(groups).max(axis=1) / np.float32(127)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    scaled = groups * inverse[:, None]
    blocks: NDArray[np.void] = np.zeros(len(groups), _BLOCK)
    blocks["scale"] = scales
    blocks["weights"] = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    return blocks


def dequantised(blocks: NDArray[np.void]) -> Floats:
    """Return the weights of Q8_0 blocks, flat."""
    scales = blocks["scale"].astype(np.float32)[:, None]
    flat: Floats = (scales * blocks["weights"].astype(np.float32)).reshape(-1)
    return flat


class _Reader:
    """Takes values off the front of a file's content."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def take(self, length: int) -> bytes:
        taken = self.content[self.position : self.position + length]
        if len(taken) < length:
            raise ValueError(f"the file ends at byte {len(self.content)}")
        self.position += length
        return taken

    def number(self, layout: str) -> int:
        return int(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])

    def string(self) -> str:
        return self.take(self.number("<Q")).decode("utf-8")

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind == _BOOL:
            return bool(self.take(1)[0])
        if kind == _FLOAT32:
            return float(struct.unpack("<f", self.take(4))[0])
        if kind == _ARRAY:
            element, length = self.number("<I"), self.number("<Q")
            if element == _STRING:
                return [self.string() for _ in range(length)]
            return [self.number("<i") for _ in range(length)]
        return self.number("<I")


def _tagged(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    strings = [element for element in value if isinstance(element, str)]
    if strings:
        packed = b"".join(_string(element) for element in strings)
        return struct.pack("<IIQ", _ARRAY, _STRING, len(strings)) + packed
    return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)


def _string(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _padding(length: int) -> bytes:
    return bytes(-length % _ALIGNMENT)
