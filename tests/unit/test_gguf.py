"""Is a GGUF header read right, in little time and memory, and is no broken one believed?"""

import errno
import math
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines import gguf, gguf_types
from arriero.engines.gguf_types import SCALARS, TENSOR_TYPES
from arriero.testing import gguf_writer as w

Edit = Callable[[w.GgufFile], object]


def refused(path: Path, code: ErrorCode = ErrorCode.MODEL_CORRUPTED) -> str:
    with pytest.raises(ArrieroError) as caught:
        gguf.inspect(path)
    assert caught.value.code is code
    assert str(path.parent) not in f"{caught.value.message} {caught.value.details}"
    return caught.value.message


def test_facts_of_a_llama(tmp_path: Path) -> None:
    path = w.write_llama(tmp_path / "tiny.gguf")
    header = gguf.read_header(path)
    facts = header.facts
    assert (facts.architecture, facts.name, facts.quantisation) == ("llama", "random llama", "F16")
    assert (facts.block_count, facts.context_length, facts.vocabulary_size) == (2, 4096, 272)
    assert (facts.format, facts.head_count, facts.head_count_kv, facts.embedding_length) == ("gguf", 4, 2, 64)
    assert facts.file_bytes == path.stat().st_size
    assert facts.has_chat_template
    assert not facts.is_embedding
    assert facts.parameters == sum(tensor.size_bytes() // 2 for tensor in w.llama_file().tensors) - 5 * 64
    assert (header.heads_kv_sum, header.key_length, header.value_length) == (4, 16, 16)
    assert header.data_offset % 32 == 0


def test_version_2_is_read_too(tmp_path: Path) -> None:
    file = w.llama_file()
    file.version = 2
    assert gguf.inspect(file.write(tmp_path / "m.gguf")).block_count == 2


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda f: setattr(f, "magic", b"GGML"), "begins with b'GGML'"),
        (lambda f: setattr(f, "version", 1), "version 1"),
        (lambda f: setattr(f, "version", 0x03000000), "big-endian"),
        (lambda f: setattr(f, "version", 77), "version 77"),
        (lambda f: setattr(f, "claimed_tensors", 1 << 63), "9223372036854775808 tensors"),
        (lambda f: setattr(f, "claimed_keys", 1 << 40), "1099511627776 keys"),
        (lambda f: f.remove("general.architecture"), "general.architecture is missing"),
        (lambda f: f.set("general.architecture", w.U32, 5), "general.architecture is missing"),
        (lambda f: f.set("general.type", w.STRING, "adapter"), "'adapter', not a model"),
        (lambda f: f.remove("llama.block_count"), "llama.block_count is missing"),
        (lambda f: f.set("llama.block_count", w.U32, 0), "is 0, outside 1..512"),
        (lambda f: f.set("llama.block_count", w.U32, 513), "is 513, outside 1..512"),
        (lambda f: f.set("llama.block_count", w.F32, 2.0), "is 2.0, outside"),
        (lambda f: f.set("llama.block_count", w.BOOL, True), "is True, outside"),
        (lambda f: f.set("llama.block_count", w.ARRAY, (w.U32, [2])), "a thing of 1 elements"),
        (lambda f: f.remove("llama.context_length"), "context_length is missing"),
        (lambda f: f.set("llama.context_length", w.I64, -1), "is -1, outside"),
        (lambda f: f.set("llama.embedding_length", w.U32, 1 << 30), "embedding_length is 1073741824"),
        (lambda f: f.set("llama.attention.head_count", w.I32, -7), "head_count is -7"),
        (lambda f: f.set("llama.attention.head_count_kv", w.I64, -(1 << 62)), "head_count_kv is -46116"),
        (lambda f: f.set("llama.attention.head_count_kv", w.ARRAY, (w.I32, [2, -2])), "head_count_kv is -2"),
        (lambda f: f.set("llama.attention.key_length", w.U64, 1 << 63), "key_length is 92233"),
        (lambda f: f.set("general.architecture", w.STRING, "\x1b[2J"), "'\\x1b[2J', no plain word"),
        (lambda f: f.set("general.architecture", w.STRING, "a" * 65), "no plain word"),
        (
            lambda f: f.set("llama.vocab_size", w.U32, 1 << 31) or f.remove("tokenizer.ggml.tokens"),
            "a vocabulary of 2147",
        ),
        (
            lambda f: f.set("tokenizer.ggml.tokens", w.ARRAY, struct.pack("<IQ", 8, 1 << 20)),
            "a vocabulary of 1048576",
        ),
        (lambda f: f.set("general.alignment", w.U32, 0), "general.alignment is 0"),
        (lambda f: f.set("general.alignment", w.U32, 48), "general.alignment is 48"),
        (lambda f: f.set("general.alignment", w.STRING, "x"), "general.alignment is 'x'"),
        (lambda f: f.set("split.count", w.U16, 3) or f.set("split.no", w.U16, 1), "part 2 of 3"),
        (lambda f: f.keys.append(f.keys[3]), "'general.file_type' occurs twice"),
        (lambda f: f.keys.append(("", w.U32, 1)), "has 0 bytes"),
        (lambda f: f.keys.insert(0, ("llama.block_count\0x", w.U32, 9)), "key 1 of 24 holds a zero byte"),
        (lambda f: f.keys.append(("k" * 2000, w.U32, 1)), "has 2000 bytes"),
        (lambda f: f.keys.append(("x", 13, b"")), "value type 13"),
        (lambda f: f.keys.append(("x", w.STRING, struct.pack("<Q", 1 << 62))), "a text of 4611686018"),
        (lambda f: f.keys.append(("x", w.ARRAY, struct.pack("<IQ", 4, 1 << 60))), "elements, at most"),
        (lambda f: f.keys.append(("x", w.ARRAY, struct.pack("<IQ", 99, 1))), "elements of type 99"),
        (lambda f: f.keys.append(("x", w.ARRAY, struct.pack("<IQ", 8, 1 << 28))), "texts in arrays"),
        (lambda f: f.keys.append(("x", w.ARRAY, struct.pack("<IQ", 9, 1 << 28))), "arrays in arrays"),
        (lambda f: f.keys.append(("x", w.ARRAY, struct.pack("<IQ", 9, 10_001))), "arrays in arrays"),
        (lambda f: f.keys.append(("x", w.ARRAY, struct.pack("<IQ", 9, 1) * 9)), "deeper than 4"),
        (lambda f: f.keys.append(("x", w.ARRAY, struct.pack("<IQ", 4, 1 << 27))), "inside its header"),
        (lambda f: setattr(f.tensors[3], "claimed_dimensions", 5), "5 dimensions"),
        (lambda f: setattr(f.tensors[3], "shape", (0,)), "the shape [0]"),
        (lambda f: setattr(f.tensors[3], "shape", (1 << 62, 4)), "which no tensor has"),
        (lambda f: setattr(f.tensors[3], "type_number", 4), "type 4, which is not known"),
        (lambda f: setattr(f.tensors[3], "type_number", 12), "whole blocks of 256 (Q4_K)"),
        (lambda f: setattr(f.tensors[3], "name", "n" * 64), "has 64 bytes"),
        (lambda f: setattr(f.tensors[3], "name", "output.weight\0"), "tensor 4 of 21 holds a zero byte"),
        (lambda f: setattr(f.tensors[3], "name", "output.weight"), "output.weight occurs twice"),
        (lambda f: setattr(f.tensors[3], "claimed_offset", 33), "begins at offset 33"),
        (lambda f: setattr(f.tensors[3], "claimed_offset", 0), "begins at offset 0"),
    ],
)
def test_nonsense_is_refused_and_named(tmp_path: Path, edit: Edit, says: str) -> None:
    file = w.llama_file()
    edit(file)
    path = tmp_path / "m.gguf"
    # The header alone: the tensors of some of these would have no end.
    path.write_bytes(file.header() + b"\0" * 300_000)
    message = refused(path)
    assert message.startswith("m.gguf: ")
    assert says in message


