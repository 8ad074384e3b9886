"""Does the catalog agree with the disk, whatever happened to either?"""

import os
from pathlib import Path

import pytest
from tests.integration.model_files import gguf, kit_in, sha256

from arriero.agent.catalog import ModelCatalog
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.runtime.clock import SystemClock
from arriero.testing.fault_server import FaultServer


async def _fetched(tmp_path: Path) -> tuple[str, str, Path]:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        record, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        return record.model_ref, record.model_id, path


async def _open(tmp_path: Path) -> ModelCatalog:
    return await ModelCatalog.open(tmp_path / "agent.db", tmp_path / "models", SystemClock())


async def test_a_model_is_there_after_opening_again(tmp_path: Path) -> None:
    ref, model_id, path = await _fetched(tmp_path)
    catalog = await _open(tmp_path)
    entry = await catalog.get(ref)
    assert entry is not None and entry.path == path
    assert (entry.record.architecture, entry.record.block_count, entry.record.has_chat_template) == (
        "llama",
        4,
        True,
    )
    assert (entry.record.is_external, entry.record.sha256) == (False, sha256(gguf()))
    assert (await catalog.by_id(model_id)).record == entry.record
    assert catalog.notices == [] and await catalog.get("demo") is None
    await catalog.close()


async def test_use_is_noted(tmp_path: Path) -> None:
    _, model_id, _ = await _fetched(tmp_path)
    catalog = await _open(tmp_path)
    await catalog.touch(model_id)
    await catalog.touch(model_id)
    (record,) = await catalog.records()
    assert record.times_used == 2 and record.last_used_unix >= record.added_unix
    await catalog.close()


async def test_a_vanished_or_truncated_file_is_dropped_and_said(tmp_path: Path) -> None:
    ref, _, path = await _fetched(tmp_path)
    os.truncate(path, 1000)
    catalog = await _open(tmp_path)
    assert await catalog.records() == []
    assert any("vanished or changed" in notice for notice in catalog.notices)
    await catalog.close()
    async with FaultServer(gguf()), kit_in(tmp_path) as kit:
        assert await kit.catalog.get(ref) is None


