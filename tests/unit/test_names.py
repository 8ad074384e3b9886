"""Is a name or checksum that is none refused, also where it is only decoded?"""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.contracts import names
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import ModelFile, ModelList, ModelRecord

DIGEST = "0123456789abcdef" * 4
GOOD = [
    "m.gguf",
    "a b.gguf",
    "ñandú-00001-of-00002.gguf",
    "sha256-" + DIGEST,
    "x" * 255,
    "é" * 127,
    "-rf",
    "a..b",
    "~",
    "C:",
]
BAD = [
    "", ".", "..", ".partial", ".m.gguf", "/", "a/b", "/etc/passwd", "../m.gguf", "a\\b", "a\0b", "a\n", "\n", "a\x1b[2J", "a\x7f",
    "a\x85", "a\u2028", "a\u202egguf.m", "a\u2066", "a\ud800", "x" * 256,
]  # fmt: skip
BAD_DIGESTS = [
    "",
    "0",
    DIGEST[:-1],
    DIGEST + "0",
    DIGEST + "\n",
    DIGEST.upper(),
    "../" + DIGEST[3:],
    "sha256:" + DIGEST,
    "٣" * 64,
]


def card(**fields: Any) -> bytes:
    return msgspec.json.encode({"name": "m.gguf", "size_bytes": 1, "sha256": DIGEST, **fields})


@pytest.mark.parametrize("name", GOOD)
def test_plain_names(name: str) -> None:
    assert names.file_name(name) == name
    assert msgspec.json.decode(card(name=name), type=ModelFile).name == name


@pytest.mark.parametrize("name", BAD)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(ArrieroError) as refused:
        names.file_name(name)
    assert refused.value.code is ErrorCode.INVALID_MODEL_PATH
    msgspec.json.encode(refused.value.body())
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"name": name, "size_bytes": 1, "sha256": DIGEST}, ModelFile)


def test_a_name_has_at_most_255_bytes_not_characters() -> None:
    with pytest.raises(ArrieroError):
        names.file_name("é" * 128)


@pytest.mark.parametrize("digest", BAD_DIGESTS)
def test_checksums_that_are_none(digest: str) -> None:
    with pytest.raises(ArrieroError) as refused:
        names.sha256(digest)
    assert refused.value.code is ErrorCode.INVALID_MODEL_PATH
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(card(sha256=digest), type=ModelFile)
    assert names.sha256(DIGEST) == DIGEST


@pytest.mark.parametrize(
    "raw", [card(size_bytes=-1), card(size_bytes="1"), card(size_bytes=1.5), card(name=None), b"{}", b"[]"]
)
def test_a_hostile_entry_is_refused_when_it_is_decoded(raw: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(raw, type=ModelFile)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_id": "../../x"},
        {"model_id": "m-0123456789ab\n"},
        {"files": ["../x"]},
        {"files": [".."]},
        {"sha256": "x"},
        {"size_bytes": -1},
    ],
)
def test_a_hostile_record_is_refused_when_it_is_decoded(fields: dict[str, Any]) -> None:
    record = ModelRecord(
        model_id="m-0123456789ab",
        model_ref="hf:o/r",
        provider="hf",
        files=["m.gguf"],
        size_bytes=1,
        sha256=DIGEST,
        added_unix=0.0,
        parts=[ModelFile(name="m.gguf", size_bytes=1, sha256=DIGEST)],
    )
    good = msgspec.to_builtins(ModelList([record]))
    assert msgspec.convert(good, ModelList).models == [record]
    good["models"][0].update(fields)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(good, ModelList)


@given(st.text(max_size=300))
def test_any_text_is_a_plain_name_or_refused(text: str) -> None:
    if names.is_file_name(text):
        assert "/" not in text and not text.startswith(".") and 1 <= len(text.encode()) <= 255
        assert not any(ord(letter) < 32 for letter in text)
