"""Which verified models does this machine have, and where are their files?  (`ModelCatalog`)

Each model of our own is a folder `MODELS_DIR/MODEL_ID` with its files and a `model.json` that says
what the catalog says; so a lost database is rebuilt from the folders, every byte read again before
a model is served.  External models (`file:`, `demo`, those of other programs) stay where they are
and are never removed by us.
"""

import asyncio
import functools
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Self, TypeVar

from arriero.agent import catalog_rows as rows
from arriero.agent import claims
from arriero.agent.catalog_entry import (
    CARD_NAME,
    IMPORT_PREFIX,
    PARTIAL_DIR,
    Card,
    CatalogEntry,
    make_record,
    model_id_of,
    put_in_place,
    remove_card,
    remove_folder,
    whole_sha256,
    write_card,
)
from arriero.agent.files import disk_error, in_thread, is_text
from arriero.contracts import names
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import ModelFile, ModelRecord
from arriero.runtime import logs
from arriero.runtime.clock import Clock
from arriero.runtime.sqlite import Database, read_migrations
from arriero.runtime.tasks import Changed

__all__ = [
    "CARD_NAME",
    "MIGRATIONS",
    "Card",
    "CatalogEntry",
    "ModelCatalog",
    "make_record",
    "model_id_of",
    "whole_sha256",
]

MIGRATIONS: Final = "arriero.agent.migrations"
T = TypeVar("T")


class _Waiting:
    """A folder with a card and without an entry: to be read through before it is a model."""

    def __init__(self, entry: CatalogEntry) -> None:
        self.entry = entry
        self.lock = asyncio.Lock()


