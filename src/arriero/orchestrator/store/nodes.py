"""Which machines belong to the pool, and who are we to them?  (`NodeStore`)"""

import sqlite3
from collections.abc import Sequence
from functools import partial
from typing import Final, Self

import msgspec

from arriero.contracts.errors import ErrorCode, fail
from arriero.contracts.fence import HOLDER_DIGITS, holder_id
from arriero.contracts.records import Capabilities
from arriero.runtime.entropy import Entropy
from arriero.runtime.sqlite import Database

#: Fencing numbers are taken from the disk so many at a time: a herd that reconnects costs few writes.
LEASES_AT_A_TIME: Final = 256
#: No orchestrator is ahead of another by so many connections.  The numbers of all nodes come from one
#: counter, and are not unending: a single machine must not use them up for all.
LEAP_MAX: Final = 2**32


class NodeEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of one machine.  The orchestrator's own has an entry only once somebody changed it."""

    name: str
    is_remote: bool = True
    #: As `nodes add` was told: user@host:port.
    ssh: str = ""
    key_path: str = ""
    host_key: str = ""
    install_path: str = ""
    labels: dict[str, str] = {}
    mac: str = ""
    is_drained: bool = False
    added_unix: float = 0.0
    last_connected_unix: float = 0.0
    #: As the machine last told; None before it ever did.
    capabilities: Capabilities | None = None


class NodeStore:
    """The table of nodes, and the numbers of leases.  What a method acknowledged is on disk."""

    def __init__(self, database: Database, holder_id: str, lease: int) -> None:
        self._database = database
        #: Who we are to the agents: another orchestrator has another one.
        self.holder_id = holder_id
        self._lease = lease
        self._reserved = lease

    @classmethod
    async def open(cls, database: Database, entropy: Entropy) -> Self:
        """Return the store; an orchestrator that is new here gets its id."""
        await database.execute(
            "INSERT OR IGNORE INTO holder (only_row, holder_id, next_lease) VALUES (1, ?, 1)",
            (holder_id(entropy.hex(HOLDER_DIGITS)),),
        )
        row = await database.fetch_one("SELECT holder_id, next_lease FROM holder")
        assert row is not None, "it was put there just now"
        return cls(database, row["holder_id"], row["next_lease"] - 1)

    async def entries(self) -> list[NodeEntry]:
        """Return all entries by name."""
        rows = await self._database.fetch_all("SELECT entry FROM nodes ORDER BY name")
        return [msgspec.json.decode(row["entry"], type=NodeEntry) for row in rows]

    async def save(self, entry: NodeEntry) -> None:
        """Keep an entry, in the place of the one of that name."""
        await self._database.execute(
            "INSERT OR REPLACE INTO nodes (name, entry) VALUES (?, ?)",
            (entry.name, msgspec.json.encode(entry)),
        )

    async def save_all(self, entries: Sequence[NodeEntry]) -> None:
        """Keep several entries, all or none."""
        rows = [(entry.name, msgspec.json.encode(entry)) for entry in entries]
        await self._database.transaction(partial(_save, rows))

    async def forget(self, name: str) -> None:
        """Keep nothing of a machine any more."""
        await self._database.execute("DELETE FROM nodes WHERE name = ?", (name,))

    async def next_lease(self, above: int = 0) -> int:
        """Return a fencing number larger than all before, also those of earlier processes, and than `above`.

        `above`: what a node was held under by another orchestrator.  Raises LEASE_SUPERSEDED if none can
        have come that far.
        """
        if above - self._lease > LEAP_MAX:
            fail(
                ErrorCode.LEASE_SUPERSEDED,
                f"the node says that it is held under number {above}: none can have come so far",
                suggested_action="its file lease.json is damaged, or it is not what it seems: end its agent, "
                "remove the file and start it again",
            )
        self._lease = max(self._lease, above)
        while self._lease >= self._reserved:
            first = await self._database.transaction(partial(_reserve, self._lease + 1))
            # Another caller may have been quicker: then its numbers are used, and ours left out.
            if self._lease >= self._reserved:
                self._lease, self._reserved = first - 1, first - 1 + LEASES_AT_A_TIME
        self._lease += 1
        return self._lease


def _save(rows: Sequence[tuple[str, bytes]], connection: sqlite3.Connection) -> None:
    connection.executemany("INSERT OR REPLACE INTO nodes (name, entry) VALUES (?, ?)", rows)


def _reserve(at_least: int, connection: sqlite3.Connection) -> int:
    first: int = max(at_least, connection.execute("SELECT next_lease FROM holder").fetchone()[0])
    connection.execute("UPDATE holder SET next_lease = ?", (first + LEASES_AT_A_TIME,))
    return first
