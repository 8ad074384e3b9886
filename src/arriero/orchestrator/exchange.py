"""Who is on the other end of an answer, is somebody still there, and until when may it take?"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.domain import deadlines
from arriero.runtime import sse
from arriero.runtime.asgi import Headers, Receive, Scope, Send, error_bytes, send_error
from arriero.runtime.clock import Clock

SSE_HEADERS: Final[Headers] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class Outlet:
    """The answer to one client, on its way."""

    def __init__(self, send: Send, path: str) -> None:
        self._send = send
        self._path = path
        self.is_started = False
        self.is_stream = False
        #: Whether the client has seen anything but comments: then nothing can be tried again unseen.
        self.has_data = False
        self.is_ended = False

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head."""
        self.is_started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def start_stream(self, extra: Headers | None = None) -> None:
        """Send the head of an event stream, once."""
        if not self.is_started:
            self.is_stream = True
            await self.start(200, [*SSE_HEADERS, *(extra or ())])

    async def write(self, chunk: bytes) -> None:
        """Send a piece of the body; waits while the client does not read."""
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def comment(self, text: str) -> None:
        """Send a comment line; its stream begins with it if it has not yet."""
        await self.start_stream()
        await self.write(sse.comment(text))

    async def end(self, chunk: bytes = b"") -> None:
        """Send the end."""
        self.is_ended = True
        await self._send({"type": "http.response.body", "body": chunk})

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Send an answer that is complete."""
        await self.start(status, [*headers, (b"content-length", str(len(body)).encode())])
        await self.end(body)

    async def fail(self, error: ArrieroError, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        """Tell of an error: by its status, or as the last event of a stream that began."""
        if self.is_ended:
            return
        if not self.is_started:
            self.is_started = self.is_ended = True
            await send_error(self._send, error, path=self._path, headers=headers)
        elif self.is_stream:
            await self.end(sse.encode(error_bytes(error, path=self._path), event="error"))


class Exchange:
    """One request being answered: ends at once when its client goes, or when its time is over."""

    def __init__(self, receive: Receive, remaining_ms: float | None) -> None:
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._deadline_s = None if remaining_ms is None else self._loop.time() + remaining_ms / 1000
        self._given_ms = remaining_ms
        self._timer: asyncio.Timeout | None = None
        self._aborted: ArrieroError | None = None
        self.is_gone = False

    def next_hop_ms(self) -> float | None:
        """Return the milliseconds that the next hop is given; from now on its word is waited for."""
        if self._deadline_s is None:
            return None
        if self._timer is not None and self._aborted is None and not self.is_gone:
            self._timer.reschedule(self._deadline_s + deadlines.WORD_MS / 1000)
        return deadlines.for_next_hop(max((self._deadline_s - self._loop.time()) * 1000, 1.0))

    def abort(self, error: ArrieroError) -> None:
        """End it from outside with `error`."""
        self._aborted = error
        self._expire()

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work`; return early if the client goes.

        Raises what `work` raises, REQUEST_TIMEOUT when the deadline passes, or the error of `abort`.
        """
        failure: ArrieroError | None = None
        async with asyncio.TaskGroup() as group:
            self._timer = asyncio.timeout_at(self._deadline_s)
            try:
                async with self._timer:
                    watch = group.create_task(self._watch(), name="client-watch")
                    try:
                        await work()
                    finally:
                        watch.cancel()
            except TimeoutError:
                if not self._timer.expired():
                    raise
                failure = self._aborted or self._timed_out()
            except ArrieroError as error:
                failure = error
            self._timer = None
        if failure is not None and not self.is_gone:
            raise failure

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.is_gone = True
        self._expire()

    def _expire(self) -> None:
        if self._timer is not None and not self._timer.expired():
            self._timer.reschedule(self._loop.time())

    def _timed_out(self) -> ArrieroError:
        return ArrieroError(
            ErrorCode.REQUEST_TIMEOUT,
            f"the deadline of {self._given_ms or 0:.0f} ms passed",
            limit_ms=round(self._given_ms or 0),
        )


class Exchanges:
    """All that are running: counted, and ended together when the daemon stops."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._running: set[Exchange] = set()
        #: When the last one ended, on the monotonic clock.
        self.last_end_s = 0.0

    def __len__(self) -> int:
        return len(self._running)

    async def run(self, exchange: Exchange, work: Callable[[], Awaitable[None]]) -> None:
        """Run an exchange, counted."""
        self._running.add(exchange)
        try:
            await exchange.run(work)
        finally:
            self._running.discard(exchange)
            self.last_end_s = self._clock.monotonic_s()

    def abort_all(self, error: ArrieroError) -> None:
        """End all that still run."""
        for exchange in list(self._running):
            exchange.abort(error)


async def read_body(receive: Receive) -> bytes:
    """Return a request's whole body; the guard bounds it.  Raises REQUEST_CANCELLED if the client goes."""
    message = await receive()
    body: bytes = message.get("body", b"")
    while message.get("more_body", False):
        message = await receive()
        body += message.get("body", b"")
    if message["type"] == "http.disconnect":
        fail(ErrorCode.REQUEST_CANCELLED)
    return body


def header(scope: Scope, name: bytes) -> str:
    """Return a request header, empty if it is not there."""
    for key, value in scope["headers"]:
        if key == name:
            found: str = value.decode("latin-1")
            return found
    return ""


def remaining_ms(scope: Scope, timeout_s: float | None = None) -> float | None:
    """Return how long the request may take, by its header and its body's `timeout`; None: no limit.

    Raises INVALID_REQUEST if the header is not well formed.
    """
    given = header(scope, b"x-request-deadline")
    from_header: float | None = None
    if given:
        try:
            from_header = deadlines.parse_header(given)
        except ValueError as error:
            raise ArrieroError(
                ErrorCode.INVALID_REQUEST, f"X-Request-Deadline: {error}", param="X-Request-Deadline"
            ) from error
    return deadlines.tightest(from_header, None if timeout_s is None else timeout_s * 1000)


def request_id(scope: Scope) -> str:
    """Return the request's id, as the guard gave it."""
    found: str = scope["state"]["request_id"]
    return found
