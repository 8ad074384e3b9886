"""How does a daemon keep state in one SQLite file without blocking its event loop?

All statements of a database run in one thread of its own, in the order in which they were asked
for: there is one writer, so nothing waits for a lock but another process.  What was acknowledged
is on disk (WAL, `synchronous=FULL`).

The schema grows by numbered files `0001_name.sql`, `0002_…` in a folder of the package; the
number of the last one applied is the file's `user_version`.
"""

import asyncio
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final, Self, TypeAlias, TypeVar

from arriero.contracts.errors import ArrieroError, ErrorCode

T = TypeVar("T")
Parameters: TypeAlias = Sequence[Any] | Mapping[str, Any]

BUSY_TIMEOUT_S: Final = 10.0
_MIGRATION_NAME: Final = re.compile(r"(\d{4})_[a-z0-9_]+\.sql")
_CORRUPT_CODES: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_CANNOT_OPEN_CODES: Final = frozenset(
    {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR}
)


class _CorruptDatabase(sqlite3.DatabaseError):
    """The integrity check found damage."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of a schema."""

    number: int
    sql: str


def read_migrations(package: str) -> list[Migration]:
    """Return the migrations in the folder of `package` (such as `arriero.agent.migrations`), in order.

    Raises ValueError if a name is not well formed or the numbers are not 1, 2, 3…
    """
    found: list[Migration] = []
    for entry in resources.files(package).iterdir():
        if not entry.name.endswith(".sql"):
            continue
        match = _MIGRATION_NAME.fullmatch(entry.name)
        if match is None:
            raise ValueError(f"{entry.name}: a migration is named like 0001_name.sql")
        found.append(Migration(int(match[1]), entry.read_text(encoding="utf-8")))
    found.sort(key=lambda migration: migration.number)
    if [migration.number for migration in found] != list(range(1, len(found) + 1)):
        raise ValueError(f"{package}: the numbers of its migrations are not 1, 2, 3…")
    return found


