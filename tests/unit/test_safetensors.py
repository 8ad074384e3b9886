"""Is a safetensors header read right, and is no broken one believed, at whatever cost it claims?"""

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines import formats, safetensors

GOOD: dict[str, Any] = {
    "__metadata__": {"format": "pt", "general.architecture": "llama", "note": 'a "quoted" {brace}, \\ and ü'},
    "b": {"dtype": "F16", "shape": [3, 4], "data_offsets": [8, 32]},
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "empty": {"dtype": "U8", "shape": [0, 5], "data_offsets": [32, 32]},
    "scalar": {"dtype": "F64", "shape": [], "data_offsets": [32, 40]},
    "half": {"dtype": "F4", "shape": [4], "data_offsets": [40, 42]},
}


def write(path: Path, header: dict[str, Any] | bytes, data: int = 42, *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data))
    return path


def refused(path: Path) -> str:
    with pytest.raises(ArrieroError) as caught:
        safetensors.inspect(path)
    assert caught.value.code is ErrorCode.MODEL_CORRUPTED
    assert str(path.parent) not in caught.value.message
    assert len(caught.value.message) < 600
    return caught.value.message


def test_facts(tmp_path: Path) -> None:
    for raw in (json.dumps(GOOD).encode(), json.dumps(GOOD, indent=2, ensure_ascii=False).encode() + b"   "):
        facts = formats.inspect_model(write(tmp_path / "m.safetensors", raw))
        assert (facts.format, facts.architecture, facts.quantisation) == ("safetensors", "llama", "F16")
        assert facts.parameters == 12 + 2 + 1 + 4
        assert facts.file_bytes == (tmp_path / "m.safetensors").stat().st_size


def test_what_it_does_not_say_is_unknown(tmp_path: Path) -> None:
    header = {"a": GOOD["a"], "__metadata__": {"architecture": "\x1b[2J"}}
    facts = safetensors.inspect(write(tmp_path / "m.safetensors", header, 8))
    assert (facts.architecture, facts.block_count, facts.quantisation) == ("unknown", 0, "F32")
    assert safetensors.inspect(write(tmp_path / "m.safetensors", b"{}", 0)).parameters == 0


def entry(**fields: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **fields}}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (entry(dtype="F33"), "the type 'F33', which is not known"),
        (entry(dtype=5), "no entry as it must be"),
        (entry(dtype="F16"), "the shape [2] of F16, and 8 bytes for it"),
        (entry(shape=[2, 2]), "the shape [2, 2] of F32, and 8 bytes for it"),
        (entry(shape=[-2]), "no entry as it must be"),
        (entry(shape=[1 << 40, 1 << 40]), "for it"),
        (entry(shape=[1] * 9 + [2]), "no entry as it must be"),
        (entry(shape=[2.0]), "no entry as it must be"),
        (entry(shape="2"), "no entry as it must be"),
        (entry(shape=[[2]]), "no entry as it must be"),
        (entry(data_offsets=[8, 0]), "and -8 bytes for it"),
        (entry(data_offsets=[0]), "no entry as it must be"),
        (entry(data_offsets=[0, 1 << 63]), "no entry as it must be"),
        (entry(more=1), "no entry as it must be"),
        (entry(more={}), "no entry as it must be"),
        (entry(more="x" * 1100), "no entry as it must be"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "no entry as it must be"),
        ({"a": [1]}, "no entry as it must be"),
        ({"a": None}, "no entry as it must be"),
        (entry(data_offsets=[4, 12]), "begins at offset 4, where 0 must be"),
        ({**entry(), "b": entry()["a"]}, "begins at offset 0, where 8 must be"),
        ({**entry(), "b": entry(data_offsets=[4, 12])["a"]}, "begins at offset 4, where 8 must be"),
        ({**entry(), "b": entry(data_offsets=[16, 24])["a"]}, "begins at offset 16, where 8 must be"),
        ({"a" * 1100: entry()["a"]}, "no JSON object with texts of up to 1024 bytes"),
        ({"__metadata__": {"a": 1}}, "no text for the key 'a'"),
        ({"__metadata__": {"a": {}}}, "no text for the key 'a'"),
        ({"__metadata__": [1]}, "__metadata__ is no JSON object"),
        ({"__metadata__": {str(number): "" for number in range(1025)}}, "more than 1024 entries"),
        (b"", "is no JSON object"),
        (b"[]", "is no JSON object"),
        (b"{", "is no JSON object"),
        (b'{"a"', "is no JSON object"),
        (b'{"\xff":{}}', "a text that is none"),
        (b'{"\\ud800":{}}', "a text that is none"),
        (b'{"a\n":{}}', "is no JSON object with texts"),
        (b'{"a":{}}', "no entry as it must be"),
        (b"{}{}", "goes on after its end"),
        (json.dumps(entry()).encode()[:-1] + b",}", "is no JSON object with texts"),
        (json.dumps(entry()).encode()[:-1] + b"," + json.dumps(entry()).encode()[1:], "has 'a' twice"),
        (b"\xef\xbb\xbf" + json.dumps(entry()).encode(), "is no JSON object"),
    ],
)
def test_nonsense_is_refused_and_named(tmp_path: Path, header: dict[str, Any] | bytes, says: str) -> None:
    message = refused(write(tmp_path / "m.safetensors", header, 8))
    assert message.startswith("m.safetensors: ")
    assert says in message


