"""Does a backup bring back what was lost, and nothing that it only claims?"""

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.model_files import gguf, kit_in, sha256
from tests.integration.model_stock import Stock, stock_in
from tests.integration.test_catalog_sharing import external, old_database

from arriero.agent.catalog import ModelCatalog
from arriero.agent.catalog_backup import BYTES_MAX
from arriero.agent.catalog_entry import model_id_of
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import ModelRecord, RestoreResult
from arriero.runtime.clock import SystemClock
from arriero.testing.fault_server import FaultServer

Edit = Callable[[sqlite3.Connection], object]


async def models(stock: Stock, tmp_path: Path) -> tuple[ModelRecord, ModelRecord]:
    """Bring a model of our own, used once and pinned, and an external one."""
    async with FaultServer(gguf()) as server:
        own, _ = await stock.kit.provisioner.ensure(f"{server.url}/m.gguf")
    path = tmp_path / "mine.gguf"
    path.write_bytes(gguf(2))
    other, _ = await stock.kit.provisioner.ensure(path.as_uri())
    await stock.kit.catalog.touch(own.model_id)
    await stock.kit.catalog.set_pinned(own.model_id, True)
    return own, other


async def forget(stock: Stock) -> None:
    """Lose the entries, not the files."""
    await stock.kit.catalog.copy_database(lambda connection: connection.execute("DELETE FROM models"))


async def restored(stock: Stock, content: bytes) -> RestoreResult:
    return await stock.ask(stock.agent.restore_catalog, content)


def edited(tmp_path: Path, content: bytes, edit: Edit) -> bytes:
    path = tmp_path / "edited.db"
    path.write_bytes(content)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys=OFF")
        edit(connection)
    return path.read_bytes()


async def test_what_was_lost_comes_back_as_it_was(tmp_path: Path) -> None:
    async with stock_in(tmp_path / "home") as stock:
        await models(stock, tmp_path)
        before = await stock.kit.catalog.records()
        content = await stock.ask(stock.agent.backup_catalog)
        (tmp_path / "copy.db").write_bytes(content)
        with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as connection:
            assert connection.execute("SELECT count(*) FROM models").fetchone() == (2,)
        assert content[18:20] == b"\1\1", "one file, without a WAL beside it"
        await forget(stock)
        result = await restored(stock, content)
        assert result.left_out == []
        assert sorted(result.restored, key=str) == sorted(before, key=str)
        assert await stock.kit.catalog.records() == before
        again = await restored(stock, content)
        assert again.restored == [] and len(again.left_out) == 2 and "already" in again.left_out[0]
        assert await stock.kit.catalog.records() == before


async def test_it_is_made_while_others_write(tmp_path: Path) -> None:
    async with stock_in(tmp_path / "home") as stock:
        other = await ModelCatalog.open(
            tmp_path / "home" / "agent.db", tmp_path / "home" / "models", SystemClock()
        )
        for number in range(20):
            await other.add(external(tmp_path, f"file:///files/{number}.gguf", b"%d" % number))
        content = await stock.ask(stock.agent.backup_catalog)
        await other.close()
        await forget(stock)
        assert len((await restored(stock, content)).left_out) == 20, "their headers are no models"


async def test_the_models_folder_may_be_another_one_by_now(tmp_path: Path) -> None:
    async with stock_in(tmp_path / "home") as stock:
        own, _ = await models(stock, tmp_path)
        content = await stock.ask(stock.agent.backup_catalog)
    (tmp_path / "home").rename(tmp_path / "moved")
    (tmp_path / "moved" / "agent.db").unlink()
    (tmp_path / "moved" / "models" / own.model_id / "model.json").unlink()
    async with stock_in(tmp_path / "moved") as stock:
        assert await stock.kit.catalog.records() == []
        assert len((await restored(stock, content)).restored) == 2
        entry = await stock.kit.catalog.get(own.model_ref)
        assert entry is not None and entry.path.is_relative_to(tmp_path / "moved")
        assert (entry.path.parent / "model.json").exists(), "a lost database is rebuilt from it"
        assert entry.record.is_pinned and entry.record.times_used == 1


async def test_a_backup_of_the_first_release_is_brought_up_to_date(tmp_path: Path) -> None:
    async with stock_in(tmp_path / "home") as stock:
        entry = external(tmp_path, f"file://{tmp_path}/old.gguf", gguf(3))
        old_database(tmp_path / "old.db", [entry])
        result = await restored(stock, (tmp_path / "old.db").read_bytes())
        (record,) = result.restored
        assert (record.model_id, record.times_used, record.format) == (entry.record.model_id, 3, "gguf")


