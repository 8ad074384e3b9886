"""Are all parts of a split model checked with its first, and is the bad one named?"""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines import gguf
from arriero.testing import gguf_writer as w

SIZES = (8, 7, 6)


def parts(**counts: int) -> list[w.GgufFile]:
    """Return a llama in three parts: its keys in the first, its tensors shared out."""
    whole = w.llama_file()
    files = [w.GgufFile(keys=list(whole.keys))] + [w.GgufFile() for _ in SIZES[1:]]
    rest = whole.tensors
    for number, (file, size) in enumerate(zip(files, SIZES, strict=True)):
        file.tensors, rest = rest[:size], rest[size:]
        file.set("split.no", w.U16, number)
        file.set("split.count", w.U16, counts.get("count", len(SIZES)))
        file.set("split.tensors.count", w.I32, counts.get("tensors", sum(SIZES)))
    assert not rest
    return files


def write(folder: Path, files: list[w.GgufFile]) -> Path:
    for number, file in enumerate(files, 1):
        file.write(folder / f"big-{number:05}-of-{len(files):05}.gguf")
    return folder / f"big-00001-of-{len(files):05}.gguf"


def refused(first: Path, code: ErrorCode = ErrorCode.MODEL_CORRUPTED) -> str:
    with pytest.raises(ArrieroError) as caught:
        gguf.inspect(first)
    assert caught.value.code is code
    assert str(first.parent) not in caught.value.message
    assert caught.value.message.startswith(f"{caught.value.details['file']}: ")
    return caught.value.message


def test_a_split_model_has_the_facts_of_the_whole(tmp_path: Path) -> None:
    first = write(tmp_path, parts())
    whole = gguf.inspect(w.write_llama(tmp_path / "whole.gguf"))
    header = gguf.read_header(first)
    assert header.split_count == 3
    assert header.facts.parameters == whole.parameters
    assert header.facts.file_bytes == sum(path.stat().st_size for path in tmp_path.glob("big-*"))
    assert header.facts.head_count_kv == whole.head_count_kv


Spoil = Callable[[list[w.GgufFile]], object]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: f[1].set("split.no", w.U16, 2), "big-00002-of-00003.gguf: says that it is part 3 of 3, not 2 of 3"),
        (lambda f: f[2].set("split.no", w.U16, 0), "big-00003-of-00003.gguf: says that it is part 1 of 3, not 3"),
        (lambda f: f[1].remove("split.no"), "big-00002-of-00003.gguf: says that it is part 1 of 3"),
        (lambda f: f[1].set("split.count", w.U16, 4), "big-00002-of-00003.gguf: says that it is part 2 of 4"),
        (lambda f: f[1].set("split.no", w.STRING, "1"), "big-00002-of-00003.gguf: split.count and split.no are not"),
        (lambda f: f[2].set("split.no", w.U64, 1 << 63), "big-00003-of-00003.gguf: split.count and split.no are not"),
        (lambda f: f[2].set("split.count", w.I32, -3), "big-00003-of-00003.gguf: split.count and split.no are not"),
        (lambda f: f[0].set("split.tensors.count", w.I32, 20), "big-00001-of-00003.gguf: counts 20 tensors in all"),
        (lambda f: f[0].set("split.count", w.U16, 2), "the first of 2 parts, and not called NAME-00001-of-00002"),
        (lambda f: f[0].set("split.no", w.U16, 1), "big-00001-of-00003.gguf: part 2 of 3 of a model: give its first"),
        (lambda f: f[2].tensors.append(f[0].tensors[0]), "big-00003-of-00003.gguf: tensor token_embd.weight occurs"),
        (lambda f: setattr(f[1].tensors[2], "claimed_offset", 8), "big-00002-of-00003.gguf: tensor "),
        (lambda f: setattr(f[1], "claimed_keys", 1 << 40), "big-00002-of-00003.gguf: 1099511627776 keys"),
        (lambda f: setattr(f[2], "magic", b"PK34"), "big-00003-of-00003.gguf: not a GGUF file"),
    ],
)  # fmt: skip
def test_a_bad_part_is_named(tmp_path: Path, spoil: Spoil, says: str) -> None:
    files = parts()
    spoil(files)
    assert says in refused(write(tmp_path, files))


def test_a_part_that_is_cut_or_missing_is_named(tmp_path: Path) -> None:
    first = write(tmp_path, parts())
    third = tmp_path / "big-00003-of-00003.gguf"
    os.truncate(third, third.stat().st_size - 40)
    assert refused(first).startswith("big-00003-of-00003.gguf: tensor blk.1.ffn_down.weight ends at byte")
    third.unlink()
    assert refused(first, ErrorCode.INVALID_MODEL_PATH) == "big-00003-of-00003.gguf: no such file"
    third.mkdir()
    assert "not a regular file" in refused(first, ErrorCode.INVALID_MODEL_PATH)


def test_a_further_part_given_alone_sends_to_the_first(tmp_path: Path) -> None:
    write(tmp_path, parts())
    assert "part 2 of 3 of a model: give its first part" in refused(tmp_path / "big-00002-of-00003.gguf")


def test_a_first_part_under_another_name_is_refused_since_the_engine_goes_by_names(tmp_path: Path) -> None:
    other = write(tmp_path, parts()).rename(tmp_path / "sha256-1234")
    assert "the first of 3 parts, and not called NAME-00001-of-00003.gguf" in refused(other)


def test_all_parts_together_have_one_budget(tmp_path: Path) -> None:
    files = parts()
    texts = struct.pack("<IQ", w.STRING, 600_000) + bytes(8) * 600_000
    for file in files:
        file.keys.append(("x", w.ARRAY, texts))
    message = refused(write(tmp_path, files))
    assert message == "big-00003-of-00003.gguf: too many texts in arrays, at the key 'x'"


def test_a_model_of_too_many_parts_is_refused_before_they_are_looked_for(tmp_path: Path) -> None:
    files = parts(count=1001)
    assert "are not numbers of parts up to 1000" in refused(write(tmp_path, files))


def test_a_projector_is_no_model_and_its_header_is_checked(tmp_path: Path) -> None:
    file = w.GgufFile(tensors=[w.Tensor("v.patch_embd.weight", (32, 4), w.TENSOR_F16)])
    file.set("general.architecture", w.STRING, "clip")
    file.set("general.type", w.STRING, "mmproj")
    path = file.write(tmp_path / "mmproj-F16.gguf")
    gguf.check_projector(path)
    assert "holds 'mmproj', not a model" in refused(path)
    for spoil in (lambda: os.truncate(path, path.stat().st_size - 40), lambda: w.write_llama(path)):
        spoil()
        with pytest.raises(ArrieroError) as caught:
            gguf.check_projector(path)
        assert caught.value.code is ErrorCode.MODEL_CORRUPTED
