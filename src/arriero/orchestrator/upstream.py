"""How do bytes come from a worker with as little between as can be?

One connection is one protocol object: what arrives is parsed for its framing alone and kept until
it is read, as one piece however many packets it was.  No task, queue or future per chunk.  What is
not read is bounded: the socket is paused, so a slow reader slows its worker and fills no memory.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, cast
from urllib.parse import urlsplit

import httptools

from arriero.contracts.fence import FENCE_HEADER
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy

#: Delays before the attempts to connect; jitter takes up to half of each.
CONNECT_DELAYS_S: Final = (0.0, 0.2, 0.4)
#: So much unread is held before the socket is paused.
UNREAD_BYTES_MAX: Final = 256 * 1024
HEAD_BYTES_MAX: Final = 64 * 1024
#: Shorter than the keep-alive of our servers (75 s), so that a kept connection is seldom a dead one.
IDLE_S_MAX: Final = 20.0
IDLE_MAX: Final = 64


class Lost(Exception):
    """The other side could not be reached, or went away before its answer was whole."""

    def __init__(self, why: str, *, is_unreachable: bool = False) -> None:
        super().__init__(why)
        self.why = why
        #: Nothing was ever sent: no connection came about.
        self.is_unreachable = is_unreachable


class Silent(Exception):
    """The other side lives, but has brought no byte for too long."""

    def __init__(self, silence_s: float) -> None:
        super().__init__(f"no byte for {silence_s:g} s")
        self.silence_s = silence_s


@dataclass(frozen=True, slots=True)
class Address:
    """Where a daemon listens, and the token it demands."""

    host: str
    port: int
    token: str = field(repr=False)
    #: A unix socket here that leads to that port, where it cannot be reached directly.
    socket_path: str = ""
    #: `X-Arriero-Fence` of every request: under which lease it is sent.
    fence: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """What two addresses have in common whose connections may be used for each other."""
        return (self.socket_path or self.host, self.port)

    @classmethod
    def of(cls, url: str, token: str) -> "Address":
        """Return the address in a daemon's `url`."""
        split = urlsplit(url)
        return cls(split.hostname or "127.0.0.1", split.port or 80, token)


@dataclass(slots=True)
class Head:
    """Status and headers of an answer; names in lower case."""

    status: int
    headers: list[tuple[bytes, bytes]]

    def get(self, name: bytes) -> bytes:
        """Return a header's value, empty if it is not there."""
        return next((value for key, value in self.headers if key == name), b"")


def request_bytes(
    method: str, target: str, address: Address, headers: Sequence[tuple[str, str]], body: bytes
) -> bytes:
    """Return a whole request, built anew: nothing of a client's own head goes through unseen.

    Raises ValueError if a line would hold a line break.
    """
    host = f"[{address.host}]" if ":" in address.host else address.host
    lines = [
        f"{method} {target} HTTP/1.1",
        f"host: {host}:{address.port}",
        f"authorization: Bearer {address.token}",
        f"content-length: {len(body)}",
        *([f"{FENCE_HEADER}: {address.fence}"] if address.fence else []),
        *(f"{name}: {value}" for name, value in headers),
    ]
    if any("\r" in line or "\n" in line or "\0" in line for line in lines):
        raise ValueError("a line break within a request's head")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