async def test_one_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    async with stock_in(tmp_path / "home") as stock:
        content = await stock.ask(stock.agent.backup_catalog)
        newer = edited(tmp_path, content, lambda db: db.execute("PRAGMA user_version=99"))
        with pytest.raises(ArrieroError) as refused:
            await restored(stock, newer)
        assert refused.value.code is ErrorCode.VERSION_MISMATCH


def flipped(content: bytes) -> bytes:
    """Damage every page but the first a little."""
    broken = bytearray(content)
    for start in range(4096, len(broken), 4096):
        broken[start : start + 16] = b"\xff" * 16
    return bytes(broken)


NOT_A_CATALOG: dict[str, Edit] = {
    "a trigger": lambda db: db.execute("CREATE TRIGGER t AFTER INSERT ON models BEGIN DELETE FROM models; END"),
    "a view": lambda db: db.executescript("ALTER TABLE models RENAME TO m; CREATE VIEW models AS SELECT * FROM m"),
    "another table": lambda db: db.execute("CREATE TABLE more (x)"),
    "a table less": lambda db: db.execute("DROP TABLE model_files"),
    "another column": lambda db: db.execute("ALTER TABLE models ADD COLUMN more TEXT"),
    "no version": lambda db: db.execute("PRAGMA user_version=0"),
    "a version too low": lambda db: db.execute("PRAGMA user_version=1"),
    "a negative version": lambda db: db.execute("PRAGMA user_version=-1"),
}  # fmt: skip


@pytest.mark.parametrize("edit", NOT_A_CATALOG.values(), ids=NOT_A_CATALOG.keys())
async def test_another_database_is_refused(tmp_path: Path, edit: Edit) -> None:
    async with stock_in(tmp_path / "home") as stock:
        await models(stock, tmp_path)
        before = await stock.kit.catalog.records()
        content = edited(tmp_path, await stock.ask(stock.agent.backup_catalog), edit)
        with pytest.raises(ArrieroError) as refused:
            await restored(stock, content)
        assert refused.value.code is ErrorCode.INVALID_REQUEST
        assert "no backup of a catalog" in refused.value.message
        assert await stock.kit.catalog.records() == before


