"""Which downloads did an agent leave open that was killed, so that the next one goes on with them?

A row lives as long as its download; an agent that ends in order ends its downloads first.
"""

from dataclasses import dataclass

from arriero.runtime.sqlite import Database


@dataclass(frozen=True, slots=True)
class OpenDownload:
    """One download as it was begun, and which machine of the pool its bytes come from, if any."""

    download_id: str
    model_ref: str
    started_unix: float
    is_clean: bool
    source: str = ""


class OpenDownloads:
    """The open downloads of one machine, in the agent's database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def all(self) -> list[OpenDownload]:
        """Return those that are open, the oldest first."""
        rows = await self._database.fetch_all(
            "SELECT download_id, model_ref, started_unix, is_clean, source FROM downloads"
            " ORDER BY started_unix"
        )
        return [
            OpenDownload(
                row["download_id"],
                row["model_ref"],
                row["started_unix"],
                is_clean=bool(row["is_clean"]),
                source=row["source"],
            )
            for row in rows
        ]

    async def add(self, download: OpenDownload) -> None:
        """Note that a download is open; an older one of the same reference is forgotten."""
        await self._database.execute(
            "INSERT OR REPLACE INTO downloads (download_id, model_ref, started_unix, is_clean, source)"
            " VALUES (?, ?, ?, ?, ?)",
            (
                download.download_id,
                download.model_ref,
                download.started_unix,
                download.is_clean,
                download.source,
            ),
        )

    async def comes_from(self, download_id: str, source: str) -> None:
        """Note which machine of the pool a download's bytes come from now."""
        await self._database.execute(
            "UPDATE downloads SET source = ? WHERE download_id = ?", (source, download_id)
        )

    async def remove(self, download_id: str) -> None:
        """Note that a download has ended; safe to call twice."""
        await self._database.execute("DELETE FROM downloads WHERE download_id = ?", (download_id,))
