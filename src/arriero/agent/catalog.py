"""Which verified models does this machine have, and where are their files?

Each model of our own is a folder `MODELS_DIR/MODEL_ID` with its files and a `model.json` that says
what the catalog says; so a lost database is rebuilt from the folders.  External models (`file:`,
`demo`) stay where they are and are never removed by us.
"""

import functools
import hashlib
import re
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, Self

import msgspec

from arriero.agent.files import disk_error, in_thread, sha256_of
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import ModelFile, ModelRecord
from arriero.engines.base import ModelFacts
from arriero.runtime.clock import Clock
from arriero.runtime.sqlite import Database, read_migrations

MIGRATIONS: Final = "arriero.agent.migrations"
CARD_NAME: Final = "model.json"
_CARD_BYTES_MAX: Final = 1024 * 1024
_MODEL_ID: Final = re.compile(r"m-[0-9a-f]{12}")


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """`model.json` beside the files of a model of our own."""

    record: ModelRecord
    files: list[ModelFile]


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model with its files; `paths` are absolute, the one to load first."""

    record: ModelRecord
    files: tuple[ModelFile, ...]
    paths: tuple[Path, ...]

    @property
    def path(self) -> Path:
        """The file to give to the engine."""
        return self.paths[0]


def model_id_of(model_ref: str, sha256: str) -> str:
    """Return the id of a model: the same for the same reference and content."""
    return "m-" + hashlib.sha256(f"{model_ref}\n{sha256}".encode()).hexdigest()[:12]


def whole_sha256(files: Sequence[ModelFile]) -> str:
    """Return the hash of a model: its file's, or one over those of all its parts."""
    if len(files) == 1:
        return files[0].sha256
    return hashlib.sha256("".join(f"{f.sha256}  {f.name}\n" for f in files).encode()).hexdigest()


def make_record(
    *,
    model_ref: str,
    provider: str,
    files: Sequence[ModelFile],
    facts: ModelFacts,
    is_external: bool,
    added_unix: float,
    source: str,
    revision: str = "",
    projector: str = "",
) -> ModelRecord:
    """Return the record of a model that was just verified."""
    sha256 = whole_sha256(files)
    return ModelRecord(
        model_id=model_id_of(model_ref, sha256),
        model_ref=model_ref,
        provider=provider,
        files=[file.name for file in files],
        size_bytes=sum(file.size_bytes for file in files),
        sha256=sha256,
        added_unix=added_unix,
        is_external=is_external,
        architecture=facts.architecture,
        quantisation=facts.quantisation,
        context_length=facts.context_length,
        block_count=facts.block_count,
        parameters=facts.parameters,
        is_embedding=facts.is_embedding,
        has_chat_template=facts.has_chat_template,
        format=facts.format,
        revision=revision,
        source=source,
        projector=projector,
        head_count=facts.head_count,
        head_count_kv=facts.head_count_kv,
        embedding_length=facts.embedding_length,
        vocabulary_size=facts.vocabulary_size,
        parts=list(files),
    )