class Connection(asyncio.Protocol):
    """One connection: `send`, then `head()`, then `read()` until b"", then `release()`."""

    def __init__(self, owner: "Upstreams", key: tuple[str, int]) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self.key = key
        self.idle_since = 0.0
        #: Whether an answer was read from it before: then it may have been closed meanwhile.
        self.is_reused = False
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._head: Head | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._chunks: list[bytes] = []
        self._unread = 0
        self._is_paused = False
        self._is_whole = True
        self._is_bodiless = False
        self._broken: str | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._last_byte_s = 0.0
        self._tick: asyncio.TimerHandle | None = None
        self._beat_s = 0.0
        self._is_beat_due = False

    # --- What the relay calls ------------------------------------------------------------

    @property
    def is_usable(self) -> bool:
        """Whether another request may be sent on it."""
        return self._broken is None and self._is_whole and not self._is_paused and self._transport is not None

    def send(self, request: bytes, *, is_bodiless: bool = False) -> None:
        """Send a whole request; `is_bodiless`: a HEAD, whose answer has no body whatever its head says."""
        assert self._transport is not None and self._is_whole
        self._parser = httptools.HttpResponseParser(self)
        self._head = None
        self._headers = []
        self._head_bytes = 0
        self._is_whole = False
        self._is_bodiless = is_bodiless
        self._last_byte_s = self._loop.time()
        self._transport.write(request)

    async def head(self) -> Head:
        """Wait for status and headers.  Raises Lost if the connection ends before."""
        while self._head is None:
            if self._broken is not None:
                raise Lost(self._broken)
            await self._wait()
        return self._head

    async def read(self, *, stall_s: float | None = None) -> bytes | None:
        """Return all that has come of the body, b"" at its end, None when a beat is due (see `beat`).

        Raises Lost if the connection ends before the body does, Silent if there was no byte for
        `stall_s` (told at a beat, so only where beats are on).
        """
        while not self._chunks:
            if self._is_whole:
                return b""
            if self._broken is not None:
                raise Lost(self._broken)
            if self._is_beat_due:
                self._is_beat_due = False
                silence_s = self._loop.time() - self._last_byte_s
                if stall_s is not None and silence_s >= stall_s:
                    raise Silent(stall_s)
                return None
            await self._wait()
        chunk = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._unread = 0
        if self._is_paused:
            self._is_paused = False
            # It was we who did not read: that is no silence of the other side's.
            self._last_byte_s = self._loop.time()
            self._is_beat_due = False
            if self._transport is not None and self._broken is None:
                self._transport.resume_reading()
        return chunk

    async def read_all(self, bytes_max: int) -> bytes:
        """Return the rest of the body, cut off at `bytes_max`.  Raises Lost."""
        found = b""
        while len(found) < bytes_max:
            chunk = await self.read()
            if chunk == b"":
                break
            found += chunk or b""
        return found[:bytes_max]

    def beat(self, every_s: float) -> None:
        """Let `read` return None whenever nothing came for `every_s`."""
        self._beat_s = every_s
        if self._tick is None:
            self._tick = self._loop.call_later(every_s, self._on_tick)

    def release(self) -> None:
        """Give the connection back: kept where its answer is whole, else closed at once."""
        self._stop_ticking()
        if self.is_usable and not self._chunks:
            self._owner.keep(self)
        else:
            self.abort()

    def abort(self) -> None:
        """Close at once: the other side notices and stops computing."""
        self._stop_ticking()
        self._broken = self._broken or "closed by us"
        if self._transport is not None:
            self._transport.abort()

    # --- What the loop calls -------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        # uvloop's transports do what asyncio's do without being of their class.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Parse what came, wake the reader once."""
        self._last_byte_s = self._loop.time()
        if self._is_whole or self._parser is None:
            self._fail("bytes that nobody asked for")
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"an answer that is no HTTP: {type(error).__name__}")
            return
        if self._unread > UNREAD_BYTES_MAX and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """Close."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """End: an answer without a length is whole now, any other one is broken."""
        self._stop_ticking()
        head = self._head
        is_open_ended = (
            head is not None
            and not self._is_whole
            and error is None
            and not head.get(b"content-length")
            and b"chunked" not in head.get(b"transfer-encoding").lower()
        )
        if is_open_ended:
            self._is_whole = True
        self._broken = self._broken or ("connection reset" if error else "connection closed")
        self._transport = None
        self._owner.forget(self)
        self._wake()

    # --- What the parser calls -----------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header."""
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > HEAD_BYTES_MAX:
            raise ValueError("an answer's head is too large")
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Take the head; that of an interim answer (1xx) is thrown away."""
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status < 200:
            self._headers = []
            return
        self._head = Head(status, self._headers)
        if self._is_bodiless:
            self._is_whole = True

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body."""
        self._chunks.append(body)
        self._unread += len(body)

    def on_message_complete(self) -> None:
        """Know that the answer is whole."""
        if self._head is None:
            return
        assert self._parser is not None
        self._is_whole = True
        if not self._parser.should_keep_alive():
            self._broken = self._broken or "connection closed"

    # --- Waiting -------------------------------------------------------------------------

    async def _wait(self) -> None:
        assert self._waiter is None, "one reader at a time"
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, why: str) -> None:
        self._broken = self._broken or why
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    def _on_tick(self) -> None:
        # One timer a stream, not one a chunk: it asks how long ago the last byte came.
        due_s = self._last_byte_s + self._beat_s - self._loop.time()
        if due_s <= 0.001:
            self._is_beat_due = True
            self._wake()
            due_s = self._beat_s
        self._tick = self._loop.call_later(due_s, self._on_tick)

    def _stop_ticking(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        self._is_beat_due = False


class Upstreams:
    """Connections to all workers; kept ones are used again."""

    def __init__(self, clock: Clock, entropy: Entropy, *, connect_timeout_s: float) -> None:
        self._clock = clock
        self._entropy = entropy
        self._connect_timeout_s = connect_timeout_s
        self._idle: dict[tuple[str, int], list[Connection]] = {}
        self._is_closed = False

    async def open(self, address: Address, *, is_new: bool = False) -> Connection:
        """Return a connection: a kept one, or a new one after up to three attempts.

        Raises Lost (`is_unreachable`) if none comes about.
        """
        key = address.key
        if not is_new:
            kept = self._take(key)
            if kept is not None:
                return kept
        why = ""
        for delay_s in CONNECT_DELAYS_S:
            if delay_s:
                await self._clock.sleep_s(delay_s * (1 - self._entropy.chance() / 2))
            try:
                async with asyncio.timeout(self._connect_timeout_s):
                    return await self._connect(address, key)
            except TimeoutError:
                why = f"no connection within {self._connect_timeout_s:g} s"
            except OSError as error:
                why = error.strerror or type(error).__name__
        raise Lost(why, is_unreachable=True)

    async def _connect(self, address: Address, key: tuple[str, int]) -> Connection:
        loop = asyncio.get_running_loop()
        if address.socket_path:
            _, connection = await loop.create_unix_connection(
                lambda: Connection(self, key), address.socket_path
            )
        else:
            _, connection = await loop.create_connection(
                lambda: Connection(self, key), address.host, address.port
            )
        return connection

    def keep(self, connection: Connection) -> None:
        """Keep a connection whose answer is whole."""
        kept = self._idle.setdefault(connection.key, [])
        if self._is_closed or len(kept) >= IDLE_MAX:
            connection.abort()
            return
        connection.idle_since = self._clock.monotonic_s()
        connection.is_reused = True
        kept.append(connection)

    def forget(self, connection: Connection) -> None:
        """Do not use a connection again."""
        kept = self._idle.get(connection.key)
        if kept is None:
            return
        if connection in kept:
            kept.remove(connection)
        if not kept:
            self._idle.pop(connection.key, None)

    def close(self) -> None:
        """Close all that are kept."""
        self._is_closed = True
        for kept in list(self._idle.values()):
            for connection in list(kept):
                connection.abort()
        self._idle.clear()

    def _take(self, key: tuple[str, int]) -> Connection | None:
        kept = self._idle.get(key, [])
        while kept:
            connection = kept.pop()
            age_s = self._clock.monotonic_s() - connection.idle_since
            if connection.is_usable and age_s < IDLE_S_MAX:
                return connection
            connection.abort()
        return None
