"""How do the bytes of several connections get to the disk without one of them waiting for it?"""

import asyncio
import contextlib
from collections.abc import Callable

from arriero.agent.budget import Reservation
from arriero.agent.fetch_types import FetchLimits
from arriero.agent.files import free_mb, mib
from arriero.agent.partial import Mark, Partial
from arriero.contracts.errors import ArrieroError, ErrorCode


class Writer:
    """One task writes what came of all connections.  They put their blocks down and read on.

    `advance` is told the bytes that are there, and of how many.
    """

    def __init__(
        self,
        partial: Partial,
        reservation: Reservation,
        limits: FetchLimits,
        advance: Callable[[int, int | None], None],
    ) -> None:
        self._partial = partial
        self._reservation = reservation
        self._limits = limits
        self._advance = advance
        self._mark: Mark | None = None
        self._size_bytes: int | None = None
        self._pieces: list[tuple[int, list[bytes]]] = []
        #: The pieces by where they end, so that the next block of a connection joins its last one.
        self._ends: dict[int, list[bytes]] = {}
        self._bytes = 0
        self._unlooked_bytes = 0
        self._is_ending = False
        self._arrived = asyncio.Event()
        self._many = asyncio.Event()
        self._room = asyncio.Event()
        self._written = asyncio.Event()

    # --- Told by connections ------------------------------------------------------------------

    def begin(self, mark: Mark) -> None:
        """Throw away what there is; what is put from now on is of `mark`."""
        self._clear()
        self._mark = mark
        self._size_bytes = None
        self._arrived.set()

    def learn_size(self, size_bytes: int) -> None:
        """Say how long the file is, once that is known."""
        self._size_bytes = size_bytes
        self._arrived.set()

    def put(self, offset: int, block: bytes) -> None:
        """Take a block; it is written soon."""
        blocks = self._ends.pop(offset, None)
        if blocks is None:
            blocks = []
            self._pieces.append((offset, blocks))
        blocks.append(block)
        self._ends[offset + len(block)] = blocks
        self._bytes += len(block)
        self._arrived.set()
        if self._bytes >= self._limits.block_bytes:
            self._many.set()

    def end(self) -> None:
        """Say that nothing more comes."""
        self._is_ending = True
        self._arrived.set()
        self._many.set()

    async def room(self) -> None:
        """Wait until there is room for another block."""
        while self._bytes >= self._limits.buffer_bytes:
            self._room.clear()
            await self._room.wait()

    # --- The two tasks ------------------------------------------------------------------------

    async def write_along(self) -> None:
        """Write what comes, until all is written after `end`.

        Raises INSUFFICIENT_DISK and STATE_DIR_UNUSABLE.
        """
        is_last = False
        while not is_last:
            await self._arrived.wait()
            if self._bytes < self._limits.block_bytes and not self._is_ending:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._limits.interval_s):
                        await self._many.wait()
            is_last = self._is_ending
            await self.flush()

    async def hash_along(self) -> None:
        """Hash what is there without a hole, until cancelled."""
        while True:
            if not await self._partial.hash_more():
                self._written.clear()
                await self._written.wait()

    async def flush(self) -> None:
        """Write all that was put down."""
        mark, pieces, count, size = self._mark, self._pieces, self._bytes, self._size_bytes
        self._clear()
        self._mark = self._size_bytes = None
        self._room.set()
        try:
            if pieces or mark is not None or size is not None:
                await self._partial.write(pieces, mark=mark, size_bytes=size)
        except ArrieroError as error:
            if error.code is ErrorCode.INSUFFICIENT_DISK:
                raise await self._with_numbers(error, count) from error
            raise
        finally:
            parts = self._partial.parts
            self._reservation.note((parts.size_bytes or parts.done_bytes) - parts.done_bytes)
            self._advance(parts.done_bytes, parts.size_bytes)
        self._written.set()
        self._unlooked_bytes += count
        if self._unlooked_bytes >= self._limits.room_bytes:
            self._unlooked_bytes = 0
            await self._reservation.measure()
            self._reservation.check()

    def _clear(self) -> None:
        self._pieces, self._ends, self._bytes = [], {}, 0
        self._arrived.clear()
        self._many.clear()

    async def _with_numbers(self, error: ArrieroError, count: int) -> ArrieroError:
        """Return the error of a disk that became full, with what is needed and what there is."""
        parts = self._partial.parts
        needed_bytes = count if parts.size_bytes is None else parts.size_bytes - parts.done_bytes
        available_mb = await free_mb(self._partial.path.parent)
        return ArrieroError(
            error.code,
            error.message,
            required_mb=mib(needed_bytes),
            available_mb=available_mb,
            shortfall_mb=max(mib(needed_bytes) - available_mb, 1),
        )
