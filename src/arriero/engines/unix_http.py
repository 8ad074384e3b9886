"""How is HTTP spoken over a unix socket at the least cost per token?

One connection an exchange: llama.cpp closes it after a streamed answer anyway, and closing it is
how a generation is cancelled.  A chunk costs one wake-up and no task, queue or object of its own.
"""

import asyncio
from dataclasses import dataclass
from typing import Final, cast

import httptools

#: So much unread body stops the reading; the engine then waits for us.
PENDING_BYTES_MAX: Final = 256 << 10
#: An answer that is read whole: embeddings of many inputs are the largest.
ANSWER_BYTES_MAX: Final = 256 << 20


class ConnectionLost(Exception):
    """The other side cannot be reached, or went away before the answer's end."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that was read whole."""

    status: int
    body: bytes


class Exchange:
    """One request under way, used as `async with exchange:`; leaving it closes the connection at once."""

    def __init__(self, protocol: "_Protocol") -> None:
        self._protocol = protocol

    async def __aenter__(self) -> "Exchange":
        return self

    async def __aexit__(self, *_: object) -> None:
        self._protocol.abort()

    async def status(self) -> int:
        """Wait for the answer's head and return its status.  Raises ConnectionLost."""
        while self._protocol.status is None:
            await self._protocol.changed()
        return self._protocol.status

    async def read(self) -> bytes:
        """Return the body's bytes that came since the last call, waiting for some; b"" at its end.

        Raises ConnectionLost if it ends before it is whole.
        """
        while True:
            data = self._protocol.take()
            if data or self._protocol.is_complete:
                return data
            await self._protocol.changed()

    async def read_all(self) -> bytes:
        """Return the rest of the body.  Raises ConnectionLost, also if it is longer than 256 MiB."""
        parts = bytearray()
        while data := await self.read():
            parts += data
            if len(parts) > ANSWER_BYTES_MAX:
                raise ConnectionLost(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
        return bytes(parts)


async def open_exchange(socket_path: str, method: str, path: str, body: bytes | None = None) -> Exchange:
    """Connect, send the request and return at once.  Raises ConnectionLost if nobody listens."""
    try:
        _, protocol = await asyncio.get_running_loop().create_unix_connection(_Protocol, socket_path)
    except OSError as error:
        raise ConnectionLost(str(error.strerror)) from error
    head = f"{method} {path} HTTP/1.1\r\nHost: engine\r\nAccept: */*\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    protocol.send(f"{head}\r\n".encode() + (body or b""))
    return Exchange(protocol)


async def call(
    socket_path: str, method: str, path: str, body: bytes | None = None, *, timeout_s: float
) -> Answer:
    """Return the whole answer.  Raises ConnectionLost, and TimeoutError after `timeout_s`."""
    async with asyncio.timeout(timeout_s):
        async with await open_exchange(socket_path, method, path, body) as exchange:
            status = await exchange.status()
            return Answer(status, await exchange.read_all())


class _Protocol(asyncio.Protocol):
    def __init__(self) -> None:
        self.status: int | None = None
        self.is_complete = False
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []
        self._pending = 0
        self._is_paused = False
        self._lost: str | None = None
        self._waiter: asyncio.Future[None] | None = None

    # --- For the exchange ---------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def take(self) -> bytes:
        parts = self._parts
        if not parts:
            return b""
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self._pending = 0
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()
        return data

    async def changed(self) -> None:
        """Wait for something new.  Raises ConnectionLost when nothing new can come."""
        if self._lost is not None:
            raise ConnectionLost(self._lost)
        assert self._waiter is None, "one reader an exchange"
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._lost = f"not HTTP: {error!r}"
            self.abort()
        if self._pending > PENDING_BYTES_MAX and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        if self._lost is None:
            self._lost = "the connection was closed" if error is None else repr(error)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- httptools: nothing here may raise, it would turn into a parser error -----------------

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._pending += len(body)

    def on_message_complete(self) -> None:
        self.is_complete = True
