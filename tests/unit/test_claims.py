"""Is nothing believed that a card says of files elsewhere, of other content, or of itself?"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.agent import claims
from arriero.agent.catalog_entry import model_id_of, whole_sha256
from arriero.contracts.records import ModelFile

REF = "https://host/m.gguf"


def card(*names: str, ref: str = REF, sha256: str = "a" * 64, **record: Any) -> dict[str, Any]:
    files = [ModelFile(name=name, size_bytes=1, sha256=sha256) for name in names or ("m.gguf",)]
    whole = whole_sha256(files)
    told = {"model_id": model_id_of(ref, whole), "model_ref": ref, "sha256": whole, **record}
    return {"record": told, "files": msgspec.to_builtins(files)}


def folder_with(tmp_path: Path, content: dict[str, Any]) -> Path:
    folder = tmp_path / str(content["record"]["model_id"])
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(content))
    for file in content["files"]:
        if file["name"] != "model.json" and Path(file["name"]).name == file["name"]:
            with contextlib.suppress(OSError, ValueError):
                (folder / file["name"]).write_bytes(b"x")
    return folder


def test_a_sound_card_is_read(tmp_path: Path) -> None:
    entry = claims.read_folder(folder_with(tmp_path, card("m.gguf", "p.gguf", projector="p.gguf")))
    assert entry.record.files == ["m.gguf", "p.gguf"] and entry.record.provider == "https"
    assert entry.record.projector == "p.gguf" and entry.record.size_bytes == 2
    assert [path.parent.name for path in entry.paths] == [entry.record.model_id] * 2
    assert entry.record.parts == list(entry.files)


HOSTILE = {
    "parent": card("../m.gguf"),
    "dots": card(".."),
    "hidden": card(".m.gguf"),
    "absolute": card("/etc/passwd"),
    "backslash": card("a\\b.gguf"),
    "zero byte": card("m\0.gguf"),
    "line break": card("m.gguf\n"),
    "empty name": card(""),
    "long name": card("m" * 300),
    "the card itself": card("model.json"),
    "one name twice": card("m.gguf", "m.gguf"),
    "no digest": card(sha256="A" * 64),
    "short digest": card(sha256="a" * 63),
    "no reference": card(ref="ftp://host/m.gguf"),
    "empty reference": card(ref=""),
    "other checksum": card() | {"record": card()["record"] | {"sha256": "b" * 64}},
    "other id": card(model_id="m-000000000000"),
    "external": card(is_external=True),
    "projector elsewhere": card(projector="../p.gguf"),
    "no files": {**card(), "files": []},
    "negative size": {
        **card(),
        "files": [{"name": "m.gguf", "size_bytes": -1, "sha256": "a" * 64}],
    },
    "endless number": card(times_used=2**70),
    "unprintable source": card(source="\x1b[2J"),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_card_is_not_believed(tmp_path: Path, content: dict[str, Any]) -> None:
    folder = folder_with(tmp_path, content)
    with pytest.raises(claims.Unbelievable):
        claims.read_folder(folder)


@pytest.mark.parametrize("what", ["folder", "file", "card", "fifo", "large"])
def test_nothing_is_read_through_links_or_pipes(tmp_path: Path, what: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = folder_with(tmp_path / "elsewhere", card())
    model, told = folder / "m.gguf", folder / "model.json"
    if what == "folder":
        link = tmp_path / folder.name
        link.symlink_to(folder)
        folder = link
    elif what == "fifo":
        told.unlink()
        os.mkfifo(told)
    elif what == "large":
        told.write_bytes(told.read_bytes() + b" " * claims.CARD_BYTES_MAX)
    else:
        path = model if what == "file" else told
        target = tmp_path / "target"
        path.rename(target)
        path.symlink_to(target)
    with pytest.raises(claims.Unbelievable):
        claims.read_folder(folder)


@given(st.text(max_size=300))
def test_no_name_leads_out_of_a_folder(name: str) -> None:
    try:
        file = msgspec.convert({"name": name, "size_bytes": 1, "sha256": "a" * 64}, claims.ClaimedFile)
    except msgspec.ValidationError:
        return
    path = Path("/models/m-0") / file.name
    assert os.path.normpath(path) == str(path) and path.parent == Path("/models/m-0")
    assert "\0" not in file.name and file.name.encode()


@pytest.mark.costly
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
    st.sampled_from(sorted(card()["record"])),
)
def test_no_value_of_a_field_is_an_accident(value: Any, field: str) -> None:
    content = card()
    content["record"][field] = value
    try:
        record, _ = claims.record_of(claims.convert(content))
    except claims.Unbelievable:
        return
    msgspec.json.decode(msgspec.json.encode(record), type=type(record))
