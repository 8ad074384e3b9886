"""Is a lost catalog made anew from the folders, and nothing served of it that was not read through?"""

import asyncio
from pathlib import Path

import msgspec
import pytest
from tests.integration.model_files import gguf, inspect, kit_in

from arriero.agent.catalog import Card, ModelCatalog
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import ModelRecord
from arriero.runtime.clock import SystemClock
from arriero.testing.fault_server import FaultServer


async def fetched(tmp_path: Path) -> tuple[ModelRecord, Path]:
    """Fetch a model, lose the database."""
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        record, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
    (tmp_path / "agent.db").write_bytes(b"\xa5" * 8192)
    return record, path


async def opened(tmp_path: Path) -> ModelCatalog:
    return await ModelCatalog.open(tmp_path / "agent.db", tmp_path / "models", SystemClock(), inspect)


def edit_card(path: Path, **changes: object) -> None:
    card = path.parent / "model.json"
    told = msgspec.json.decode(card.read_bytes(), type=Card)
    record = msgspec.structs.replace(told.record, **changes)
    card.write_bytes(msgspec.json.encode(Card(record=record, files=told.files)))


async def test_it_answers_before_the_folders_are_read(tmp_path: Path) -> None:
    record, _ = await fetched(tmp_path)
    catalog = await opened(tmp_path)
    assert (catalog.waiting, await catalog.records()) == ([record.model_id], [])
    assert any("set aside as agent.db.corrupt-1" in notice for notice in catalog.notices)
    await catalog.recheck()
    assert (catalog.waiting, [r.model_id for r in await catalog.records()]) == ([], [record.model_id])
    assert any("entered again" in notice for notice in catalog.notices)
    await catalog.close()
    again = await opened(tmp_path)
    assert again.waiting == [] and again.notices == [] and len(await again.records()) == 1
    await again.close()


@pytest.mark.parametrize("ask", ["reference", "id"])
async def test_a_model_that_waits_is_read_when_it_is_asked_for(tmp_path: Path, ask: str) -> None:
    record, path = await fetched(tmp_path)
    catalog = await opened(tmp_path)
    async with asyncio.TaskGroup() as group:
        asked = [
            group.create_task(
                catalog.get(record.model_ref) if ask == "reference" else catalog.by_id(record.model_id)
            )
            for _ in range(5)
        ]
        group.create_task(catalog.recheck())
    assert {entry.path for task in asked if (entry := task.result())} == {path}
    assert len([notice for notice in catalog.notices if "found in its folder" in notice]) == 1
    await catalog.close()


async def test_one_flipped_bit_and_it_is_not_a_model(tmp_path: Path) -> None:
    record, path = await fetched(tmp_path)
    content = bytearray(path.read_bytes())
    content[200_000] ^= 1
    path.write_bytes(content)
    catalog = await opened(tmp_path)
    assert await catalog.get(record.model_ref) is None
    with pytest.raises(ArrieroError) as unknown:
        await catalog.by_id(record.model_id)
    assert unknown.value.code is ErrorCode.MODEL_NOT_FOUND
    assert await catalog.records() == [] and path.exists(), "left alone, for its person to look at"
    assert any("checksum" in notice for notice in catalog.notices)
    await catalog.close()


async def test_the_header_is_read_again_and_the_card_not_believed_of_it(tmp_path: Path) -> None:
    record, path = await fetched(tmp_path)
    edit_card(path, context_length=2**40, architecture="huge", times_used=7, is_pinned=True)
    catalog = await opened(tmp_path)
    entry = await catalog.get(record.model_ref)
    assert entry is not None
    assert (entry.record.context_length, entry.record.architecture) == (512, "llama")
    assert (entry.record.times_used, entry.record.is_pinned) == (7, True)
    await catalog.close()


@pytest.mark.parametrize("what", ["folder", "file"])
async def test_links_in_the_models_folder_lead_nowhere(tmp_path: Path, what: str) -> None:
    record, path = await fetched(tmp_path)
    moved = path.parent if what == "folder" else path
    moved.rename(tmp_path / "outside")
    moved.symlink_to(tmp_path / "outside")
    catalog = await opened(tmp_path)
    await catalog.recheck()
    assert await catalog.get(record.model_ref) is None and await catalog.records() == []
    assert any("link" in notice for notice in catalog.notices)
    assert (tmp_path / "outside").exists()
    await catalog.close()


async def test_a_card_of_another_model_is_left_alone(tmp_path: Path) -> None:
    _, path = await fetched(tmp_path)
    path.parent.rename(path.parent.with_name("m-0123456789ab"))
    catalog = await opened(tmp_path)
    await catalog.recheck()
    assert await catalog.records() == []
    assert any("of another model" in notice for notice in catalog.notices)
    await catalog.close()


async def test_a_pin_outlives_the_database(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        record, _ = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert (await kit.catalog.set_pinned(record.model_id, True)).is_pinned
    (tmp_path / "agent.db").unlink()
    catalog = await opened(tmp_path)
    entry = await catalog.get(record.model_ref)
    assert entry is not None and entry.record.is_pinned
    assert not (await catalog.set_pinned(record.model_id, False)).is_pinned
    await catalog.close()
    folder = tmp_path / "models" / record.model_id
    assert sorted(path.name for path in folder.iterdir()) == ["m.gguf", "model.json"]