class ModelCatalog:
    """The models of one machine.  Make it with `await ModelCatalog.open(…)`, end it with `close()`."""

    def __init__(
        self, database: Database, models_dir: Path, clock: Clock, inspect: claims.Inspect | None
    ) -> None:
        """Look at nothing yet; for `open` alone."""
        self._database = database
        self._clock = clock
        self._inspect = inspect
        self._waiting: dict[str, _Waiting] = {}
        #: Entries whose files vanished, by reference: what was noted of their use is not lost with them.
        self._dropped: dict[str, CatalogEntry] = {}
        self._placing = asyncio.Lock()
        self._rereading = asyncio.Lock()
        self._log = logs.get("arriero.agent.catalog")
        self.models_dir = models_dir
        #: What was found and put right: sentences, each in the log as well.
        self.notices: list[str] = []
        #: How often the entries changed, and who waits for that; that a model was used is no change.
        self.version = 0
        self.changed = Changed()

    @classmethod
    async def open(
        cls, database_path: Path, models_dir: Path, clock: Clock, inspect: claims.Inspect | None = None
    ) -> Self:
        """Open or create the catalog; put it in agreement with the files that are there.

        Entries whose files vanished or were written to are dropped.  Folders with a card and no
        entry are taken in by `recheck`, or when they are asked for: each is read through first, and
        its header by `inspect`.  Raises STATE_DIR_UNUSABLE if a folder cannot be written,
        VERSION_MISMATCH if a newer release wrote the database.
        """
        try:
            models_dir = await in_thread(lambda: _make_folders(database_path.parent, models_dir))
        except OSError as error:
            raise disk_error(error, "it was created") from error
        if not is_text(models_dir):
            raise ArrieroError(ErrorCode.STATE_DIR_UNUSABLE, "the path of the models folder is no UTF-8")
        database = await Database.open(database_path, read_migrations(MIGRATIONS))
        catalog = cls(database, models_dir, clock, inspect)
        try:
            if database.set_aside_as is not None:
                catalog._note(
                    f"the catalog was corrupt: set aside as {database.set_aside_as}; its models are entered "
                    "again from their folders once every byte was read"
                )
            await catalog._drop_vanished()
            await catalog._find_folders()
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

    async def recheck(self) -> None:
        """Read through the folders that have a card and no entry, one after the other; enter them.

        May take minutes: for a task beside the requests.  A model that is asked for meanwhile does
        not wait for its turn.
        """
        for model_id in list(self._waiting):
            try:
                await self._take_in(model_id)
            except ArrieroError as error:
                # The database: whoever asks for the model is told, and the next start tries again.
                self._log.warning("model_not_taken_in", model_id=model_id, code=str(error.code))

    @property
    def waiting(self) -> list[str]:
        """The ids of the models that were found in folders and are not read through yet."""
        return list(self._waiting)

    # --- Asked --------------------------------------------------------------------------------

    async def get(self, model_ref: str) -> CatalogEntry | None:
        """Return the entry of a reference, None if there is none or its files are not as they were.

        One that waits to be read through is read first.
        """
        for model_id, waiting in list(self._waiting.items()):
            if waiting.entry.record.model_ref == model_ref:
                await self._take_in(model_id)
        entry = await self._find("model_ref", model_ref)
        return await self._if_present(entry) if entry is not None else None

    async def by_id(self, model_id: str) -> CatalogEntry:
        """Return the entry with an id; one that waits is read through first.  Raises MODEL_NOT_FOUND."""
        await self._take_in(model_id)
        entry = await self._find("model_id", model_id)
        if entry is None:
            raise ArrieroError(ErrorCode.MODEL_NOT_FOUND, f"the catalog has no model {model_id[:40]!r}")
        return entry

    async def records(self) -> list[ModelRecord]:
        """Return all models, the last used first."""
        return [entry.record for entry in await self.entries()]

    async def entries(self) -> list[CatalogEntry]:
        """Return all models with their files, the last used first."""
        return await self._database.transaction(lambda connection: rows.select(connection, None, ""))

    async def with_content(self, sha256s: Sequence[str]) -> CatalogEntry | None:
        """Return a model of any reference whose files have exactly these checksums, in this order.

        None if there is none, or none whose files are all there and were not written to since they
        were verified.
        """
        wanted = list(sha256s)
        for entry in await self._database.transaction(
            lambda connection: rows.with_content(connection, wanted)
        ):
            if await in_thread(functools.partial(claims.is_as_verified, entry, is_strict=True)):
                return entry
        return None

    # --- Changed ------------------------------------------------------------------------------

    async def add(self, entry: CatalogEntry) -> None:
        """Enter a verified model; one with the same reference or id is replaced.

        What was noted of its use stays; the folder of other content it had goes.
        """
        dropped = self._dropped.get(entry.record.model_ref)
        formerly = [] if dropped is None else [dropped]
        replaced = await self._database.transaction(
            lambda connection: rows.insert(connection, entry, formerly)
        )
        self._dropped.pop(entry.record.model_ref, None)
        self._tell()
        for old in {entry.record.model_id: entry.record for entry in replaced}.values():
            self._waiting.pop(old.model_id, None)
            if old.model_id != entry.record.model_id and not old.is_external:
                try:
                    await in_thread(functools.partial(remove_folder, self.models_dir / old.model_id))
                except OSError as error:
                    self._log.warning("folder_not_removed", model_id=old.model_id, reason=error.strerror)

    async def add_new(self, entries: Sequence[CatalogEntry]) -> list[CatalogEntry]:
        """Enter verified models, all at once or none; return those whose reference and id were new."""
        new = await self._database.transaction(
            lambda connection: [entry for entry in entries if rows.insert_new(connection, entry)]
        )
        self._tell()
        return new

    async def publish(self, ready: Path, record: ModelRecord, files: Sequence[ModelFile]) -> CatalogEntry:
        """Give a folder of whole, verified files its final name, with its card, and enter it.

        `ready` is a folder below `models_dir`; it is gone afterwards, also where the model is there
        already.  Raises INSUFFICIENT_DISK and STATE_DIR_UNUSABLE; then nothing is visible, and what is
        in place already is taken in when it is asked for.
        """
        target = self.models_dir / record.model_id
        entry = CatalogEntry(record, tuple(files), tuple(target / file.name for file in files))
        async with self._placing:
            present = await self._find("model_id", record.model_id)
            if present is not None and await in_thread(lambda: claims.is_as_verified(present)):
                await in_thread(lambda: shutil.rmtree(ready, ignore_errors=True))
                return present
            try:
                await in_thread(lambda: put_in_place(ready, target, Card(record=record, files=list(files))))
                self._waiting.pop(record.model_id, None)
                await self.add(entry)
            except OSError as error:
                raise disk_error(error, "a model was put in place") from error
            except (ArrieroError, asyncio.CancelledError):
                # It is in place and not entered: whoever asks for it next has it read through.
                self._waiting[record.model_id] = _Waiting(entry)
                raise
        return entry

    async def touch(self, model_id: str) -> None:
        """Note that a model is used now."""
        await self._database.execute(
            "UPDATE models SET last_used_unix = ?, times_used = times_used + 1 WHERE model_id = ?",
            (self._clock.wall_s(), model_id),
        )

    async def set_pinned(self, model_id: str, is_pinned: bool) -> ModelRecord:
        """Say whether a model may be pruned; return its record.  Raises MODEL_NOT_FOUND."""
        await self.by_id(model_id)
        await self._database.execute(
            "UPDATE models SET is_pinned = ? WHERE model_id = ?", (is_pinned, model_id)
        )
        self._tell()
        entry = await self.by_id(model_id)
        await self.write_card(entry)
        return entry.record

    async def write_card(self, entry: CatalogEntry) -> None:
        """Have the card beside a model of our own say what its entry says; a failure is only logged."""
        if not entry.record.is_external:
            try:
                await in_thread(lambda: self._note_in_card(entry))
            except OSError as error:
                # The catalog knows it; only a rebuild from the folders would not.
                self._log.warning("card_not_written", model_id=entry.record.model_id, reason=error.strerror)

    async def remove(self, model_id: str) -> ModelRecord:
        """Forget a model and delete its files, unless they are external.

        Raises MODEL_NOT_FOUND, and STATE_DIR_UNUSABLE where the disk lets nothing be removed: then it
        stays as it was.
        """
        entry = await self.by_id(model_id)
        folder = self.models_dir / model_id
        async with self._placing:  # Not while the same content comes into its place once more.
            try:
                if not entry.record.is_external:
                    # First what may be refused; without its card, what is left over is no model.
                    await in_thread(lambda: remove_card(folder))
                await self._forget(model_id)
                if not entry.record.is_external:
                    await in_thread(lambda: remove_folder(folder))
            except OSError as error:
                raise disk_error(error, "a model was removed") from error
        return entry.record

    async def verify(self, model_id: str, on_read: Callable[[int], None] = lambda _: None) -> ModelRecord:
        """Hash a model's files again; `on_read` is told the bytes read of all of them so far.

        Raises MODEL_NOT_FOUND, INVALID_MODEL_PATH if a file is gone, MODEL_CORRUPTED naming the file; a
        model that is not as it was is not served again, but fetched.
        """
        entry = await self.by_id(model_id)
        try:
            await claims.check_files(entry, on_read)
        except ArrieroError as error:
            if error.code is ErrorCode.MODEL_CORRUPTED:
                # It stays listed, to be removed or fetched again; whoever wants it has it read first.
                await self._database.execute(
                    "UPDATE model_files SET modified_ns = 0 WHERE model_id = ?", (model_id,)
                )
                self._tell()
            raise
        return entry.record

    async def copy_database(self, copy: Callable[[sqlite3.Connection], T]) -> T:
        """Let `copy` read the whole database, in the database's thread."""
        return await self._database.read(copy)

    # --- Entries and their files --------------------------------------------------------------

    async def _find(self, column: str, value: str) -> CatalogEntry | None:
        found = await self._database.transaction(lambda connection: rows.select(connection, column, value))
        return found[0] if found else None

    async def _forget(self, model_id: str) -> None:
        await self._database.execute("DELETE FROM models WHERE model_id = ?", (model_id,))
        self._tell()

    def _tell(self) -> None:
        self.version += 1
        self.changed.notify()

    async def _if_present(self, entry: CatalogEntry) -> CatalogEntry | None:
        if await in_thread(lambda: claims.is_as_verified(entry, is_strict=True)):
            return entry
        if await in_thread(lambda: claims.is_as_verified(entry)):
            return await self._read_again(entry)
        await self._drop(entry)
        return None

    async def _drop(self, entry: CatalogEntry) -> None:
        self._dropped[entry.record.model_ref] = entry
        await self._forget(entry.record.model_id)

    async def _read_again(self, entry: CatalogEntry) -> CatalogEntry | None:
        """Return a model of our own that was written to once it was read; None if it is not as it was."""
        async with self._rereading:
            # Whoever had the turn before may have read this very model.
            now = await self._find("model_id", entry.record.model_id)
            if now is None or await in_thread(lambda: claims.is_as_verified(now, is_strict=True)):
                return now
            try:
                checked = await claims.verified(now, self._inspect)
            except ArrieroError as error:
                self._note(f"{error.message}; it is fetched again when it is wanted")
                await self._drop(now)
                return None
            await self.add(checked)
            return checked

    def _note_in_card(self, entry: CatalogEntry) -> None:
        folder = self.models_dir / entry.record.model_id
        if not folder.is_symlink():
            write_card(folder, Card(record=entry.record, files=list(entry.files)))

    def _note(self, sentence: str) -> None:
        self.notices.append(sentence)
        self._log.warning("catalog_notice", notice=sentence)

    # --- What is found at start ---------------------------------------------------------------

    async def _drop_vanished(self) -> None:
        for entry in await self.entries():
            if await in_thread(functools.partial(claims.is_as_verified, entry, is_strict=True)):
                continue
            # Its folder is found as one without an entry, and read through without keeping the start waiting.
            is_whole = await in_thread(functools.partial(claims.is_as_verified, entry))
            what = "was written to, it is read through first" if is_whole else "vanished or changed"
            await self._drop(entry)
            self._note(f"{entry.record.model_ref}: its file {what}, entry dropped")

    async def _find_folders(self) -> None:
        known = {record.model_id: record.model_ref for record in await self.records()}
        found, problems = await in_thread(lambda: _read_folders(self.models_dir, set(known)))
        for problem in problems:
            self._note(problem)
        # Of two contents of one reference the newer one is the one that was meant.
        for entry in sorted(found, key=lambda entry: -entry.record.added_unix):
            if entry.record.model_ref in known.values():
                self._note(f"{entry.record.model_id}: other content of {entry.record.model_ref}, left alone")
            else:
                self._waiting[entry.record.model_id] = _Waiting(entry)

    async def _take_in(self, model_id: str) -> None:
        """Read a folder through that waits, and enter it; nothing happens to one that does not wait."""
        waiting = self._waiting.get(model_id)
        if waiting is None:
            return
        async with waiting.lock:
            if self._waiting.get(model_id) is not waiting:
                return
            ref = waiting.entry.record.model_ref
            if await self._find("model_id", model_id) is not None:
                self._waiting.pop(model_id, None)  # Entered in the moment in which it was given up.
                return
            try:
                entry = await claims.verified(waiting.entry, self._inspect)
            except ArrieroError as error:
                self._note(f"{model_id}: {error.message}; its folder is left alone")
            else:
                is_new = await self.add_new([entry])
                self._note(
                    f"{ref}: found in its folder, read through, entered again"
                    if is_new
                    else f"{model_id}: other content of {ref}, left alone"
                )
            self._waiting.pop(model_id, None)


# --- In threads --------------------------------------------------------------------------------


def _make_folders(database_dir: Path, models_dir: Path) -> Path:
    database_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    models_dir.mkdir(parents=True, exist_ok=True)
    for folder in (models_dir / PARTIAL_DIR).glob(f"{IMPORT_PREFIX}*"):
        # A copy that a crash cut short; its source is still where it was.
        shutil.rmtree(folder, ignore_errors=True)
    return models_dir.resolve()


def _read_folders(models_dir: Path, known: set[str]) -> tuple[list[CatalogEntry], list[str]]:
    """Return what the cards of folders without an entry claim, and a sentence for each without belief."""
    found, problems = [], []
    for folder in sorted(models_dir.iterdir()):
        if not names.is_model_id(folder.name) or folder.name in known:
            continue
        try:
            entry = claims.read_folder(folder)
        except claims.Unbelievable as error:
            problems.append(f"{folder.name}: {error}; left alone")
            continue
        if claims.is_as_verified(entry):
            found.append(entry)
        else:
            problems.append(f"{folder.name}: not as its card says, left alone")
    return found, problems
