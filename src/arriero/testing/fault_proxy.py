"""How does a line break?  A TCP relay on loopback that does it at a given byte, and counts what it relays.

async with FaultProxy(port) as proxy:
    proxy.cut_at(100_000, Cut.RESET)   # when so many bytes have gone to clients, all connections together
"""

import asyncio
import contextlib
import enum
import heapq
import socket
import struct
from types import TracebackType
from typing import Final, Self

_READ_BYTES: Final = 64 * 1024
#: Little is on its way between the two ends, so that what was relayed has nearly arrived.
_BUFFER_BYTES: Final = 256 * 1024


class Cut(enum.StrEnum):
    """How connections end."""

    #: The client gets a reset.
    RESET = "reset"
    #: Nothing more comes, and nobody says so.
    STALL = "stall"
    #: Nothing happens to them; `reached` is told alone.
    NONE = "none"


class FaultProxy:
    """Relays to `port` of this machine.  Used as `async with FaultProxy(port) as proxy`."""

    def __init__(self, port: int, *, rate_bytes_per_s: float | None = None) -> None:
        #: Bytes that were sent to clients, over all connections there ever were.
        self.relayed_bytes = 0
        #: Cuts that happened.
        self.cuts: list[tuple[int, Cut]] = []
        self.connections = 0
        self._port = port
        self._rate_bytes_per_s = rate_bytes_per_s
        self._due: list[tuple[int, Cut, bool]] = []
        self._happened = asyncio.Event()
        self._open: dict[asyncio.StreamWriter, asyncio.Event] = {}
        self._handlers: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """The address, without a path."""
        assert self._server is not None, "used outside of its `async with`"
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for handler in self._handlers:
            handler.cancel()
        if self._handlers:
            await asyncio.wait(self._handlers)
        await self._server.wait_closed()

    def cut_at(self, offset: int, cut: Cut, *, is_for_all: bool = True) -> None:
        """Cut once `offset` bytes were relayed in all: every connection, or the one that brings that byte."""
        heapq.heappush(self._due, (offset, cut, is_for_all))

    async def reached(self, offset: int) -> None:
        """Return once so many bytes were relayed in all."""
        self.cut_at(offset, Cut.NONE)
        while self.relayed_bytes < offset:
            self._happened.clear()
            await self._happened.wait()

    # --- Relaying -----------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        self.connections += 1
        stalled = self._open[writer] = asyncio.Event()
        _keep_little(writer)
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._port)
            _keep_little(server_writer)
            try:
                async with asyncio.TaskGroup() as group:
                    up = group.create_task(_pump(reader, server_writer))
                    await self._down(server_reader, writer, stalled)
                    up.cancel()
            finally:
                server_writer.transport.abort()
        except* (ConnectionError, OSError):
            pass
        except* asyncio.CancelledError:
            pass  # The proxy ends, and every connection with it, quietly.
        finally:
            self._open.pop(writer, None)
            self._handlers.discard(task)
            writer.close()

    async def _down(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stalled: asyncio.Event
    ) -> None:
        while block := await reader.read(_READ_BYTES):
            rest = memoryview(block)
            while rest:
                if stalled.is_set():
                    await asyncio.Event().wait()  # Until the client leaves, which `_pump` sees.
                until_cut = self._due[0][0] - self.relayed_bytes if self._due else len(rest)
                piece, rest = rest[: max(until_cut, 0)], rest[max(until_cut, 0) :]
                writer.write(piece)
                await writer.drain()
                self.relayed_bytes += len(piece)
                self._cut_what_is_due(writer)
                if self._rate_bytes_per_s is not None:
                    await asyncio.sleep(len(piece) / self._rate_bytes_per_s)
        writer.write_eof()

    def _cut_what_is_due(self, current: asyncio.StreamWriter) -> None:
        while self._due and self._due[0][0] <= self.relayed_bytes:
            offset, cut, is_for_all = heapq.heappop(self._due)
            self._happened.set()
            if cut is Cut.NONE:
                continue
            self.cuts.append((offset, cut))
            for writer in list(self._open) if is_for_all else [current]:
                if cut is Cut.STALL:
                    self._open[writer].set()
                else:
                    _reset(writer)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while block := await reader.read(_READ_BYTES):
        writer.write(block)
        await writer.drain()
    raise ConnectionResetError("the client left")


def _keep_little(writer: asyncio.StreamWriter) -> None:
    """Hold the kernel and the transport to a small buffer; what one end still has may be cut with it."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
    writer.transport.set_write_buffer_limits(high=0)


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