def test_a_cut_file_says_where(tmp_path: Path) -> None:
    whole = w.write_llama(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:-1])
    size = len(whole)
    message = refused(path)
    assert message == f"cut.gguf: tensor blk.1.ffn_down.weight ends at byte {size}, the file has {size - 1}"
    header_size = len(w.llama_file().header())
    for length in (0, 3, 4, 7, 20, 24, 30, 500, header_size // 2, header_size - 40):
        path.write_bytes(whole[:length])
        assert "cut.gguf: " in refused(path)
    path.write_bytes(whole[:500])
    assert "ends at byte 500, inside its header" in refused(path)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.gguf", ErrorCode.INVALID_MODEL_PATH) == "none.gguf: no such file"
    folder = tmp_path / "folder.gguf"
    folder.mkdir()
    assert "not a regular file" in refused(folder, ErrorCode.INVALID_MODEL_PATH)
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    assert "not a regular file" in refused(pipe, ErrorCode.INVALID_MODEL_PATH)
    file = tmp_path / "file"
    file.touch()
    expected = os.strerror(errno.ENOTDIR)
    assert expected in refused(file / "m.gguf", ErrorCode.INVALID_MODEL_PATH)
    with pytest.raises(ArrieroError) as caught:
        gguf.inspect(Path("a\0b.gguf"))
    assert caught.value.code is ErrorCode.INVALID_MODEL_PATH


def test_a_name_that_is_no_utf8_can_be_told(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.gguf")
    message = refused(tmp_path / name, ErrorCode.INVALID_MODEL_PATH)
    assert message.encode() == b"caf?.gguf: no such file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_rights(tmp_path: Path) -> None:
    path = w.write_llama(tmp_path / "m.gguf")
    path.chmod(0)
    assert "no rights" in refused(path, ErrorCode.INVALID_MODEL_PATH)


@pytest.mark.parametrize(
    ("edit", "is_embedding"),
    [
        (lambda f: None, False),
        (lambda f: f.set("llama.pooling_type", w.U32, 0), False),
        (lambda f: f.set("llama.pooling_type", w.U32, 1), True),
        (lambda f: f.set("llama.pooling_type", w.U32, 3), True),
    ],
)
def test_embedding_models_are_known_by_their_pooling(tmp_path: Path, edit: Edit, is_embedding: bool) -> None:
    file = w.llama_file()
    edit(file)
    assert gguf.inspect(file.write(tmp_path / "m.gguf")).is_embedding is is_embedding


def test_embedding_models_are_known_by_their_architecture(tmp_path: Path) -> None:
    file = w.llama_file()
    file.keys = [(key.replace("llama.", "nomic-bert."), kind, value) for key, kind, value in file.keys]
    file.set("general.architecture", w.STRING, "nomic-bert")
    assert gguf.inspect(file.write(tmp_path / "m.gguf")).is_embedding


def test_quantisation_is_what_most_bytes_are_where_the_file_does_not_say(tmp_path: Path) -> None:
    file = w.llama_file(w.LlamaShape(tensor_type=w.TENSOR_F32))
    file.remove("general.file_type")
    assert gguf.inspect(file.write(tmp_path / "m.gguf")).quantisation == "F32"
    file.set("general.file_type", w.U32, 15)
    assert gguf.inspect(file.write(tmp_path / "m.gguf")).quantisation == "Q4_K_M"
    file.set("general.file_type", w.U32, 4_000)
    assert gguf.inspect(file.write(tmp_path / "m.gguf")).quantisation == "F32"


def test_heads_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    file = w.llama_file()
    file.set("llama.attention.head_count_kv", w.ARRAY, (w.U32, [1, 4]))
    header = gguf.read_header(file.write(tmp_path / "m.gguf"))
    assert (header.heads_kv_sum, header.facts.head_count, header.facts.head_count_kv) == (5, 4, 4)
    file.set("llama.attention.head_count", w.ARRAY, (w.U32, [8, 2]))
    assert gguf.inspect(file.write(tmp_path / "m.gguf")).head_count == 8


def test_numbers_that_are_none_are_no_heads(tmp_path: Path) -> None:
    file = w.llama_file()
    file.set("llama.attention.head_count_kv", w.ARRAY, (w.F32, [math.nan, math.inf]))
    assert gguf.inspect(file.write(tmp_path / "m.gguf")).head_count_kv == 4


def test_every_tensor_type_is_known_to_the_engine_by_the_same_number() -> None:
    engine = pytest.importorskip("xllamacpp")
    theirs = {kind.value: kind.name.removeprefix("GGML_TYPE_") for kind in engine.ggml_type}
    theirs.pop(max(theirs))  # The count.
    assert {number: name for number, (name, _, _) in TENSOR_TYPES.items()} == theirs


def large_vocabulary(path: Path, count: int) -> Path:
    file = w.llama_file()
    file.set("tokenizer.ggml.tokens", w.ARRAY, (w.STRING, [f"token{i}" for i in range(count)]))
    file.set("tokenizer.ggml.scores", w.ARRAY, (w.F32, [0.0] * count))
    file.set("tokenizer.ggml.token_type", w.ARRAY, (w.I32, [1] * count))
    file.set("tokenizer.ggml.merges", w.ARRAY, (w.STRING, [f"a b{i}" for i in range(2 * count)]))
    file.set("tokenizer.chat_template", w.STRING, "x" * 1_000_000)
    return file.write(path)


@pytest.mark.costly
def test_a_large_vocabulary_is_stepped_over(tmp_path: Path) -> None:
    """It took 0.15 s of CPU when this was written; the test's own limit is what bounds it here."""
    path = large_vocabulary(tmp_path / "m.gguf", 150_000)
    assert gguf.inspect(path).vocabulary_size == 150_000


@pytest.mark.costly
def test_a_large_vocabulary_costs_no_memory(tmp_path: Path) -> None:
    # Fewer than above, since the tracing is slow; still many times the window.
    path = large_vocabulary(tmp_path / "m.gguf", 30_000)
    gguf.inspect(path)
    tracemalloc.start()
    try:
        gguf.inspect(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_hole_of_many_gigabytes_is_not_read(tmp_path: Path) -> None:
    file = w.llama_file()
    file.keys.append(("x", w.ARRAY, struct.pack("<IQ", w.STRING, 2_000_000)))
    path = tmp_path / "m.gguf"
    path.write_bytes(file.header()[:-64] + struct.pack("<Q", gguf_types.STRING_BYTES_MAX))
    os.truncate(path, 1 << 40)
    refused(path)


# --- The worst there can be: steps and memory have a bound, whatever is claimed -------------------


def header_only(path: Path, file: w.GgufFile) -> Path:
    path.write_bytes(file.header())
    os.truncate(path, 1 << 33)
    return path


def most_memory(path: Path) -> int:
    tracemalloc.start()
    try:
        gguf.inspect(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_arrays_of_numbers_that_nobody_asked_for_are_not_kept(tmp_path: Path) -> None:
    """They were, for each key that ended in the right word: 177 MB for a file of 32 MB."""
    file = w.llama_file()
    numbers = struct.pack("<IQ", w.U64, 1000) + struct.pack("<1000Q", *range(1 << 63, (1 << 63) + 1000))
    file.keys += [(f"{number}.head_count_kv", w.ARRAY, numbers) for number in range(4000)]
    assert most_memory(header_only(tmp_path / "m.gguf", file)) < 8_000_000


@pytest.mark.costly
def test_many_long_names_cost_little_more_than_themselves(tmp_path: Path) -> None:
    """A part of what can be, since the tracing is slow: so a quarter of 64 MB."""
    file = w.llama_file()
    file.keys += [(f"{number}" + "\x01" * 1000, w.STRING, "\x01" * 512) for number in range(1_000)]
    file.tensors = [w.Tensor(f"{number:05}" + "\u200b" * 19, (1, 1, 1, 1), 0) for number in range(8_192)]
    assert most_memory(header_only(tmp_path / "m.gguf", file)) < 16_000_000


# --- Values that the engine would abort on --------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda f: f.set("llama.expert_count", w.U32, 1000), "expert_count is 1000, outside 0..512"),
        (lambda f: f.set("llama.expert_used_count", w.U32, 2), "expert_used_count is 2, outside 0..0"),
        (lambda f: f.set("llama.expert_count", w.U32, 8), "expert_used_count is 0, outside 1..8"),
        (
            lambda f: f.set("llama.attention.layer_norm_rms_epsilon", w.F32, -1.0),
            "epsilon is -1.0, less than 0",
        ),
        (lambda f: f.set("llama.attention.layer_norm_rms_epsilon", w.F32, math.nan), "epsilon is nan"),
        (lambda f: f.set("llama.rope.scaling.type", w.STRING, "yarnn"), "'yarnn', none of linear, longrope,"),
        (lambda f: f.set("llama.rope.scaling.type", w.STRING, "x" * 600), "a thing of 600 elements, none of"),
        (lambda f: f.set("llama.pooling_type", w.U32, 5), "pooling_type is 5, outside 0..4"),
        (lambda f: f.set("tokenizer.ggml.model", w.STRING, "none"), "no tokenizer"),
        (
            lambda f: setattr(f.tensors[1], "type_number", w.TENSOR_F16),
            "output_norm.weight has the type F16; norms",
        ),
        (lambda f: setattr(f.tensors[4], "type_number", 25), "attn_q.weight has the type I16, which weights"),
        (
            lambda f: setattr(f.tensors[0], "type_number", 28),
            "token_embd.weight has the type F64, which weights",
        ),
    ],
)
def test_what_the_engine_would_abort_on_is_refused(tmp_path: Path, edit: Edit, says: str) -> None:
    file = w.llama_file()
    edit(file)
    offset = 0
    for tensor in file.tensors:
        elements = math.prod(tensor.shape)
        size = elements // TENSOR_TYPES[tensor.type_number][1] * TENSOR_TYPES[tensor.type_number][2]
        tensor.claimed_offset, offset = offset, offset + size + -size % 32
    assert says in refused(header_only(tmp_path / "m.gguf", file))


# --- Mutations -----------------------------------------------------------------------------------

_INTERESTING = st.sampled_from(
    [0, 1, 2, 8, 9, 31, 63, 255, 1 << 16, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1]
)


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """A llama's header, with some of its parts, lengths and bytes replaced."""
    file = w.llama_file()
    for _ in range(draw(st.integers(0, 3))):
        index = draw(st.integers(0, len(file.keys) - 1))
        key, kind, value = file.keys[index]
        action = draw(st.sampled_from(["drop", "kind", "number", "double", "raw"]))
        if action == "drop":
            del file.keys[index]
        elif action == "kind":
            scalar = draw(st.sampled_from(sorted(SCALARS)))
            file.keys[index] = (key, scalar, SCALARS[scalar].pack(0))
        elif action == "number":
            file.keys[index] = (key, w.U64, draw(_INTERESTING))
        elif action == "double":
            file.keys.append((key, kind, value))
        else:
            file.keys[index] = (key, kind, draw(st.binary(max_size=40)))
    for _ in range(draw(st.integers(0, 2))):
        tensor = draw(st.sampled_from(file.tensors))
        field = draw(st.sampled_from(["claimed_offset", "claimed_dimensions", "type_number"]))
        limit = (1 << 64) if field == "claimed_offset" else (1 << 32)
        setattr(tensor, field, draw(_INTERESTING) % limit)
    raw = bytearray(file.header() + b"\0" * 220_000)
    for _ in range(draw(st.integers(0, 4))):
        position = draw(st.integers(0, 7_000))
        raw[position : position + 8] = struct.pack("<Q", draw(_INTERESTING))
    return bytes(raw[: draw(st.sampled_from([len(raw), 100, 2_000, 6_000, 100_000]))])


@pytest.mark.costly
@given(raw=mutated_files())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_file_it_is_facts_or_one_of_our_errors(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    try:
        facts = gguf.inspect(path)
    except ArrieroError as error:
        assert error.code is ErrorCode.MODEL_CORRUPTED
        assert len(error.message) < 600
    else:
        assert 1 <= facts.block_count <= 512
        assert facts.file_bytes == len(raw)
