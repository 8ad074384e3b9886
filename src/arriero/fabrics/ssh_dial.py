"""Who is asked for the address of a machine's name, and how often?

A lookup cannot be taken back: whoever gives it up leaves it with the event loop, which runs two at a time.
Attempts at one machine whose name nobody answers for would fill that, and others' would wait behind them.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any, TypeAlias

Found: TypeAlias = list[tuple[socket.AddressFamily, socket.SocketKind, int, str, Any]]


class Names:
    """Looks names up; each once at a time, however many wait for it or have given up."""

    def __init__(self) -> None:
        self._coming: dict[tuple[str, int, int], asyncio.Task[Found]] = {}

    async def find(self, host: str, port: int, family: int) -> Found:
        """Return where a host's port is.  Raises OSError."""
        key = (host, port, family)
        coming = self._coming.get(key)
        if coming is None:
            loop = asyncio.get_running_loop()
            looking = loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
            # It has no owner: it outlasts those who wait for it, and is as short as the system makes it.
            coming = self._coming[key] = loop.create_task(_found(looking), name=f"look-up-{host}")
            coming.add_done_callback(lambda task: self._over(key, task))
        return await asyncio.shield(coming)

    def _over(self, key: tuple[str, int, int], task: asyncio.Task[Found]) -> None:
        del self._coming[key]
        if not task.cancelled():
            # Nobody may wait for it any more; that it failed is no news then.
            task.exception()


async def _found(looking: Any) -> Found:
    found: Found = await looking
    return found


class Dial:
    """Connects as the event loop does, to one address after the other, and asks `names` for them.

    It stands where the library takes a tunnel, so that all other things go by the name.
    """

    def __init__(self, names: Names, family: int) -> None:
        self._names = names
        self._family = family

    async def create_connection(
        self, factory: Callable[[], asyncio.Protocol], host: str, port: int
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        """Return a connection to the first address that takes it.  Raises the first one's OSError."""
        loop = asyncio.get_running_loop()
        failed: OSError | None = None
        for family, kind, protocol, _, there in await self._names.find(host, port, self._family):
            try:
                end = socket.socket(family, kind, protocol)
                try:
                    end.setblocking(False)
                    await loop.sock_connect(end, there)
                    return await loop.create_connection(factory, sock=end)
                except BaseException:
                    end.close()
                    raise
            except OSError as error:
                failed = failed or error
        raise failed or OSError(f"{host} has no address")
