"""What is asked of a fetch, what comes out of it, and by which numbers is it done?"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from arriero.agent.retries import RetryLimits, RetryWatch

_MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Numbers of section 7; tests give smaller ones."""

    connect_s: float = 10.0
    #: So long without a byte is a failed attempt.
    stall_s: float = 60.0
    retry: RetryLimits = field(default_factory=RetryLimits)
    #: An attempt that came so much further than any before counts as the first one again.
    progress_bytes: int = _MIB
    redirects_max: int = 10
    #: Bytes are written and told in blocks of about this size, or after this time.
    block_bytes: int = _MIB
    interval_s: float = 0.2
    #: A large file comes over so many connections at a time.
    connections: int = 4
    #: A file is filled part by part: see docs/adr/0008.
    part_bytes: int = 4 * _MIB
    #: One request asks for no more than this, where there are several connections.
    range_bytes: int = 32 * _MIB
    #: What may wait to be written, of all connections, and as much may be on its way to the disk.
    buffer_bytes: int = 4 * _MIB
    #: The disk's room is looked at again whenever so much was written.
    room_bytes: int = 64 * _MIB
    #: For all downloads together; 0: no cap.
    rate_bytes_per_s: float = 0.0
    #: A peer that is lost in the middle is waited for so long, from the last progress on.
    peer_back_s: float = 120.0


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file behind an address."""

    name: str
    url: str
    size_bytes: int | None = None
    sha256: str | None = None
    #: Sent to the address' own host alone, never to one it redirects to.
    token: str | None = field(default=None, repr=False)
    #: What people call its server; empty: as the address does.
    called: str = ""

    @property
    def server(self) -> str:
        """Who has it, for people: a name, or the address' host, with its port if that is told."""
        return self.called or urlsplit(self.url).netloc


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """A file that is whole and verified, still under its partial name."""

    name: str
    path: Path
    size_bytes: int
    sha256: str


class FetchWatch(RetryWatch, Protocol):
    """Who is told how a fetch goes."""

    def downloading(self) -> None:
        """Bytes are asked for."""
        ...

    def verifying(self) -> None:
        """What is there is checked: what an earlier fetch left, or the whole file."""
        ...

    def advance(self, downloaded_bytes: int, total_bytes: int | None) -> None:
        """So many bytes of this file are there, of so many."""
        ...
