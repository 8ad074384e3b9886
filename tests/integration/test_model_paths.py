"""Is nothing written or read outside of the models folder, whatever names and links there are?

Names come from a seed: `python -m tests.fuzz.paths` tries as many as wanted.  Links are put where a
download writes; what they lead to must be as it was before.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from tests.fuzz import paths
from tests.integration.model_files import SIZE_BYTES, Kit, gguf, kit_in, sha256

from arriero.agent.catalog import CARD_NAME
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.testing.hub import HubServer

REF = "hf:o/r"
NAME = "m-Q8_0.gguf"
PARSED = 50_000
DOWNLOADS = 150


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


def test_hostile_references_cards_and_records_lead_nowhere() -> None:
    outcome = paths.parse_many(seed=1, count=PARSED)
    assert outcome.failures == []
    assert min(outcome.accepted[kind] for kind in ("hf", "https", "file", "card", "record")) > 50


@pytest.mark.parametrize("seed", range(4))
async def test_hostile_repositories_stay_in_the_folder(tmp_path: Path, seed: int) -> None:
    outcome = await paths.fetch_many(seed=seed, count=DOWNLOADS, folder=tmp_path)
    assert outcome.failures == []
    assert outcome.accepted["hf"] > 0


@pytest.mark.parametrize("claimed_bytes", [-1, 0, 1, SIZE_BYTES + 1, 1 << 63])
async def test_a_size_that_is_not_so_ends_in_words_or_in_the_whole_file(
    tmp_path: Path, claimed_bytes: int
) -> None:
    async with HubServer() as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/r", {NAME: gguf()}).claimed_sizes[NAME] = claimed_bytes
        try:
            record, path = await kit.provisioner.ensure(REF)
        except ArrieroError as error:
            assert error.code is not ErrorCode.INTERNAL_ERROR
            assert await kit.catalog.records() == []
        else:
            assert path.read_bytes() == gguf() and record.size_bytes == SIZE_BYTES


# --- Links -----------------------------------------------------------------------------------


def _outside(folder: Path) -> Path:
    outside = folder / "outside"
    outside.mkdir()
    for name in ("precious.gguf", CARD_NAME, f"{NAME}.part"):
        (outside / name).write_text("not to be touched")
    return outside


def _is_no_link(path: Path) -> bool:
    return path.resolve() == path


async def _begin(kit: Kit) -> Path:
    """Fetch a part of the model; return the folder that its bytes are kept in."""
    download_id = kit.provisioner.start(REF).download_id
    async for _ in kit.provisioner.frames(download_id):
        if kit.provisioner.record(download_id).bytes_downloaded > 0:
            break
    await kit.provisioner.cancel(download_id)
    (part,) = kit.models_dir.rglob("*.part")
    return part.parent


def _whole_folder(folder: Path, outside: Path) -> None:
    shutil.rmtree(folder.parent)
    folder.parent.symlink_to(outside)


def _key_folder(folder: Path, outside: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(outside)


def _ready(folder: Path, outside: Path) -> None:
    (folder / "ready").symlink_to(outside)


def _files(folder: Path, outside: Path) -> None:
    for path in [*folder.iterdir()]:
        path.unlink()
        path.symlink_to(outside / "precious.gguf")


def _dangling(folder: Path, outside: Path) -> None:
    for path in [*folder.iterdir()]:
        path.unlink()
        path.symlink_to(outside / "new")


def _fresh_files(folder: Path, outside: Path) -> None:
    """Under the names that something may have while it is written anew."""
    for path in [*folder.iterdir()]:
        for name in (f"{path.name}-new", f"{path.name}.new", f"{path.name}.tmp"):
            (folder / name).symlink_to(outside / "precious.gguf")


def _model_folder(folder: Path, outside: Path) -> None:
    for content in (gguf(), gguf(2)):
        digest = hashlib.sha256(f"{REF}\n{sha256(content)}".encode()).hexdigest()
        (folder.parent.parent / f"m-{digest[:12]}").symlink_to(outside)


@pytest.mark.parametrize(
    "plant", [_whole_folder, _key_folder, _ready, _files, _dangling, _fresh_files, _model_folder]
)
@pytest.mark.parametrize("content", [gguf(), gguf(2)], ids=["goes on", "begins anew"])
async def test_a_link_where_a_download_writes_is_not_followed(
    tmp_path: Path, plant: Callable[[Path, Path], None], content: bytes
) -> None:
    outside = _outside(tmp_path)
    async with HubServer(rate_bytes_per_s=2_000_000) as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/r", {NAME: gguf()})
        plant(await _begin(kit), outside)
        hub.add("o/r", {NAME: content})
        before = paths.picture(outside)
        try:
            record, path = await kit.provisioner.ensure(REF)
        except ArrieroError:
            assert await kit.catalog.records() == []
        else:
            assert path == kit.models_dir / record.model_id / NAME
            assert _is_no_link(path) and path.read_bytes() == content
            await kit.catalog.remove(record.model_id)
        assert paths.picture(outside) == before


def _card(model_id: str, name: str, size_bytes: int) -> bytes:
    digest = sha256(gguf())
    record = {
        "model_id": model_id,
        "model_ref": REF,
        "provider": "hf",
        "files": [name],
        "size_bytes": size_bytes,
        "sha256": digest,
        "added_unix": 0.0,
    }
    file = {"name": name, "size_bytes": size_bytes, "sha256": digest}
    return msgspec.json.encode({"record": record, "files": [file]})


def _linked_model(folder: Path) -> Path:
    outside = folder / "outside"
    outside.mkdir()
    model_id = "m-" + hashlib.sha256(f"{REF}\n{sha256(gguf())}".encode()).hexdigest()[:12]
    (outside / NAME).write_bytes(gguf())
    (outside / CARD_NAME).write_bytes(_card(model_id, NAME, SIZE_BYTES))
    (folder / "models").mkdir()
    (folder / "models" / model_id).symlink_to(outside)
    return outside


async def test_a_linked_model_folder_is_no_model_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    outside = _linked_model(tmp_path)
    before = paths.picture(outside)
    async with kit_in(tmp_path) as kit:
        assert await kit.catalog.records() == []
    assert paths.picture(outside) == before


def _model_of_other_files(folder: Path, name: str) -> None:
    own = folder / "models" / "m-0123456789ab"
    own.mkdir(parents=True)
    (folder / "models" / "precious.gguf").write_bytes(gguf())
    there = own / name
    card = _card(own.name, name, there.stat().st_size if there.exists() else 1)
    if name == CARD_NAME:
        card = _card(own.name, name, len(_card(own.name, name, 1)) + 4)
        card = _card(own.name, name, len(card))
    (own / CARD_NAME).write_bytes(card)


@pytest.mark.parametrize(
    "name", ["../precious.gguf", "/etc/hostname", CARD_NAME, ".hidden.gguf", "x/../../precious.gguf"]
)
async def test_a_card_that_names_other_files_is_not_believed(tmp_path: Path, name: str) -> None:
    _model_of_other_files(tmp_path, name)
    async with kit_in(tmp_path) as kit:
        assert await kit.catalog.records() == []
