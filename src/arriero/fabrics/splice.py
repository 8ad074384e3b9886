"""How does a loopback port lead to a unix socket of this machine?"""

import asyncio
import contextlib
from pathlib import Path
from typing import Final, Protocol

from arriero.fabrics.base import LocalEnd, SocketPath

#: A unix socket that takes longer than this to accept is taken for one that does not.
CONNECT_TIMEOUT_S: Final = 10.0
CLOSE_TIMEOUT_S: Final = 2.0
PIECE_BYTES: Final = 256 * 1024


class Incoming(Protocol):
    """What comes: a stream of asyncio, or of an SSH channel."""

    async def read(self, n: int) -> bytes:
        """Return some bytes, none at the end."""
        ...


class Outgoing(Protocol):
    """What goes: a stream of asyncio, or of an SSH channel."""

    def write(self, data: bytes) -> None:
        """Send."""
        ...

    async def drain(self) -> None:
        """Wait until more may be sent."""
        ...

    def write_eof(self) -> None:
        """Send no more."""
        ...

    def close(self) -> None:
        """End, once what is to be sent is sent.  Safe to call twice."""
        ...


class Splices:
    """Loopback ports, each of which leads to a unix socket; nothing is known of what passes."""

    def __init__(self, *broken: type[Exception]) -> None:
        # `broken`: what a stream that is none of asyncio's own raises when it breaks.
        self._endings: tuple[type[BaseException], ...] = (OSError, asyncio.CancelledError, *broken)
        self._servers: dict[Path, asyncio.Server] = {}
        self._opening = asyncio.Lock()
        self._served: set[asyncio.Task[None]] = set()
        self._is_over = False

    async def port(self, path: Path) -> int:
        """Return the port that leads to a socket; the same one each time it is asked for."""
        async with self._opening:
            server = self._servers.get(path)
            if server is None:

                async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                    await self.serve(SocketPath(path), reader, writer)

                server = await asyncio.start_server(serve, "127.0.0.1", 0)
                self._servers[path] = server
        port: int = server.sockets[0].getsockname()[1]
        return port

    def shut(self, path: Path) -> None:
        """Take no more connections to a socket; those that are open stay.  Safe to call twice."""
        server = self._servers.pop(path, None)
        if server is not None:
            server.close()

    async def aclose(self) -> None:
        """End all ports and what goes through them; what comes later is closed.  Safe to call twice."""
        self._is_over = True
        for path in list(self._servers):
            self.shut(path)
        for task in self._served:
            task.cancel()
        if self._served:
            await asyncio.wait(self._served, timeout=CLOSE_TIMEOUT_S)

    async def serve(self, end: LocalEnd, reader: Incoming, writer: Outgoing) -> None:
        """Carry what comes through one connection to an end here and back, until one side is gone."""
        if self._is_over:
            # It came while all was ended: nobody would end it any more.
            writer.close()
            return
        task = asyncio.current_task()
        assert task is not None
        self._served.add(task)
        far_writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                if isinstance(end, SocketPath):
                    far_reader, far_writer = await asyncio.open_unix_connection(end.path)
                else:
                    far_reader, far_writer = await asyncio.open_connection(end.host, end.port)
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, far_writer), name="splice-there")
                group.create_task(_pump(far_reader, writer), name="splice-back")
            # What is still to be sent is sent.
            far_writer.close()
            writer.close()
        except* self._endings:
            pass  # Nobody there, one side is gone, or it is over: whoever is left sees the end.
        finally:
            self._served.discard(task)
            if far_writer is not None and not far_writer.is_closing():
                far_writer.transport.abort()
            writer.close()


async def _pump(reader: Incoming, writer: Outgoing) -> None:
    while chunk := await reader.read(PIECE_BYTES):
        writer.write(chunk)
        await writer.drain()
    # The end of one way is not that of the other.
    with contextlib.suppress(OSError, RuntimeError):
        writer.write_eof()