def test_the_tensors_cover_the_file_exactly(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    assert "its tensors end at offset 42, its bytes at 41" in refused(write(path, GOOD, 41))
    assert "its tensors end at offset 42, its bytes at 43" in refused(write(path, GOOD, 43))
    assert "in a file of" in refused(write(path, GOOD, 0, length=1 << 20))
    assert "at most 16777216 can be" in refused(write(path, GOOD, 42, length=100_000_000))
    path.write_bytes(b"\0\0\0")
    assert "3 bytes are no safetensors file" in refused(path)
    os.truncate(path, 1 << 33)
    assert "is no JSON object" in refused(path)


def tensors(count: int) -> bytes:
    entry = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(entry % number for number in range(count)) + b"}"


def worst_cases() -> dict[str, bytes]:
    size = safetensors.HEADER_BYTES_MAX
    return {
        "nested lists": b'{"a":' + b"[" * (size - 5),
        "nested objects": b'{"a":' * (size // 5),
        "one text": b'{"' + b"x" * (size - 2),
        "one long name": b'{"' + b"x" * (size - 10) + b'":{}}',
        "escapes": b'{"' + b"\\u0000" * (size // 6 - 2),
        "numbers": b'{"a":{"dtype":"U8","data_offsets":[0,0],"shape":[' + b"1," * (size // 2 - 40),
        "metadata": b'{"__metadata__":{"a":"' + b"\\n" * (size // 2 - 30) + b'"}}',
        "spaces": b"{" + b" " * (size - 1),
        "spaces inside": b'{"a":' + b" " * (size - 5),
        "names": b"{" + b'"a":{},' * (size // 7),
        # An eighth of what can be, since the tracing is slow.
        "many tensors": tensors(safetensors.TENSORS_MAX // 8),
    }


@pytest.mark.costly
@pytest.mark.parametrize("name", worst_cases())
def test_no_header_costs_much(tmp_path: Path, name: str) -> None:
    """Each took under half a second of CPU when this was written; the test's own limit is what bounds it here."""
    path = write(tmp_path / "m.safetensors", worst_cases()[name], 0)
    is_believed = False
    tracemalloc.start()
    try:
        safetensors.inspect(path)
        is_believed = True
    except ArrieroError as error:
        assert error.code is ErrorCode.MODEL_CORRUPTED
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert is_believed == (name in ("many tensors", "metadata"))
    assert most < (8_000_000 if name == "many tensors" else 64_000_000)


@pytest.mark.costly
def test_the_number_of_tensors_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    assert safetensors.inspect(write(path, tensors(safetensors.TENSORS_MAX), 0)).parameters == 0
    assert "more than 32769 entries" in refused(write(path, tensors(safetensors.TENSORS_MAX + 2), 0))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    raw = bytearray(json.dumps(GOOD).encode())
    for _ in range(draw(st.integers(0, 4))):
        position = draw(st.integers(0, len(raw) - 1))
        piece = draw(
            st.sampled_from(
                [b"", b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"-1", b"9" * 30, b"1e9", b"null"]
            )
        )
        raw[position : position + draw(st.integers(0, 9))] = piece
    return bytes(raw)


@pytest.mark.costly
@given(raw=mutated(), data=st.sampled_from([42, 42, 42, 0, 41, 1000]))
@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_header_it_is_facts_or_one_of_our_errors(tmp_path: Path, raw: bytes, data: int) -> None:
    path = write(tmp_path / "m.safetensors", raw, data)
    try:
        facts = safetensors.inspect(path)
    except ArrieroError as error:
        assert error.code is ErrorCode.MODEL_CORRUPTED
        assert len(error.message) < 600
        assert error.message.isprintable()
    else:
        # What is believed, a parser that builds everything believes, too.
        tensors = {name: told for name, told in json.loads(raw).items() if name != "__metadata__"}
        assert max(told["data_offsets"][1] for told in tensors.values()) == data
        assert facts.file_bytes == 8 + len(raw) + data
