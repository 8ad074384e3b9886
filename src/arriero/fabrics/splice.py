"""How does a loopback port lead to a unix socket of this machine?"""

import asyncio
import contextlib
from pathlib import Path
from typing import Final

#: A unix socket that takes longer than this to accept is taken for one that does not.
CONNECT_TIMEOUT_S: Final = 10.0
CLOSE_TIMEOUT_S: Final = 2.0
PIECE_BYTES: Final = 256 * 1024


class Splices:
    """Loopback ports, each of which leads to a unix socket; nothing is known of what passes."""

    def __init__(self) -> None:
        self._servers: dict[Path, asyncio.Server] = {}
        self._opening = asyncio.Lock()
        self._served: set[asyncio.Task[None]] = set()

    async def port(self, path: Path) -> int:
        """Return the port that leads to a socket; the same one each time it is asked for."""
        async with self._opening:
            server = self._servers.get(path)
            if server is None:

                async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                    await self._serve(path, reader, writer)

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
        """End all ports and what goes through them.  Safe to call twice."""
        for path in list(self._servers):
            self.shut(path)
        for task in self._served:
            task.cancel()
        if self._served:
            await asyncio.wait(self._served, timeout=CLOSE_TIMEOUT_S)

    async def _serve(self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._served.add(task)
        open_ends = [writer]
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                far_reader, far_writer = await asyncio.open_unix_connection(path)
            open_ends.append(far_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, far_writer), name="splice-there")
                group.create_task(_pump(far_reader, writer), name="splice-back")
            for end in open_ends:
                end.close()  # What is still to be sent is sent.
        except* (OSError, asyncio.CancelledError):
            pass  # Nobody there, one side is gone, or it is over: whoever is left sees the end.
        finally:
            self._served.discard(task)
            for end in open_ends:
                if not end.is_closing():
                    end.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(PIECE_BYTES):
        writer.write(chunk)
        await writer.drain()
    # The end of one way is not that of the other.
    with contextlib.suppress(OSError, RuntimeError):
        writer.write_eof()
