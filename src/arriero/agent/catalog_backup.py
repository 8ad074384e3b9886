"""How is the catalog put into one file, and what of such a file is believed when it comes back?

A backup may come from anybody: a file that is not exactly a catalog's is refused, and each of its
entries is a claim (`claims`) until its files were read again.
"""

import asyncio
import contextlib
import os
import sqlite3
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from arriero import demo_model
from arriero.agent import claims
from arriero.agent.catalog import MIGRATIONS, ModelCatalog
from arriero.agent.catalog_entry import CatalogEntry
from arriero.agent.files import in_thread
from arriero.contracts import refs
from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.records import RestoreResult
from arriero.runtime.sqlite import Database, read_migrations

BYTES_MAX: Final = 64_000_000
MODELS_MAX: Final = 100_000
#: Steps of SQLite's machine that looking at a file may take: some seconds.
STEPS_MAX: Final = 200_000_000
#: A whole copy is one step; each that finds the database busy takes a quarter of a second.
BUSY_STEPS_MAX: Final = 40
_STEPS_AT_ONCE: Final = 100_000
_HEAD: Final = b"SQLite format 3\0"
_NAME: Final = "catalog.db"
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Restorable:
    """What a backup claims: entries to be read through, and a sentence for each that is left out."""

    entries: list[CatalogEntry]
    left_out: list[str]


async def backup(catalog: ModelCatalog) -> bytes:
    """Return the whole catalog as one SQLite file, as of one moment, its integrity checked.

    Raises REQUEST_TOO_LARGE if it has more than 64 MB, INTERNAL_ERROR if it is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="arriero-") as folder:
        path = Path(folder) / _NAME
        await catalog.copy_database(lambda connection: _copy(connection, path))
        content = await in_thread(path.read_bytes)
    if len(content) > BYTES_MAX:
        fail(ErrorCode.REQUEST_TOO_LARGE, f"the backup has {len(content)} bytes, {BYTES_MAX} can be restored")
    return content


async def read_backup(content: bytes, models_dir: Path) -> Restorable:
    """Return what a backup claims.  Nothing is changed.

    Raises INVALID_REQUEST for what is no catalog, VERSION_MISMATCH for one of a newer release.
    """
    if not content.startswith(_HEAD):
        _refuse("it is no SQLite file")
    with tempfile.TemporaryDirectory(prefix="arriero-") as folder:
        path = Path(folder) / _NAME
        await in_thread(lambda: path.write_bytes(content))
        # Not waited for by `in_thread`'s rule: the steps are limited, and the file is our own.
        await asyncio.to_thread(_check, path)
        database = await Database.open(path, read_migrations(MIGRATIONS))
        try:
            if database.set_aside_as is not None:
                _refuse("it is damaged")
            found = await database.transaction(_read)
        finally:
            await database.close()
    return await in_thread(lambda: _sift(found, models_dir))


async def restore(
    catalog: ModelCatalog,
    claimed: Restorable,
    *,
    inspect: claims.Inspect,
    tell: Tell = lambda *_: None,
) -> RestoreResult:
    """Enter what a backup claims where its files are there and every byte of them is as it says.

    What the catalog has already is kept as it is.  All that is found good is entered at once, or
    nothing.
    """
    left_out = list(claimed.left_out)
    total_bytes = sum(entry.record.size_bytes for entry in claimed.entries)
    before_bytes = 0
    good: list[CatalogEntry] = []
    for entry in claimed.entries:
        ref, start = entry.record.model_ref, before_bytes
        if await catalog.get(ref) is not None:
            left_out.append(f"{ref}: is in the catalog already, kept as it is")
        else:
            try:
                good.append(
                    await claims.verified(
                        entry,
                        inspect,
                        lambda read, ref=ref, start=start: tell(ref, start + read, total_bytes),  # type: ignore[misc]  # Defaults bind the loop's values.
                    )
                )
            except ArrieroError as error:
                left_out.append(f"{ref}: {error.message}")
        before_bytes += entry.record.size_bytes
        tell(ref, before_bytes, total_bytes)
    restored = await catalog.add_new(good)
    entered = {entry.record.model_id for entry in restored}
    left_out += [
        f"{entry.record.model_ref}: is in the catalog already, kept as it is"
        for entry in good
        if entry.record.model_id not in entered
    ]
    for entry in restored:
        await catalog.write_card(entry)
    return RestoreResult(restored=[entry.record for entry in restored], left_out=left_out)


# --- In the database's thread, and in others ---------------------------------------------------


def _copy(connection: sqlite3.Connection, path: Path) -> None:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as target:
        connection.backup(target, progress=_patience())
        # One file, whole in itself.
        target.execute("PRAGMA journal_mode=DELETE")
        verdict = target.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if verdict != "ok":
        raise ArrieroError(ErrorCode.INTERNAL_ERROR, "the catalog is damaged: no backup was made")


def _patience() -> Callable[[int, int, int], None]:
    """Return what ends a copy that another process does not let through; it would wait for ever."""
    steps = 0

    def count(_: int, remaining: int, total: int) -> None:
        nonlocal steps
        steps += 1
        if steps > BUSY_STEPS_MAX:
            raise ArrieroError(ErrorCode.INTERNAL_ERROR, "the catalog is busy: no backup was made")

    return count


def _check(path: Path) -> None:
    """Return if a file is whole and has exactly the tables of some release's catalog."""
    migrations = read_migrations(MIGRATIONS)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        _limit(connection)
        try:
            connection.execute("PRAGMA trusted_schema=OFF")
            connection.execute("PRAGMA cell_size_check=ON")
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            if version > len(migrations):
                fail(
                    ErrorCode.VERSION_MISMATCH,
                    f"the backup has schema {version}, this release knows {len(migrations)}",
                    schema=version,
                    schema_known=len(migrations),
                )
            if not version >= 1 or _schema(connection) != _schema_of(version):
                _refuse("it has other tables than a catalog")
            if connection.execute("PRAGMA integrity_check(1)").fetchone()[0] != "ok":
                _refuse("it is damaged")
            if connection.execute("SELECT count(*) FROM models").fetchone()[0] > MODELS_MAX:
                _refuse(f"it has more than {MODELS_MAX} models")
        except (sqlite3.Error, UnicodeError) as error:
            _refuse(f"it is damaged ({getattr(error, 'sqlite_errorname', 'no text')})")


