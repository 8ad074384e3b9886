"""Does the database keep what it acknowledged, and tell every failure without a path?

Goal: every promise in the docstrings of `runtime.sqlite`, on real files.
"""

import asyncio
import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.runtime.sqlite import Database, Migration, read_migrations

FIRST = Migration(1, "CREATE TABLE things (name TEXT PRIMARY KEY, count INTEGER NOT NULL) STRICT;")
SECOND = Migration(2, "ALTER TABLE things ADD COLUMN colour TEXT NOT NULL DEFAULT 'grey';")


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


async def test_what_was_written_is_there_after_opening_again(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db", [FIRST])
    assert await database.execute("INSERT INTO things VALUES (?, ?)", ("llama", 3)) == 1
    await database.close()
    again = await Database.open(tmp_path / "a.db", [FIRST])
    row = await again.fetch_one("SELECT * FROM things WHERE name = :name", {"name": "llama"})
    assert row is not None and row["count"] == 3
    assert await again.fetch_one("SELECT * FROM things WHERE name = 'mule'") is None
    await again.close()


async def test_closing_leaves_no_thread_and_no_side_file(tmp_path: Path) -> None:
    before = threading.active_count()
    database = await Database.open(tmp_path / "a.db", [FIRST])
    await database.execute("INSERT INTO things VALUES ('llama', 1)")
    await database.close()
    await database.close()
    assert threading.active_count() == before
    assert _names(tmp_path) == ["a.db"]
    with pytest.raises(ArrieroError, match="is closed"):
        await database.fetch_all("SELECT 1")


async def test_the_file_is_private_and_in_wal_mode(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db", [FIRST])
    assert _mode(tmp_path / "a.db") == 0o600
    assert [tuple(row) for row in await database.fetch_all("PRAGMA journal_mode")] == [("wal",)]
    assert [tuple(row) for row in await database.fetch_all("PRAGMA synchronous")] == [(2,)]
    assert [tuple(row) for row in await database.fetch_all("PRAGMA foreign_keys")] == [(1,)]
    await database.close()


async def test_a_transaction_that_raises_keeps_nothing(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db", [FIRST])

    def half(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO things VALUES ('llama', 1)")
        raise LookupError("changed my mind")

    with pytest.raises(LookupError):
        await database.transaction(half)
    assert await database.fetch_all("SELECT * FROM things") == []
    await database.execute("INSERT INTO things VALUES ('llama', 2)")
    with pytest.raises(sqlite3.IntegrityError):
        await database.execute("INSERT INTO things VALUES ('llama', 3)")
    await database.close()


async def test_simultaneous_writers_take_turns(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db", [FIRST])
    await database.execute("INSERT INTO things VALUES ('llama', 0)")

    def add(connection: sqlite3.Connection) -> None:
        (count,) = connection.execute("SELECT count FROM things").fetchone()
        connection.execute("UPDATE things SET count = ?", (count + 1,))

    async with asyncio.TaskGroup() as group:
        for _ in range(50):
            group.create_task(database.transaction(add))
    row = await database.fetch_one("SELECT count FROM things")
    assert row is not None and row["count"] == 50
    await database.close()


async def test_a_schema_grows_and_a_newer_one_is_refused(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db", [FIRST])
    await database.execute("INSERT INTO things VALUES ('llama', 1)")
    await database.close()
    grown = await Database.open(tmp_path / "a.db", [FIRST, SECOND])
    rows = await grown.fetch_all("SELECT * FROM things")
    assert [tuple(row) for row in rows] == [("llama", 1, "grey")]
    await grown.close()
    with pytest.raises(ArrieroError) as refused:
        await Database.open(tmp_path / "a.db", [FIRST])
    assert refused.value.code is ErrorCode.VERSION_MISMATCH


async def test_a_broken_migration_changes_nothing(tmp_path: Path) -> None:
    broken = Migration(2, "CREATE TABLE more (x); INSERT INTO nowhere VALUES (1);")
    await (await Database.open(tmp_path / "a.db", [FIRST])).close()
    with pytest.raises(ArrieroError):
        await Database.open(tmp_path / "a.db", [FIRST, broken])
    database = await Database.open(tmp_path / "a.db", [FIRST])
    names = await database.fetch_all("SELECT name FROM sqlite_master WHERE type = 'table'")
    assert [row["name"] for row in names] == ["things"]
    await database.close()


@pytest.mark.parametrize("damage", ["all", "middle"])
async def test_a_corrupt_file_is_set_aside_and_told(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.db"
    database = await Database.open(path, [FIRST])
    rows = [(f"thing {number}", 1) for number in range(2000)]
    await database.transaction(
        lambda connection: connection.executemany("INSERT INTO things VALUES (?, ?)", rows)
    )
    await database.close()
    content = bytearray(path.read_bytes())
    start = 0 if damage == "all" else 4096
    content[start:] = b"\xa5" * (len(content) - start)
    path.write_bytes(content)
    (tmp_path / "a.db.corrupt-1").write_bytes(b"an older one")

    fresh = await Database.open(path, [FIRST])
    assert fresh.set_aside_as == "a.db.corrupt-2"
    assert (tmp_path / "a.db.corrupt-2").read_bytes() == content
    assert await fresh.fetch_all("SELECT * FROM things") == []
    await fresh.close()


async def test_a_folder_that_does_not_exist_is_told_without_its_path(tmp_path: Path) -> None:
    with pytest.raises(ArrieroError) as refused:
        await Database.open(tmp_path / "nowhere" / "a.db", [FIRST])
    assert refused.value.code is ErrorCode.STATE_DIR_UNUSABLE
    assert str(tmp_path) not in f"{refused.value} {refused.value.details}"


async def test_a_wrong_statement_is_told_without_a_path(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db", [FIRST])
    with pytest.raises(ArrieroError) as failed:
        await database.fetch_all("SELECT * FROM nowhere")
    assert failed.value.code is ErrorCode.INTERNAL_ERROR
    assert str(tmp_path) not in f"{failed.value} {failed.value.details}"
    await database.close()


async def test_a_cancelled_caller_leaves_a_whole_transaction(tmp_path: Path) -> None:
    database = await Database.open(tmp_path / "a.db", [FIRST])
    is_inside, may_go_on = threading.Event(), threading.Event()

    def slow(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO things VALUES ('llama', 1)")
        is_inside.set()
        assert may_go_on.wait(60)
        connection.execute("INSERT INTO things VALUES ('mule', 1)")

    async with asyncio.TaskGroup() as group:
        caller = group.create_task(database.transaction(slow))
        await asyncio.to_thread(is_inside.wait, 10)
        caller.cancel()
    may_go_on.set()
    rows = await database.fetch_all("SELECT name FROM things ORDER BY name")
    assert [row["name"] for row in rows] == ["llama", "mule"]
    await database.close()


def test_migrations_are_read_in_order_and_names_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for package, names in {
        "good_sql": ["0002_b.sql", "0001_a.sql"],
        "gap_sql": ["0002_b.sql"],
        "odd_sql": ["a.sql"],
    }.items():
        (tmp_path / package).mkdir()
        for name in names:
            (tmp_path / package / name).write_text(f"-- {name}")
    assert read_migrations("good_sql") == [Migration(1, "-- 0001_a.sql"), Migration(2, "-- 0002_b.sql")]
    with pytest.raises(ValueError, match="not 1, 2, 3"):
        read_migrations("gap_sql")
    with pytest.raises(ValueError, match="named like"):
        read_migrations("odd_sql")
