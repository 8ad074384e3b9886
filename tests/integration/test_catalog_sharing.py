"""Does the catalog keep everything when many write to it, and when an older release wrote it?"""

import asyncio
import contextlib
import sqlite3
import sys
from pathlib import Path

import pytest
from tests.integration.model_files import gguf, kit_in, sha256

from arriero.agent import migrations
from arriero.agent.catalog import CatalogEntry, ModelCatalog, make_record
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import ModelFile
from arriero.engines.base import ModelFacts
from arriero.runtime.clock import SystemClock
from arriero.testing.fault_server import FaultServer

FACTS = ModelFacts("llama", 4, 512, 1000, "Q8_0", 1_000_000, 10, True, False)
WRITERS = 3
MODELS = 40

WRITER = """
import asyncio, sys
from pathlib import Path
from tests.integration.test_catalog_sharing import write
asyncio.run(write(Path(sys.argv[1]), int(sys.argv[2])))
"""


def external(folder: Path, ref: str, content: bytes) -> CatalogEntry:
    """Return an entry of a file that lies somewhere, written now."""
    path = folder / (ref.rsplit("/", 1)[-1])
    path.write_bytes(content)
    file = ModelFile(
        name=path.name,
        size_bytes=len(content),
        sha256=sha256(content),
        modified_ns=path.stat().st_mtime_ns,
    )
    record = make_record(
        model_ref=ref,
        provider="file",
        files=[file],
        facts=FACTS,
        is_external=True,
        added_unix=1.0,
        source="file",
    )
    return CatalogEntry(record, (file,), (path,))


async def opened(folder: Path) -> ModelCatalog:
    return await ModelCatalog.open(folder / "agent.db", folder / "models", SystemClock())


async def write(folder: Path, writer: int) -> None:
    """Enter models, use them and the shared one, read the lists; many tasks at once."""
    catalog = await opened(folder)
    # By its name: another process may have entered models that come before it.
    shared = next(r.model_id for r in await catalog.records() if r.model_ref == "file:///files/shared.gguf")

    async def one(number: int) -> None:
        entry = external(folder, f"file:///files/{writer}-{number}.gguf", b"%d %d" % (writer, number))
        await catalog.add(entry)
        await catalog.touch(shared)
        assert await catalog.get(entry.record.model_ref) is not None
        await catalog.set_pinned(entry.record.model_id, True)
        assert len(await catalog.records()) > number // MODELS

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(MODELS):
                group.create_task(one(number))
    finally:
        await catalog.close()


async def test_many_processes_and_tasks_lose_nothing(tmp_path: Path) -> None:
    catalog = await opened(tmp_path)
    shared = external(tmp_path, "file:///files/shared.gguf", b"shared")
    await catalog.add(shared)
    processes = [
        await asyncio.create_subprocess_exec(sys.executable, "-c", WRITER, str(tmp_path), str(writer))
        for writer in range(WRITERS)
    ]
    async with asyncio.timeout(200):
        assert [await process.wait() for process in processes] == [0] * WRITERS
    records = {record.model_ref: record for record in await catalog.records()}
    assert len(records) == WRITERS * MODELS + 1
    assert records[shared.record.model_ref].times_used == WRITERS * MODELS
    assert sum(record.is_pinned for record in records.values()) == WRITERS * MODELS
    await catalog.close()


async def test_a_new_database_may_be_opened_by_many_at_once(tmp_path: Path) -> None:
    async with asyncio.TaskGroup() as group:
        opening = [group.create_task(opened(tmp_path)) for _ in range(8)]
    for task in opening:
        assert await task.result().records() == []
        await task.result().close()


def old_database(path: Path, entries: list[CatalogEntry]) -> None:
    """Make a database as the first release left it."""
    first = Path(str(migrations.__file__)).with_name("0001_models.sql").read_text()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.executescript(first + "PRAGMA user_version=1;")
        for entry in entries:
            record, (file,), (where,) = entry.record, entry.files, entry.paths
            connection.execute(
                "INSERT INTO models (model_id, model_ref, provider, size_bytes, sha256, added_unix, last_used_unix,"
                " times_used, is_external, architecture, quantisation, context_length, block_count, parameters,"
                " is_embedding, has_chat_template) VALUES (?, ?, ?, ?, ?, 5.5, 6.5, 3, 1, 'llama', 'Q8_0', 512, 4, 99, 0, 1)",
                (record.model_id, record.model_ref, record.provider, record.size_bytes, record.sha256),
            )
            connection.execute(
                "INSERT INTO model_files VALUES (?, 0, ?, ?, ?, ?, ?)",
                (record.model_id, file.name, str(where), file.size_bytes, file.sha256, file.modified_ns),
            )