def _limit(connection: sqlite3.Connection) -> None:
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += _STEPS_AT_ONCE
        return int(steps > STEPS_MAX)

    connection.set_progress_handler(count, _STEPS_AT_ONCE)


def _schema(connection: sqlite3.Connection) -> set[tuple[str, str, str, str]]:
    rows = connection.execute("SELECT type, name, tbl_name, coalesce(sql, '') FROM sqlite_master").fetchall()
    return {(kind, name, table, " ".join(str(sql).split())) for kind, name, table, sql in rows}


def _schema_of(version: int) -> set[tuple[str, str, str, str]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        for migration in read_migrations(MIGRATIONS)[:version]:
            connection.executescript(migration.sql)
        return _schema(connection)


def _read(connection: sqlite3.Connection) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return the rows of all models and of their files, as they stand there."""
    connection.text_factory = lambda raw: raw.decode("utf-8", "replace")
    files: dict[str, list[dict[str, Any]]] = {}
    for row in connection.execute("SELECT * FROM model_files ORDER BY model_id, position"):
        files.setdefault(row["model_id"], []).append(dict(row))
    return [
        (dict(row), files.get(row["model_id"], []))
        for row in connection.execute("SELECT * FROM models ORDER BY last_used_unix DESC, model_ref")
    ]


def _sift(found: list[tuple[dict[str, Any], list[dict[str, Any]]]], models_dir: Path) -> Restorable:
    entries, left_out = [], []
    for row, files in found:
        try:
            entries.append(_entry(row, files, models_dir))
        except claims.Unbelievable as error:
            name = str(row["model_ref"])[:200]
            left_out.append(f"{name if name.isprintable() else ascii(name)}: {error}")
    return Restorable(entries, left_out)


def _entry(row: dict[str, Any], file_rows: list[dict[str, Any]], models_dir: Path) -> CatalogEntry:
    """Return what the rows of one model claim.  Raises Unbelievable."""
    record, files = claims.record_of(claims.convert({"record": row, "files": file_rows}))
    stored = [Path(str(file["path"])) for file in file_rows]
    if record.is_external:
        paths = tuple(stored)
        _check_external(record.model_ref, paths, models_dir)
    else:
        folder = models_dir / record.model_id
        paths = tuple(folder / file.name for file in files)
        # The models folder may be another one by now; a model's own folder has the same name.
        if any(was.parts[-2:] != path.parts[-2:] for was, path in zip(stored, paths, strict=True)):
            raise claims.Unbelievable("its files lie outside of the models folder")
        if folder.is_symlink() or any(path.is_symlink() for path in paths):
            raise claims.Unbelievable("its folder or a file of it is a link")
    entry = CatalogEntry(record, files, paths)
    for file, path in zip(files, paths, strict=True):
        try:
            seen = path.stat()
        except (OSError, ValueError):
            raise claims.Unbelievable(f"its file {file.name} is not there") from None
        if not stat.S_ISREG(seen.st_mode) or seen.st_size != file.size_bytes:
            raise claims.Unbelievable(f"its file {file.name} is another one now")
    return entry


def _check_external(model_ref: str, paths: tuple[Path, ...], models_dir: Path) -> None:
    parsed = refs.parse(model_ref)
    if any(path.is_relative_to(models_dir) for path in paths):
        raise claims.Unbelievable("it is called external and lies in the models folder")
    if not all(path.is_absolute() and ".." not in path.parts for path in paths):
        raise claims.Unbelievable("a path of it is not absolute")
    expected: Path | None = None
    try:
        if isinstance(parsed, refs.FileRef):
            expected = Path(parsed.path).resolve()
        elif isinstance(parsed, refs.DemoRef):
            expected = demo_model.path().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise claims.Unbelievable("its path cannot be looked at") from error
    if expected is not None and paths != (expected,):
        raise claims.Unbelievable("its file is not the one that its reference names")


def _refuse(why: str) -> NoReturn:
    raise ArrieroError(
        ErrorCode.INVALID_REQUEST,
        f"this is no backup of a catalog: {why}",
        suggested_action="Give a file that `arriero models backup` wrote.",
    )