async def test_a_file_that_vanishes_while_we_run_is_fetched_again(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        ref = f"{server.url}/m.gguf"
        _, path = await kit.provisioner.ensure(ref)
        path.unlink()
        _, again = await kit.provisioner.ensure(ref)
        assert again == path and path.read_bytes() == gguf() and len(server.requests) == 2


async def test_removing_deletes_our_files(tmp_path: Path) -> None:
    ref, model_id, path = await _fetched(tmp_path)
    catalog = await _open(tmp_path)
    removed = await catalog.remove(model_id)
    assert removed.model_ref == ref and not path.parent.exists()
    with pytest.raises(ArrieroError) as refused:
        await catalog.remove(model_id)
    assert refused.value.code is ErrorCode.MODEL_NOT_FOUND
    await catalog.close()


async def test_verifying_reads_every_byte(tmp_path: Path) -> None:
    _, model_id, path = await _fetched(tmp_path)
    catalog = await _open(tmp_path)
    read: list[int] = []
    assert (await catalog.verify(model_id, read.append)).model_id == model_id
    assert read[-1] == 300_000

    content = bytearray(path.read_bytes())
    content[200_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArrieroError) as corrupted:
        await catalog.verify(model_id)
    assert corrupted.value.code is ErrorCode.MODEL_CORRUPTED
    assert corrupted.value.details["file"] == "m.gguf"

    path.unlink()
    with pytest.raises(ArrieroError) as gone:
        await catalog.verify(model_id)
    assert gone.value.code is ErrorCode.INVALID_MODEL_PATH
    assert str(tmp_path) not in f"{gone.value} {gone.value.details}"
    await catalog.close()


async def test_a_lost_catalog_is_rebuilt_from_the_folders(tmp_path: Path) -> None:
    ref, model_id, path = await _fetched(tmp_path)
    (tmp_path / "agent.db").write_bytes(b"\xa5" * 8192)
    catalog = await _open(tmp_path)
    entry = await catalog.get(ref)
    assert entry is not None and (entry.record.model_id, entry.path) == (model_id, path)
    assert (tmp_path / "agent.db.corrupt-1").exists()
    assert any("set aside as agent.db.corrupt-1" in notice for notice in catalog.notices)
    await catalog.close()


@pytest.mark.parametrize(
    "card",
    [b"", b"{}", b"\xff", b'{"record": {}, "files": []}', b"[1]"],
    ids=["empty", "object", "bytes", "bare", "list"],
)
async def test_a_folder_whose_card_says_nothing_is_left_alone(tmp_path: Path, card: bytes) -> None:
    folder = tmp_path / "models" / "m-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "model.json").write_bytes(card)
    catalog = await _open(tmp_path)
    assert await catalog.records() == [] and folder.is_dir()
    await catalog.close()


async def test_a_card_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    _, _model_id, path = await _fetched(tmp_path)
    card = path.parent / "model.json"
    card.write_bytes(card.read_bytes().replace(b'"m.gguf"', b'"../../../etc/passwd"'))
    (tmp_path / "agent.db").unlink()
    catalog = await _open(tmp_path)
    assert await catalog.records() == []
    await catalog.close()


async def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file in the way")
    with pytest.raises(ArrieroError) as refused:
        await _open(tmp_path)
    assert refused.value.code is ErrorCode.STATE_DIR_UNUSABLE
    assert str(tmp_path) not in f"{refused.value} {refused.value.details}"


async def test_what_cannot_be_removed_stays_in_the_catalog(tmp_path: Path) -> None:
    ref, model_id, path = await _fetched(tmp_path)
    # As on a read-only disk, the card cannot be removed.
    (path.parent / "model.json").unlink()
    (path.parent / "model.json").mkdir()
    catalog = await _open(tmp_path)
    with pytest.raises(ArrieroError) as refused:
        await catalog.remove(model_id)
    assert refused.value.code is ErrorCode.STATE_DIR_UNUSABLE
    assert await catalog.get(ref) is not None and path.exists()
    await catalog.close()


async def test_a_file_that_was_written_to_is_read_again_before_it_is_served(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        ref = f"{server.url}/m.gguf"
        record, path = await kit.provisioner.ensure(ref)
        await kit.catalog.set_pinned(record.model_id, True)
        os.utime(path, (5, 5))
        assert await kit.provisioner.ensure(ref) and len(server.requests) == 1
        (kept,) = await kit.catalog.records()
        assert kept.is_pinned and kept.parts[0].modified_ns == 5_000_000_000
        path.write_bytes(gguf()[:-1] + b"\0")
        assert path.read_bytes() != gguf()
        _, again = await kit.provisioner.ensure(ref)
        assert again.read_bytes() == gguf() and len(server.requests) == 2
        assert any("checksum" in notice for notice in kit.catalog.notices)


async def test_a_file_that_was_written_to_while_we_were_away_is_read_again(tmp_path: Path) -> None:
    ref, _, path = await _fetched(tmp_path)
    path.write_bytes(gguf()[:-1] + b"\0")
    catalog = await _open(tmp_path)
    assert any("written to" in notice for notice in catalog.notices)
    assert await catalog.get(ref) is None
    await catalog.close()


async def test_what_verify_found_bad_is_fetched_again(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        ref = f"{server.url}/m.gguf"
        record, path = await kit.provisioner.ensure(ref)
        before = path.stat()
        path.write_bytes(gguf()[:-1] + b"\0")
        # As when a disk loses a bit: nothing but the content tells it.
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(ArrieroError) as refused:
            await kit.catalog.verify(record.model_id)
        assert refused.value.code is ErrorCode.MODEL_CORRUPTED
        _, again = await kit.provisioner.ensure(ref)
        assert again.read_bytes() == gguf() and len(server.requests) == 2
