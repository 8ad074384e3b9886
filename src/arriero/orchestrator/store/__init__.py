"""What of the orchestrator survives its end?  One SQLite file, a module a subject."""

from pathlib import Path
from typing import Final

from arriero.runtime.sqlite import Database, read_migrations

_MIGRATIONS: Final = "arriero.orchestrator.store.migrations"


async def open_database(path: Path) -> Database:
    """Open or create the orchestrator's database.  Raises STATE_DIR_UNUSABLE, VERSION_MISMATCH."""
    return await Database.open(path, read_migrations(_MIGRATIONS))