class ModelCatalog:
    """The models of one machine.  Make it with `await ModelCatalog.open(…)`, end it with `close()`."""

    def __init__(self, database: Database, models_dir: Path, clock: Clock) -> None:
        """Look at nothing yet; for `open` alone."""
        self._database = database
        self._clock = clock
        self.models_dir = models_dir
        #: What was found and put right at start: sentences for the log.
        self.notices: list[str] = []

    @classmethod
    async def open(cls, database_path: Path, models_dir: Path, clock: Clock) -> Self:
        """Open or create the catalog; put it in agreement with the files that are there.

        Entries whose files vanished or changed in size are dropped, folders with a card and no
        entry are taken in.  Raises STATE_DIR_UNUSABLE if a folder cannot be written.
        """
        try:
            models_dir = await in_thread(lambda: _make_folders(database_path.parent, models_dir))
        except OSError as error:
            raise disk_error(error, "it was created") from error
        database = await Database.open(database_path, read_migrations(MIGRATIONS))
        catalog = cls(database, models_dir, clock)
        try:
            if database.set_aside_as is not None:
                catalog.notices.append(
                    f"the catalog was corrupt: set aside as {database.set_aside_as}, rebuilt from the folders"
                )
            await catalog._drop_vanished()
            await catalog._adopt()
        except BaseException:
            await database.close()
            raise
        return catalog

    @property
    def database(self) -> Database:
        """The agent's database, which keeps the open downloads as well."""
        return self._database

    async def close(self) -> None:
        """Close the database; safe to call twice."""
        await self._database.close()

    async def add(self, entry: CatalogEntry) -> None:
        """Enter a verified model; one with the same reference or id is replaced."""
        await self._database.transaction(lambda connection: _insert(connection, entry))

    async def get(self, model_ref: str) -> CatalogEntry | None:
        """Return the entry of a reference, None if there is none or its files are not as they were."""
        entry = await self._find("model_ref", model_ref)
        return await self._if_present(entry) if entry is not None else None

    async def by_id(self, model_id: str) -> CatalogEntry:
        """Return the entry with an id.  Raises MODEL_NOT_FOUND."""
        entry = await self._find("model_id", model_id)
        if entry is None:
            raise ArrieroError(ErrorCode.MODEL_NOT_FOUND, f"the catalog has no model {model_id[:40]!r}")
        return entry

    async def with_content(self, sha256s: Sequence[str]) -> CatalogEntry | None:
        """Return an entry, of whatever reference, whose files are exactly these."""
        for entry in await self._entries():
            if [file.sha256 for file in entry.files] == list(sha256s):
                return await self._if_present(entry)
        return None

    async def records(self) -> list[ModelRecord]:
        """Return all models, the last used first."""
        return [entry.record for entry in await self._entries()]

    async def touch(self, model_id: str) -> None:
        """Note that a model is used now."""
        await self._database.execute(
            "UPDATE models SET last_used_unix = ?, times_used = times_used + 1 WHERE model_id = ?",
            (self._clock.wall_s(), model_id),
        )

    async def remove(self, model_id: str) -> ModelRecord:
        """Forget a model and delete its files, unless they are external.  Raises MODEL_NOT_FOUND."""
        entry = await self.by_id(model_id)
        await self._forget(model_id)
        if not entry.record.is_external:
            # The files go last: a folder that is left over is taken in again, never half a model.
            await in_thread(lambda: _remove_folder(self.models_dir / model_id))
        return entry.record

    async def verify(self, model_id: str, on_read: Callable[[int], None] | None = None) -> ModelRecord:
        """Hash a model's files again.

        Raises MODEL_NOT_FOUND, INVALID_MODEL_PATH if a file is gone, MODEL_CORRUPTED naming the file.
        """
        entry = await self.by_id(model_id)
        for file, path in zip(entry.files, entry.paths, strict=True):
            try:
                sha256 = await sha256_of(path, on_read)
            except OSError as error:
                raise ArrieroError(
                    ErrorCode.INVALID_MODEL_PATH,
                    f"{file.name} of {entry.record.model_ref} cannot be read: {error.strerror}",
                    model_id=model_id,
                    file=file.name,
                ) from error
            if sha256 != file.sha256:
                _corrupted(entry, file.name, f"has the checksum {sha256[:12]}…, not {file.sha256[:12]}…")
        return entry.record

    # --- Rows ---------------------------------------------------------------------------------

    async def _find(self, column: str, value: str) -> CatalogEntry | None:
        found = await self._database.transaction(lambda connection: _select(connection, column, value))
        return found[0] if found else None

    async def _entries(self) -> list[CatalogEntry]:
        return await self._database.transaction(lambda connection: _select(connection, None, ""))

    async def _forget(self, model_id: str) -> None:
        await self._database.execute("DELETE FROM models WHERE model_id = ?", (model_id,))

    async def _if_present(self, entry: CatalogEntry) -> CatalogEntry | None:
        if await in_thread(lambda: _is_as_verified(entry)):
            return entry
        await self._forget(entry.record.model_id)
        return None

    # --- At start -----------------------------------------------------------------------------

    async def _drop_vanished(self) -> None:
        for entry in await self._entries():
            if await self._if_present(entry) is None:
                self.notices.append(f"{entry.record.model_ref}: its file vanished or changed, entry dropped")

    async def _adopt(self) -> None:
        known = {entry.record.model_id for entry in await self._entries()}
        for entry in await in_thread(lambda: _read_cards(self.models_dir, known)):
            if not await in_thread(functools.partial(_is_as_verified, entry)):
                self.notices.append(f"{entry.record.model_id}: not as its card says, left alone")
            elif await self._find("model_ref", entry.record.model_ref) is None:
                await self.add(entry)
                self.notices.append(f"{entry.record.model_ref}: found in its folder, entered again")