class Database:
    """One SQLite file, open.  Make it with `await Database.open(…)`, end it with `close()`.

    A caller that is cancelled does not undo what it asked for: a statement that began is finished.

    Every method raises INSUFFICIENT_DISK when the disk is full, STATE_DIR_UNUSABLE when the file
    cannot be read or written, INTERNAL_ERROR for all else; but a broken constraint is told as
    `sqlite3.IntegrityError`, for callers who can act on it.  No message holds a path.
    """

    def __init__(self, path: Path) -> None:
        """Open nothing yet; for `open` alone."""
        self._path = path
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"sqlite-{path.stem}")
        self._connection: sqlite3.Connection | None = None
        self._is_closed = False
        #: Name under which a corrupt file was set aside when this one was opened.
        self.set_aside_as: str | None = None

    @classmethod
    async def open(cls, path: Path, migrations: Sequence[Migration]) -> Self:
        """Open or create the file (mode 0600), check it, and bring its schema up to date.

        A corrupt file is moved to `NAME.corrupt-N` beside it, `set_aside_as` tells so, and an
        empty database takes its place.

        Raises STATE_DIR_UNUSABLE if it cannot be opened, VERSION_MISMATCH if a newer release wrote it.
        """
        database = cls(path)
        try:
            await database._submit(lambda: database._open(migrations))
        except BaseException:
            await database.close()
            raise
        return database

    async def execute(self, sql: str, parameters: Parameters = ()) -> int:
        """Run one statement in a transaction of its own; return how many rows it changed."""
        return await self.transaction(lambda connection: connection.execute(sql, parameters).rowcount)

    async def fetch_all(self, sql: str, parameters: Parameters = ()) -> list[sqlite3.Row]:
        """Return all rows of a query."""

        def query() -> list[sqlite3.Row]:
            return self._require().execute(sql, parameters).fetchall()

        return await self._submit(query)

    async def fetch_one(self, sql: str, parameters: Parameters = ()) -> sqlite3.Row | None:
        """Return the first row of a query, None if there is none."""

        def query() -> sqlite3.Row | None:
            cursor = self._require().execute(sql, parameters)
            row: sqlite3.Row | None = cursor.fetchone()
            cursor.close()
            return row

        return await self._submit(query)

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work(connection)` in the writer thread outside of a transaction (a backup needs that)."""
        return await self._submit(lambda: work(self._require()))

    async def transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work(connection)` in the writer thread; all of it is kept, or nothing if it raises."""

        def run() -> T:
            connection = self._require()
            connection.execute("BEGIN IMMEDIATE")
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            return result

        return await self._submit(run)

    async def close(self) -> None:
        """Finish what was asked for, fold the WAL into the file, end the thread.  Safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        closing = asyncio.get_running_loop().run_in_executor(self._executor, self._close)
        try:
            await asyncio.shield(closing)
        finally:
            # The thread has nothing left to do after `_close`: unless we were cancelled, no wait.
            self._executor.shutdown(wait=closing.done())

    async def _submit(self, job: Callable[[], T]) -> T:
        if self._is_closed:
            raise ArrieroError(ErrorCode.INTERNAL_ERROR, f"the database {self._path.name} is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, job)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            raise _translate(error, self._path.name) from error

    # --- In the writer thread ----------------------------------------------------------------

    def _require(self) -> sqlite3.Connection:
        assert self._connection is not None, "the database is open"
        return self._connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self, migrations: Sequence[Migration]) -> None:
        try:
            self._connect()
        except sqlite3.DatabaseError as error:
            if not isinstance(error, _CorruptDatabase) and _primary_code(error) not in _CORRUPT_CODES:
                raise
            self._close()
            self.set_aside_as = _set_aside(self._path)
            self._connect()
        self._migrate(migrations)

    def _connect(self) -> None:
        try:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise ArrieroError(
                ErrorCode.STATE_DIR_UNUSABLE,
                f"the database {self._path.name} cannot be opened: {error.strerror}",
                file=self._path.name,
            ) from error
        connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        self._connection = connection
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
        verdict = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
        if verdict != "ok":
            raise _CorruptDatabase("integrity check failed")

    def _migrate(self, migrations: Sequence[Migration]) -> None:
        connection = self._require()
        present = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if present > len(migrations):
            raise ArrieroError(
                ErrorCode.VERSION_MISMATCH,
                f"the database {self._path.name} has schema {present}, this release knows {len(migrations)}",
                schema=present,
                schema_known=len(migrations),
            )
        for migration in migrations[present:]:
            connection.execute("BEGIN IMMEDIATE")
            try:
                # Another process may have been here since: the lock is ours from now on.
                if int(connection.execute("PRAGMA user_version").fetchone()[0]) < migration.number:
                    for statement in _statements(migration.sql):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version={migration.number}")
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise


def _statements(sql: str) -> Iterator[str]:
    """Yield the statements of a script; `executescript` would end the transaction that they belong to."""
    statement = ""
    for piece in sql.split(";"):
        statement += f"{piece};"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip("; \n"):
        yield statement


def _primary_code(error: sqlite3.Error) -> int:
    # Extended codes carry more bits above the primary one.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _set_aside(path: Path) -> str:
    """Move the file and its WAL out of the way; return the new name."""
    number = 1
    while (target := path.with_name(f"{path.name}.corrupt-{number}")).exists():
        number += 1
    path.rename(target)
    for suffix in ("-wal", "-shm"):
        companion = path.with_name(path.name + suffix)
        if companion.exists():
            companion.rename(target.with_name(target.name + suffix))
    return target.name


def _translate(error: sqlite3.Error, name: str) -> ArrieroError:
    code = _primary_code(error)
    what = getattr(error, "sqlite_errorname", type(error).__name__)
    if code == sqlite3.SQLITE_FULL:
        return ArrieroError(ErrorCode.INSUFFICIENT_DISK, f"the disk is full: {name} cannot grow", file=name)
    if code in _CANNOT_OPEN_CODES:
        return ArrieroError(
            ErrorCode.STATE_DIR_UNUSABLE, f"the database {name} is unusable: {what}", file=name
        )
    return ArrieroError(ErrorCode.INTERNAL_ERROR, f"the database {name} failed: {what}", file=name)
