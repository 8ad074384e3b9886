"""How does a line break, or lag?  A TCP relay that does it at a given byte, and counts what it relays.

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
#: On their way at once, where there is a delay.
_PIECES_LATE_MAX: Final = 256


class Cut(enum.StrEnum):
    """How connections end."""

    #: The client gets a reset.
    RESET = "reset"
    #: Nothing more comes, and nobody says so.
    STALL = "stall"
    #: Nothing happens to them; `reached` is told alone.
    NONE = "none"


class FaultProxy:
    """Relays to a port of this machine, or of `host`.  Used as `async with FaultProxy(port) as proxy`.

    `delay_s`: every byte arrives so much later, in either direction.
    """

    def __init__(
        self,
        port: int,
        *,
        host: str = "127.0.0.1",
        rate_bytes_per_s: float | None = None,
        delay_s: float = 0.0,
    ) -> None:
        #: Bytes that were sent to clients, over all connections there ever were.
        self.relayed_bytes = 0
        #: Cuts that happened.
        self.cuts: list[tuple[int, Cut]] = []
        self.connections = 0
        self._host = host
        self._port = port
        self._delay_s = delay_s
        self._rate_bytes_per_s = rate_bytes_per_s
        self._due: list[tuple[int, Cut, bool]] = []
        self._happened = asyncio.Event()
        self._open: dict[asyncio.StreamWriter, asyncio.Event] = {}
        self._handlers: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """The address, without a path."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._server is not None, "used outside of its `async with`"
        port: int = self._server.sockets[0].getsockname()[1]
        return port

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
            server_reader, server_writer = await asyncio.open_connection(self._host, self._port)
            _keep_little(server_writer)
            going, coming = _Late(reader, self._delay_s), _Late(server_reader, self._delay_s)
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(going.fill()),
                        group.create_task(coming.fill()),
                        group.create_task(_pump(going, server_writer)),
                    ]
                    await self._down(coming, writer, stalled)
                    for other in tasks:
                        other.cancel()
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

    async def _down(self, reader: "_Late", writer: asyncio.StreamWriter, stalled: asyncio.Event) -> None:
        while block := await reader.read():
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


class _Late:
    """What is read from a connection, each piece as late as it shall be."""

    def __init__(self, reader: asyncio.StreamReader, delay_s: float) -> None:
        self._reader = reader
        self._delay_s = delay_s
        # Without a delay no piece more is taken than is passed on: what was relayed has nearly arrived.
        self._pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_PIECES_LATE_MAX if delay_s else 1)

    async def fill(self) -> None:
        """Take the pieces as they come, to the end."""
        loop = asyncio.get_running_loop()
        piece = b" "
        while piece:
            piece = await self._reader.read(_READ_BYTES)
            await self._pieces.put((loop.time() + self._delay_s, piece))

    async def read(self) -> bytes:
        """Return the next piece when it is due; b"" at the end."""
        due_s, piece = await self._pieces.get()
        if self._delay_s:
            await asyncio.sleep(due_s - asyncio.get_running_loop().time())
        return piece


async def _pump(reader: _Late, writer: asyncio.StreamWriter) -> None:
    while block := await reader.read():
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