async def test_a_database_of_the_first_release_is_opened_with_everything_in_it(tmp_path: Path) -> None:
    entries = [external(tmp_path, f"file:///files/{number}.gguf", b"%d" % number) for number in range(5)]
    old_database(tmp_path / "agent.db", entries)
    catalog = await opened(tmp_path)
    assert catalog.notices == []
    for entry in entries:
        found = await catalog.get(entry.record.model_ref)
        assert found is not None
        assert (found.paths, found.files, found.record.parts) == (entry.paths, entry.files, list(entry.files))
        record = found.record
        assert (record.model_id, record.times_used, record.last_used_unix) == (entry.record.model_id, 3, 6.5)
        assert (record.parameters, record.has_chat_template, record.is_embedding) == (99, True, False)
        assert (record.format, record.source, record.is_pinned, record.head_count) == ("gguf", "", False, 0)
    await catalog.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "agent.db")) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (4,)


async def test_a_database_of_a_later_release_is_refused_and_untouched(tmp_path: Path) -> None:
    await (await opened(tmp_path)).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "agent.db")) as connection:
        connection.execute("PRAGMA user_version=99")
    before = (tmp_path / "agent.db").read_bytes()
    with pytest.raises(ArrieroError) as refused:
        await opened(tmp_path)
    assert refused.value.code is ErrorCode.VERSION_MISMATCH
    assert (tmp_path / "agent.db").read_bytes() == before


async def test_content_is_found_under_any_reference_while_its_files_are_as_verified(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        record, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        digest = sha256(gguf())
        found = await kit.catalog.with_content([digest])
        assert found is not None and found.path == path and found.record.model_id == record.model_id
        assert await kit.catalog.with_content([digest, digest]) is None
        assert await kit.catalog.with_content(["0" * 64]) is None
        assert await kit.catalog.with_content([]) is None
        path.write_bytes(gguf(2))
        assert await kit.catalog.with_content([digest]) is None, "written to since it was verified"
        other = external(tmp_path, "file:///files/other.gguf", gguf())
        await kit.catalog.add(other)
        again = await kit.catalog.with_content([digest])
        assert again is not None and again.paths == other.paths


async def test_the_order_of_parts_counts(tmp_path: Path) -> None:
    async with kit_in(tmp_path) as kit:
        files = []
        for number in (1, 2):
            entry = external(tmp_path, f"file:///files/{number}.gguf", b"part %d" % number)
            files.append((entry.files[0], entry.path))
        record = make_record(
            model_ref="hf:org/repo:Q4_0",
            provider="hf",
            files=[file for file, _ in files],
            facts=FACTS,
            is_external=True,
            added_unix=1.0,
            source="hub",
            revision="abc",
        )
        await kit.catalog.add(
            CatalogEntry(record, tuple(file for file, _ in files), tuple(path for _, path in files))
        )
        one, two = (file.sha256 for file, _ in files)
        found = await kit.catalog.with_content((one, two))
        assert found is not None and found.record.revision == "abc"
        assert await kit.catalog.with_content((two, one)) is None
        assert await kit.catalog.with_content((one,)) is None


async def test_a_model_entered_again_keeps_its_use_and_its_pin(tmp_path: Path) -> None:
    async with kit_in(tmp_path) as kit:
        entry = external(tmp_path, "file:///files/a.gguf", b"first")
        await kit.catalog.add(entry)
        await kit.catalog.touch(entry.record.model_id)
        await kit.catalog.set_pinned(entry.record.model_id, True)
        await kit.catalog.add(entry)
        changed = external(tmp_path, "file:///files/a.gguf", b"second")
        await kit.catalog.add(changed)
        (record,) = await kit.catalog.records()
        assert record.model_id == changed.record.model_id != entry.record.model_id
        assert (record.times_used, record.is_pinned) == (1, True) and record.last_used_unix > 0


async def test_other_content_of_a_reference_takes_the_place_of_the_old(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        ref = f"{server.url}/m.gguf"
        old, path = await kit.provisioner.ensure(ref)
        path.unlink()
        server.content = gguf(2)
        new, again = await kit.provisioner.ensure(ref)
        assert new.model_id != old.model_id and again.read_bytes() == gguf(2)
        assert not path.parent.exists(), "nobody would ever remove it"


async def test_a_vanished_file_takes_no_pin_with_it(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        ref = f"{server.url}/m.gguf"
        old, path = await kit.provisioner.ensure(ref)
        await kit.catalog.set_pinned(old.model_id, True)
        path.unlink()
        new, _ = await kit.provisioner.ensure(ref)
        (listed,) = await kit.catalog.records()
        assert listed.model_id == new.model_id == old.model_id and listed.is_pinned


async def test_an_external_model_is_forgotten_and_its_file_stays(tmp_path: Path) -> None:
    async with kit_in(tmp_path) as kit:
        entry = external(tmp_path, "file:///files/a.gguf", b"mine")
        await kit.catalog.add(entry)
        assert (await kit.catalog.remove(entry.record.model_id)).is_external
        assert entry.path.read_bytes() == b"mine" and await kit.catalog.records() == []


@pytest.mark.parametrize("model_id", ["m-000000000000", "../agent.db", "", "m-0" * 1000])
async def test_a_model_that_is_not_there_is_not_pinned(tmp_path: Path, model_id: str) -> None:
    async with kit_in(tmp_path) as kit:
        with pytest.raises(ArrieroError) as unknown:
            await kit.catalog.set_pinned(model_id, True)
        assert unknown.value.code is ErrorCode.MODEL_NOT_FOUND