def _corrupted(entry: CatalogEntry, name: str, why: str) -> NoReturn:
    raise ArrieroError(
        ErrorCode.MODEL_CORRUPTED,
        f"{name} of {entry.record.model_ref} {why}",
        model_id=entry.record.model_id,
        file=name,
        suggested_action="remove the model, then fetch it again",
    )


# --- In threads --------------------------------------------------------------------------------


def _make_folders(database_dir: Path, models_dir: Path) -> Path:
    database_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    models_dir.mkdir(parents=True, exist_ok=True)
    return models_dir.resolve()


def _remove_folder(folder: Path) -> None:
    # The card first: without it, what a crash leaves is not taken for a model.
    (folder / CARD_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _is_as_verified(entry: CatalogEntry) -> bool:
    """Return whether all files are there with their size; external ones unchanged since as well."""
    for file, path in zip(entry.files, entry.paths, strict=True):
        try:
            seen = path.stat()
        except OSError:
            return False
        if seen.st_size != file.size_bytes:
            return False
        if entry.record.is_external and seen.st_mtime_ns != file.modified_ns:
            return False
    return True


def _read_cards(models_dir: Path, known: set[str]) -> list[CatalogEntry]:
    found = []
    for folder in sorted(models_dir.iterdir()):
        if not _MODEL_ID.fullmatch(folder.name) or folder.name in known:
            continue
        try:
            with (folder / CARD_NAME).open("rb") as file:
                card = msgspec.json.decode(file.read(_CARD_BYTES_MAX), type=Card)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            continue
        names = [file.name for file in card.files]
        is_sound = card.record.model_id == folder.name and not card.record.is_external
        if is_sound and names and all(name == Path(name).name for name in names):
            found.append(CatalogEntry(card.record, tuple(card.files), tuple(folder / name for name in names)))
    return found


# --- In the database's thread ------------------------------------------------------------------

_COLUMNS: Final = tuple(name for name in ModelRecord.__struct_fields__ if name not in ("files", "parts"))


def _insert(connection: sqlite3.Connection, entry: CatalogEntry) -> None:
    record = entry.record
    connection.execute(
        "DELETE FROM models WHERE model_ref = ? OR model_id = ?", (record.model_ref, record.model_id)
    )
    marks = ", ".join("?" * len(_COLUMNS))
    connection.execute(
        f"INSERT INTO models ({', '.join(_COLUMNS)}) VALUES ({marks})",
        [getattr(record, column) for column in _COLUMNS],
    )
    connection.executemany(
        "INSERT INTO model_files (model_id, position, name, path, size_bytes, sha256, modified_ns)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (record.model_id, position, file.name, str(path), file.size_bytes, file.sha256, file.modified_ns)
            for position, (file, path) in enumerate(zip(entry.files, entry.paths, strict=True))
        ],
    )


def _select(connection: sqlite3.Connection, column: str | None, value: str) -> list[CatalogEntry]:
    assert column in (None, "model_id", "model_ref")
    where = "" if column is None else f"WHERE {column} = ?"
    rows = connection.execute(
        f"SELECT {', '.join(_COLUMNS)} FROM models {where} ORDER BY last_used_unix DESC, model_ref",
        () if column is None else (value,),
    ).fetchall()
    return [_entry_of(connection, row) for row in rows]


def _entry_of(connection: sqlite3.Connection, row: sqlite3.Row) -> CatalogEntry:
    rows = connection.execute(
        "SELECT name, path, size_bytes, sha256, modified_ns FROM model_files"
        " WHERE model_id = ? ORDER BY position",
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
    values = {column: row[column] for column in _COLUMNS}
    # SQLite has no truth values.
    record = msgspec.convert({**values, "files": [file.name for file in files]}, ModelRecord, strict=False)
    record = msgspec.structs.replace(record, parts=list(files))
    return CatalogEntry(record, files, tuple(Path(file["path"]) for file in rows))
