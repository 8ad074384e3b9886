"""How do the models of a catalog stand in its database?  All of it runs in the database's thread."""

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from arriero.agent.catalog_entry import CatalogEntry
from arriero.contracts.records import ModelFile, ModelRecord

COLUMNS: Final = tuple(name for name in ModelRecord.__struct_fields__ if name not in ("files", "parts"))
FILE_COLUMNS: Final = ("name", "path", "size_bytes", "sha256", "modified_ns")


def insert(
    connection: sqlite3.Connection, entry: CatalogEntry, formerly: Sequence[CatalogEntry] = ()
) -> list[CatalogEntry]:
    """Enter a model; return those it replaces: with the same reference or id, and `formerly`.

    How often it was used, and that it is pinned, is kept: it is the same model to its person.
    """
    record = entry.record
    replaced = [
        *formerly,
        *select(connection, "model_ref", record.model_ref),
        *select(connection, "model_id", record.model_id),
    ]
    for old in {old.record.model_id: old.record for old in replaced}.values():
        connection.execute("DELETE FROM models WHERE model_id = ?", (old.model_id,))
        record = msgspec.structs.replace(
            record,
            last_used_unix=max(record.last_used_unix, old.last_used_unix),
            times_used=max(record.times_used, old.times_used),
            is_pinned=record.is_pinned or old.is_pinned,
        )
    marks = ", ".join("?" * len(COLUMNS))
    connection.execute(
        f"INSERT INTO models ({', '.join(COLUMNS)}) VALUES ({marks})",
        [getattr(record, column) for column in COLUMNS],
    )
    connection.executemany(
        f"INSERT INTO model_files (model_id, position, {', '.join(FILE_COLUMNS)})"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (record.model_id, position, file.name, str(path), file.size_bytes, file.sha256, file.modified_ns)
            for position, (file, path) in enumerate(zip(entry.files, entry.paths, strict=True))
        ],
    )
    return replaced


def insert_new(connection: sqlite3.Connection, entry: CatalogEntry) -> bool:
    """Enter a model unless its reference or its id is there; return whether it was entered."""
    if has(connection, entry.record):
        return False
    insert(connection, entry)
    return True


def has(connection: sqlite3.Connection, record: ModelRecord) -> bool:
    """Return whether a model with this reference or this id is there."""
    found = connection.execute(
        "SELECT 1 FROM models WHERE model_ref = ? OR model_id = ?", (record.model_ref, record.model_id)
    ).fetchone()
    return found is not None


def select(connection: sqlite3.Connection, column: str | None, value: str) -> list[CatalogEntry]:
    """Return the models whose `column` is `value`, all without a column; the last used first."""
    assert column in (None, "model_id", "model_ref")
    where = "" if column is None else f"WHERE {column} = ?"
    rows = connection.execute(
        f"SELECT {', '.join(COLUMNS)} FROM models {where} ORDER BY last_used_unix DESC, model_ref",
        () if column is None else (value,),
    ).fetchall()
    return [_entry_of(connection, row) for row in rows]


def with_content(connection: sqlite3.Connection, sha256s: Sequence[str]) -> list[CatalogEntry]:
    """Return the models whose files have exactly these checksums, in this order; the last used first."""
    rows = connection.execute(
        f"SELECT {', '.join(COLUMNS)} FROM models WHERE model_id IN"
        " (SELECT model_id FROM model_files WHERE position = 0 AND sha256 = ?)"
        " ORDER BY last_used_unix DESC, model_ref",
        (sha256s[0] if sha256s else "",),
    ).fetchall()
    found = [_entry_of(connection, row) for row in rows]
    return [entry for entry in found if [file.sha256 for file in entry.files] == list(sha256s)]


def _entry_of(connection: sqlite3.Connection, row: sqlite3.Row) -> CatalogEntry:
    rows = connection.execute(
        f"SELECT {', '.join(FILE_COLUMNS)} FROM model_files WHERE model_id = ? ORDER BY position",
        (row["model_id"],),
    ).fetchall()
    files = tuple(
        ModelFile(
            name=file["name"],
            size_bytes=file["size_bytes"],
            sha256=file["sha256"],
            modified_ns=file["modified_ns"],
        )
        for file in rows
    )
    values = {column: row[column] for column in COLUMNS}
    # SQLite has no truth values.
    record = msgspec.convert({**values, "files": [file.name for file in files]}, ModelRecord, strict=False)
    record = msgspec.structs.replace(record, parts=list(files))
    return CatalogEntry(record, files, tuple(Path(file["path"]) for file in rows))
