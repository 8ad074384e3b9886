"""Does a peer's answer become an offer only where every part of it is sound?"""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.agent.peers import PeerOffer, choose
from arriero.contracts.records import ModelFile, ModelRecord
from arriero.contracts.requests import PeerSource

PEER = PeerSource(url="http://127.0.0.1:9200/", token="secret", node="attic")
REF = "hf:o/r:Q8_0"
A, B = "a" * 64, "b" * 64


def _file(name: str = "m-Q8_0.gguf", size_bytes: int = 10, sha256: str = A) -> ModelFile:
    return ModelFile(name=name, size_bytes=size_bytes, sha256=sha256)


def _record(*parts: ModelFile, **fields: Any) -> ModelRecord:
    parts = parts or (_file(),)
    return ModelRecord(
        **{
            "model_id": "m-0123456789ab",
            "model_ref": REF,
            "provider": "hf",
            "files": [part.name for part in parts],
            "size_bytes": sum(part.size_bytes for part in parts),
            "sha256": parts[0].sha256,
            "added_unix": 1.0,
            "revision": "c" * 40,
            "parts": list(parts),
            **fields,
        }
    )


def _by_ref(record: ModelRecord) -> PeerOffer | None:
    return choose(PEER, [record], REF, [])


def test_a_model_of_the_same_reference_is_offered_with_all_that_a_fetch_needs() -> None:
    offer = choose(PEER, [_record(model_ref="hf:o/r:Q2_K"), _record()], REF, [])
    assert offer is not None and (offer.node, offer.revision, offer.projector) == ("attic", "c" * 40, "")
    (file,) = offer.files
    assert file.url == "http://127.0.0.1:9200/v1/models/m-0123456789ab/files/m-Q8_0.gguf"
    assert (file.name, file.size_bytes, file.sha256, file.token) == ("m-Q8_0.gguf", 10, A, "secret")
    assert "secret" not in repr(offer)


def test_by_content_the_reference_does_not_matter_nor_the_names() -> None:
    record = _record(_file("sha256-1"), _file("sha256-2", 20, B), model_ref="file:///x", projector="sha256-2")
    names = ["m.gguf", "mmproj.gguf"]
    offer = choose(PEER, [record], None, [A, B], names)
    assert offer is not None and [file.name for file in offer.files] == names
    assert offer.files[1].url.endswith("/files/sha256-2") and offer.projector == "mmproj.gguf"
    own = choose(PEER, [record], None, [B, A])
    assert own is not None and [file.name for file in own.files] == ["sha256-2.gguf", "sha256-1.gguf"]
    alone = choose(PEER, [record], None, [A])
    assert alone is not None and len(alone.files) == 1 and alone.projector == ""
    assert choose(PEER, [record], None, ["c" * 64]) is choose(PEER, [record], REF, [A, "c" * 64]) is None


@pytest.mark.parametrize("ref", ["file:///m.gguf", "demo", None, "nonsense"])
def test_what_means_something_else_on_another_machine_is_not_asked_for(ref: str | None) -> None:
    assert choose(PEER, [_record(model_ref=ref or "")], ref, []) is None


def test_an_older_agent_tells_one_file_without_its_parts() -> None:
    offer = _by_ref(_record(parts=[]))
    assert offer is not None and offer.files[0].sha256 == A
    assert _by_ref(_record(_file(), _file("n.gguf"), parts=[])) is None


@pytest.mark.parametrize(
    "record",
    [
        _record(_file("")),
        _record(_file("..")),
        _record(_file("../agent.db")),
        _record(_file("a/b.gguf")),
        _record(_file("a\\b.gguf")),
        _record(_file("a\0.gguf")),
        _record(_file("a\n.gguf")),
        _record(_file("x" * 256)),
        _record(_file(size_bytes=0)),
        _record(_file(size_bytes=-1)),
        _record(_file(size_bytes=2**61)),
        _record(_file(sha256="")),
        _record(_file(sha256="A" * 64)),
        _record(_file(), _file()),
        _record(files=["other.gguf"]),
        _record(files=["m-Q8_0.gguf", "m-Q8_0.gguf"]),
        _record(files=[]),
        _record(*(_file(f"{n}.gguf") for n in range(1001))),
        _record(model_id="../workers"),
        _record(model_id="m-0123456789ab?x"),
        _record(format="pickle"),
    ],
)
def test_an_answer_that_is_not_sound_is_no_offer(record: ModelRecord) -> None:
    assert _by_ref(record) is choose(PEER, [record], None, [A]) is None
    assert choose(PEER, [record, _record()], REF, []) is not None


@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=5, unique=True), st.text())
def test_whatever_names_a_peer_tells_addresses_and_local_names_stay_in_place(
    names: list[str], revision: str
) -> None:
    record = _record(*(_file(name) for name in names), revision=revision, projector=names[-1])
    # Decoding refuses most of these; what it lets through must be of no use either.
    offer = _by_ref(record)
    for file in offer.files if offer is not None else ():
        assert file.url.startswith("http://127.0.0.1:9200/v1/models/m-0123456789ab/files/")
        assert file.url.count("/") == 7 and not set(file.url) & set("?#\\ ")
        assert file.name.endswith(".gguf") and not file.name.startswith(".") and "/" not in file.name