@pytest.mark.parametrize("what", ["empty", "text", "head", "half", "damaged", "random"])
async def test_garbage_is_refused_and_changes_nothing(tmp_path: Path, what: str) -> None:
    async with stock_in(tmp_path / "home") as stock:
        await models(stock, tmp_path)
        before = await stock.kit.catalog.records()
        whole = await stock.ask(stock.agent.backup_catalog)
        content = {
            "empty": b"",
            "text": b"hello",
            "head": b"SQLite format 3\0",
            "half": whole[: len(whole) // 2],
            "damaged": flipped(whole),
            "random": whole[:100] + os.urandom(len(whole) - 100),
        }[what]
        await forget(stock)
        with pytest.raises(ArrieroError) as refused:
            await restored(stock, content)
        assert refused.value.code is ErrorCode.INVALID_REQUEST
        assert await stock.kit.catalog.records() == []
        assert len((await restored(stock, whole)).restored) == len(before)


async def test_a_body_over_its_limit_is_refused_and_one_over_the_usual_is_not(tmp_path: Path) -> None:
    async with stock_in(tmp_path / "home") as stock:
        with pytest.raises(ArrieroError) as too_large:
            await restored(stock, b"\0" * (BYTES_MAX + 1))
        assert too_large.value.code is ErrorCode.REQUEST_TOO_LARGE
        with pytest.raises(ArrieroError) as garbage:
            await restored(stock, b"\0" * 11_000_000)
        assert garbage.value.code is ErrorCode.INVALID_REQUEST
        with pytest.raises(ArrieroError) as usual:
            await stock.ask(stock.agent.send, "POST", "/v1/models/prune", body=b"\0" * 11_000_000)
        assert usual.value.code is ErrorCode.REQUEST_TOO_LARGE


# --- What it claims of files -------------------------------------------------------------------


def own_row(column: str, value: object, table: str = "models") -> Edit:
    return lambda db: db.execute(
        f"UPDATE {table} SET {column} = ? WHERE model_id IN (SELECT model_id FROM models WHERE is_external = 0)",
        (value,),
    )


def passwd(db: sqlite3.Connection) -> None:
    """Claim that a file of the system is a model, with its true size and checksum."""
    content = Path("/etc/passwd").read_bytes()
    ref, digest = "file:///etc/passwd", sha256(content)
    model_id = model_id_of(ref, digest)
    db.execute(
        "INSERT INTO models (model_id, model_ref, provider, size_bytes, sha256, added_unix, is_external)"
        " VALUES (?, ?, 'file', ?, ?, 1, 1)",
        (model_id, ref, len(content), digest),
    )
    db.execute(
        "INSERT INTO model_files VALUES (?, 0, 'passwd', '/etc/passwd', ?, ?, 0)",
        (model_id, len(content), digest),
    )


HOSTILE: dict[str, Edit] = {
    "path elsewhere": own_row("path", "/etc/passwd", "model_files"),
    "path upwards": own_row("path", "/models/m-000000000000/../../etc/passwd", "model_files"),
    "relative path": own_row("path", "m.gguf", "model_files"),
    "name with separator": own_row("name", "../m.gguf", "model_files"),
    "name with zero": own_row("name", "m.gguf\0", "model_files"),
    "no digest": own_row("sha256", "x" * 64, "model_files"),
    "other digest": own_row("sha256", "0" * 64, "model_files"),
    "other size": own_row("size_bytes", 5, "model_files"),
    "negative size": own_row("size_bytes", -1, "model_files"),
    "other reference": own_row("model_ref", "hf:org/repo"),
    "no reference": own_row("model_ref", "\x1b[2Jx"),
    "other id": own_row("model_id", "m-000000000000"),
    "endless time": own_row("added_unix", 9e999),
    "two truths": own_row("is_external", 2),
    "huge text": own_row("source", "x" * 100_000),
    "no text": own_row("source", b"\xff\xfe".decode("latin-1") * 200),
    "external now": own_row("is_external", 1),
    "no files": lambda db: db.execute("DELETE FROM model_files WHERE path LIKE '%m.gguf'"),
    "another file of the system": passwd,
}


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE.keys())
async def test_what_is_hostile_is_left_out_and_said(tmp_path: Path, edit: Edit) -> None:
    async with stock_in(tmp_path / "home") as stock:
        own, other = await models(stock, tmp_path)
        content = edited(tmp_path, await stock.ask(stock.agent.backup_catalog), edit)
        await forget(stock)
        result = await restored(stock, content)
        (sentence,) = result.left_out
        assert sentence.isprintable() and len(sentence) < 1000
        good = {other.model_ref} | ({own.model_ref} if edit is passwd else set())
        assert {record.model_ref for record in result.restored} == good
        assert {record.model_ref for record in await stock.kit.catalog.records()} == good


@pytest.mark.parametrize("what", ["changed", "cut", "gone", "link", "folder link"])
async def test_a_file_that_is_not_as_it_was_is_left_out(tmp_path: Path, what: str) -> None:
    async with stock_in(tmp_path / "home") as stock:
        own, _ = await models(stock, tmp_path)
        content = await stock.ask(stock.agent.backup_catalog)
        await forget(stock)
        path = stock.kit.models_dir / own.model_id / "m.gguf"
        if what == "changed":
            path.write_bytes(gguf(40))
        elif what == "cut":
            os.truncate(path, 10)
        elif what == "gone":
            path.unlink()
        else:
            moved = path if what == "link" else path.parent
            moved.rename(tmp_path / "moved")
            moved.symlink_to(tmp_path / "moved")
        result = await restored(stock, content)
        assert len(result.restored) == 1 and own.model_ref in result.left_out[0]
        assert [record.model_ref for record in await stock.kit.catalog.records()] == [
            result.restored[0].model_ref
        ]


async def test_an_external_file_may_have_been_copied_back(tmp_path: Path) -> None:
    async with stock_in(tmp_path / "home") as stock:
        _, other = await models(stock, tmp_path)
        content = await stock.ask(stock.agent.backup_catalog)
        await forget(stock)
        os.utime(tmp_path / "mine.gguf", (5, 5))
        assert len((await restored(stock, content)).restored) == 2
        assert await stock.kit.catalog.get(other.model_ref) is not None, "with the time it has now"


async def test_headers_are_read_before_an_entry_is_believed(tmp_path: Path) -> None:
    async with kit_in(tmp_path) as kit:
        entry = external(tmp_path, f"file://{tmp_path}/text.gguf", b"no model at all")
        await kit.catalog.add(entry)
        old_database(tmp_path / "claims.db", [entry])
    async with stock_in(tmp_path / "home") as stock:
        result = await restored(stock, (tmp_path / "claims.db").read_bytes())
        assert result.restored == [] and "GGUF" in result.left_out[0]
