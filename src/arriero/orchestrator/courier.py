"""How is one request brought to one worker, and its answer's bytes carried back?"""

from typing import Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode, ErrorResponse, from_body
from arriero.orchestrator.exchange import Exchange, Outlet
from arriero.orchestrator.upstream import Address, Connection, Head, Lost, Upstreams, request_bytes
from arriero.runtime.asgi import BEAT_S, Headers

ERROR_BYTES_MAX: Final = 1024 * 1024
EVENT_BYTES_MAX: Final = 16 * 1024 * 1024
#: Every stream of ours beats at least so often; one that misses three beats comes from a stopped process.
SILENCE_S_MIN: Final = 3 * BEAT_S
_EVENT_END: Final = b"\n\n"
_PASSED_HEADERS: Final = frozenset(
    {
        b"content-type", b"content-length", b"content-range", b"accept-ranges", b"cache-control",
        b"retry-after", b"x-accel-buffering", b"location", b"allow", b"etag",
    }
)  # fmt: skip


class Refused(Exception):
    """A worker answered with an error before the first byte."""

    def __init__(self, head: Head, content: bytes) -> None:
        self.head = head
        self.content = content
        try:
            self.error = from_body(msgspec.json.decode(content, type=ErrorResponse).error)
        except msgspec.DecodeError:
            self.error = ArrieroError(
                ErrorCode.INTERNAL_ERROR, f"a worker answered with status {head.status}", status=head.status
            )
        super().__init__(str(self.error))


class Counters:
    """Plain integers, exported when somebody asks."""

    def __init__(self) -> None:
        self.requests = 0
        self.failures = 0
        self.cancelled = 0
        self.bytes_relayed = 0
        self.retries = 0


class Courier:
    """Brings one request to one worker."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    async def bring(
        self, address: Address, method: str, target: str, *, headers: list[tuple[str, str]], body: bytes
    ) -> tuple[Connection, Head]:
        """Send a request; return the connection and the answer's head.  Release or abort it afterwards.

        Raises Lost if no answer comes.
        """
        request = request_bytes(method, target, address, headers, body)
        is_new = False
        while True:
            connection = await self._upstreams.open(address, is_new=is_new)
            try:
                connection.send(request, is_bodiless=method == "HEAD")
                return connection, await connection.head()
            except Lost:
                connection.abort()
                # A kept connection may have been closed by the other side just now.
                if not connection.is_reused:
                    raise
                is_new = True
            except BaseException:
                connection.abort()
                raise


def hop_headers(exchange: Exchange, request_id_: str, *, accept: str) -> list[tuple[str, str]]:
    """Return the headers that every request to a worker carries."""
    found = [("content-type", "application/json"), ("accept", accept), ("x-request-id", request_id_)]
    left_ms = exchange.next_hop_ms()
    if left_ms is not None:
        found.append(("x-request-deadline", f"{left_ms:.0f}"))
    return found


def silence_limit_s(stall_s: float) -> float:
    """Return how long a stream may bring no byte at all, not even a beat.

    Without a token, but with beats, the worker's own rule (`stall_s`) ends it, and comes first.
    """
    return max(stall_s * 1.1 + 1, SILENCE_S_MIN)


async def splice_events(
    connection: Connection, outlet: Outlet, *, stall_s: float, counters: Counters, is_retryable: bool = False
) -> None:
    """Pass an event stream on to its end, whole events only; a beat goes out while nothing comes.

    Raises Lost if it breaks off (then no half event was sent), Silent after `stall_s` without a byte.
    Where `is_retryable`, an error event WORKER_LOST before any data counts as Lost.
    """
    connection.beat(min(BEAT_S, stall_s))
    cutter = EventCutter()
    while True:
        chunk = await connection.read(stall_s=stall_s)
        if chunk is None:
            await outlet.write(b": beat\n\n")
            continue
        if chunk == b"":
            cutter.check_end()
            return
        whole = cutter.cut(chunk)
        if not whole:
            continue
        if not outlet.has_data and b"data:" in whole:
            if is_retryable and b"event: error" in whole and b'"WORKER_LOST"' in whole:
                raise Lost("its engine died")
            outlet.has_data = True
        counters.bytes_relayed += len(whole)
        await outlet.write(whole)


class EventCutter:
    """Makes whole events of pieces: half of one is kept until the rest comes."""

    def __init__(self) -> None:
        self._held = b""

    def cut(self, chunk: bytes) -> bytes:
        """Return the events that are whole now.  Raises Lost if one grows beyond its limit."""
        if self._held:
            chunk = self._held + chunk
            self._held = b""
        if chunk.endswith(_EVENT_END):
            return chunk
        cut = chunk.rfind(_EVENT_END)
        cut = 0 if cut < 0 else cut + len(_EVENT_END)
        self._held = chunk[cut:]
        if len(self._held) > EVENT_BYTES_MAX:
            raise Lost(f"an event is larger than {EVENT_BYTES_MAX} bytes")
        return chunk[:cut]

    def check_end(self) -> None:
        """Raise Lost if the stream ended within an event."""
        if self._held:
            raise Lost("the stream ended within an event")


async def splice_plain(connection: Connection, outlet: Outlet, counters: Counters) -> None:
    """Pass a body on as it comes.  Raises Lost if it breaks off."""
    while True:
        chunk = await connection.read()
        if chunk == b"":
            return
        if chunk is not None:
            counters.bytes_relayed += len(chunk)
            await outlet.write(chunk)


def passed(head: Head, *, length: bool) -> Headers:
    """Return the headers of an answer that go through to the client; `length`: its length too."""
    return [
        (name, value)
        for name, value in head.headers
        if name in _PASSED_HEADERS and (length or name != b"content-length")
    ]
