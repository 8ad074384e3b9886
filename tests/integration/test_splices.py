"""What leads from a port to a socket: is it over when it is said to be?"""

import asyncio
import tempfile
from pathlib import Path

from arriero.fabrics.base import SocketPath
from arriero.fabrics.splice import Splices


async def test_what_comes_while_all_is_ended_is_closed() -> None:
    served = asyncio.Event()

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.set()
        writer.close()

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await splices.serve(SocketPath(path), reader, writer)

    splices = Splices()
    await splices.aclose()
    with tempfile.TemporaryDirectory(prefix="arr-") as folder:
        path = Path(folder) / "s"
        async with (
            await asyncio.start_unix_server(serve, path),
            await asyncio.start_server(late, "127.0.0.1", 0) as server,
        ):
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            async with asyncio.timeout(60):
                assert await reader.read() == b""
            writer.close()
        assert not served.is_set()
