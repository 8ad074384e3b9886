"""What do all daemons do with every request, before and around their routes?

`Guard` gives ids, refuses foreign hosts, origins and tokens, and bounds bodies.  `SseResponse`
sends a stream, beats while nothing happens, and stops computing when the client is gone.
"""

import asyncio
import hmac
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any, Final, TypeAlias

import msgspec

from arriero.contracts import ids
from arriero.contracts.errors import ArrieroError, ErrorCode, ErrorResponse, openai_body
from arriero.runtime import sse
from arriero.runtime.entropy import Entropy, SystemEntropy

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
AsgiApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers: TypeAlias = list[tuple[bytes, bytes]]

BODY_BYTES_MAX: Final = 10_000_000
#: So much of a refused body is read and thrown away, so that the client reads the answer
#: instead of a connection reset.
_DISCARD_BYTES_MAX: Final = 64_000_000
BEAT_S: Final = 10.0
LOOPBACK_HOSTS: Final = frozenset({"127.0.0.1", "localhost", "::1"})
#: Routes whose errors carry OpenAI's `type` and `param` too.
OPENAI_PATHS: Final = ("/v1/chat/", "/v1/completions", "/v1/embeddings", "/v1/models")

_log = logging.getLogger("arriero.http")


def error_bytes(error: ArrieroError, *, path: str = "") -> bytes:
    """Return the JSON envelope of `error`, in OpenAI's extended form where `path` is one of its routes."""
    body = openai_body(error) if path.startswith(OPENAI_PATHS) else error.body()
    return msgspec.json.encode(ErrorResponse(body))


async def send_error(
    send: Send, error: ArrieroError, *, path: str, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with `error`: its row's status, its envelope."""
    body = error_bytes(error, path=path)
    extra: Headers = [*headers]
    if error.kind.http_status in (429, 503):
        extra.append((b"retry-after", b"1"))
    if error.kind.http_status == 401:
        extra.append((b"www-authenticate", b"Bearer"))
    await send(
        {
            "type": "http.response.start",
            "status": error.kind.http_status,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                *extra,
            ],
        }
    )
    await send({"type": "http.response.body", "body": body})


class Guard:
    """ASGI middleware around a daemon's application.

    Sets `scope["state"]["request_id"]` and the answer's `X-Request-Id`.  Refuses with FORBIDDEN
    a foreign Host or Origin, with MISSING_API_KEY / INVALID_API_KEY a wrong token (where one is
    demanded, except on `open_paths`, whose routes check by themselves), with REQUEST_TOO_LARGE a
    body over the limit; `body_bytes_max_of` names the paths that have a limit of their own.
    `reading_token` is good for the requests (method, path) of which `is_reading` says so.
    """

    def __init__(
        self,
        app: AsgiApp,
        *,
        token: str = "",
        reading_token: str = "",
        is_reading: Callable[[str, str], bool] = lambda _method, _path: False,
        open_paths: frozenset[str] = frozenset(),
        hosts: frozenset[str] = LOOPBACK_HOSTS,
        body_bytes_max: int = BODY_BYTES_MAX,
        body_bytes_max_of: Mapping[str, int] | None = None,
        entropy: Entropy | None = None,
    ) -> None:
        self._app = app
        self._token = token.encode()
        self._reading_token = reading_token.encode()
        self._is_reading = is_reading
        self._open_paths = open_paths
        self._hosts = hosts
        self._body_bytes_max = body_bytes_max
        self._body_bytes_max_of = dict(body_bytes_max_of or {})
        self._entropy = entropy or SystemEntropy()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if ids.is_request_id(given) else ids.request_id(self._entropy.hex(24))
        scope.setdefault("state", {})["request_id"] = request_id
        id_header = (b"x-request-id", request_id.encode())
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                message = {**message, "headers": [*message.get("headers", ()), id_header]}
            await send(message)

        limit = self._body_bytes_max_of.get(scope["path"], self._body_bytes_max)
        bounded = _BoundedReceive(receive, limit)
        try:
            self._check(headers, scope["method"], scope["path"])
            bounded.check_length(headers.get(b"content-length"))
            await self._app(scope, bounded, send_with_id)
            if bounded.error is None or is_started:
                return
            raise bounded.error
        except ArrieroError as error:
            if is_started:
                raise
            await bounded.discard()
            await send_error(send_with_id, error, path=scope["path"])

    def _check(self, headers: dict[bytes, bytes], method: str, path: str) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        if _host_name(host) not in self._hosts:
            raise ArrieroError(ErrorCode.FORBIDDEN, f"Host {host[:80]!r} is not one of ours")
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1") not in (f"http://{host}", f"https://{host}"):
            raise ArrieroError(ErrorCode.FORBIDDEN, f"Origin {origin[:80].decode('latin-1')!r} is foreign")
        if not self._token or path in self._open_paths:
            return
        given = bearer_token(headers.get(b"authorization", b""))
        is_known = hmac.compare_digest(given, self._token)
        if self._reading_token and self._is_reading(method, path):
            is_known |= hmac.compare_digest(given, self._reading_token)
        if not is_known:
            raise ArrieroError(ErrorCode.INVALID_API_KEY)


def bearer_token(authorization: bytes) -> bytes:
    """Return the token of an Authorization header.  Raises MISSING_API_KEY if it has none."""
    scheme, _, token = authorization.partition(b" ")
    if scheme.lower() != b"bearer" or not token.strip():
        raise ArrieroError(ErrorCode.MISSING_API_KEY)
    return token.strip()


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


class _BoundedReceive:
    """A `receive` that stops at a body's limit; the caller sees a disconnect, then `error`."""

    def __init__(self, receive: Receive, bytes_max: int) -> None:
        self._receive = receive
        self._bytes_max = bytes_max
        self._bytes = 0
        self._is_whole = False
        self.error: ArrieroError | None = None

    def check_length(self, content_length: bytes | None) -> None:
        if content_length is not None and content_length.isdigit() and int(content_length) > self._bytes_max:
            raise self._too_large(int(content_length))

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._is_whole = not message.get("more_body", False)
            if self._bytes > self._bytes_max:
                self.error = self._too_large(self._bytes)
                raise self.error
        else:
            self._is_whole = True
        return message

    async def discard(self) -> None:
        """Read what is left of the body, within bounds, so that the answer arrives."""
        try:
            async with asyncio.timeout(10):
                while not self._is_whole and self._bytes < _DISCARD_BYTES_MAX:
                    message = await self._receive()
                    self._bytes += len(message.get("body", b""))
                    self._is_whole = message["type"] != "http.request" or not message.get("more_body", False)
        except TimeoutError:
            return

    def _too_large(self, size: int) -> ArrieroError:
        return ArrieroError(
            ErrorCode.REQUEST_TOO_LARGE,
            f"the body has {size} bytes or more, the limit is {self._bytes_max}",
            limit_bytes=self._bytes_max,
        )


class SseResponse:
    """An ASGI application that sends `frames` (whole events, see `sse.encode`) as they come.

    A comment line goes out whenever nothing else did for `beat_s`.  When the client disconnects,
    or `stop` is set, `frames` is closed at once: whatever it computes is cancelled.  An
    `ArrieroError` that `frames` raises becomes the stream's last event, `event: error`.
    """

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        *,
        headers: Iterable[tuple[bytes, bytes]] = (),
        beat_s: float = BEAT_S,
        stop: asyncio.Event | None = None,
    ) -> None:
        self._frames = frames
        self._headers = [*headers]
        self._beat_s = beat_s
        self._stop = stop
        self._is_fresh = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream to its end, or until the client is gone."""
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": 200,
                    "headers": [
                        (b"content-type", b"text/event-stream; charset=utf-8"),
                        (b"cache-control", b"no-store"),
                        (b"x-accel-buffering", b"no"),
                        *self._headers,
                    ],
                }
            )
            async with asyncio.TaskGroup() as group:
                pump = group.create_task(self._pump(scope["path"], send), name="sse-pump")
                ends = {pump, group.create_task(_disconnected(receive), name="sse-watch")}
                if self._stop is not None:
                    ends.add(group.create_task(_set(self._stop), name="sse-stop"))
                beat = group.create_task(self._beat(send), name="sse-beat")
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                for task in (*ends, beat):
                    task.cancel()
        finally:
            await self._frames.aclose()
        await send({"type": "http.response.body", "body": b""})

    async def _pump(self, path: str, send: Send) -> None:
        try:
            async for frame in self._frames:
                self._is_fresh = True
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        except ArrieroError as error:
            await send(_error_message(error, path))
        except Exception:  # noqa: BLE001  The edge: the client is told, the log has the traceback.
            _log.exception("a stream failed: %s", path)
            await send(_error_message(ArrieroError(ErrorCode.INTERNAL_ERROR), path))

    async def _beat(self, send: Send) -> None:
        while True:
            self._is_fresh = False
            await asyncio.sleep(self._beat_s)
            if not self._is_fresh:
                await send({"type": "http.response.body", "body": b": beat\n\n", "more_body": True})


def _error_message(error: ArrieroError, path: str) -> Message:
    frame = sse.encode(error_bytes(error, path=path), event="error")
    return {"type": "http.response.body", "body": frame, "more_body": True}


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _set(event: asyncio.Event) -> None:
    await event.wait()


async def primed(frames: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Wait for the first frame, then return a generator of all of them.

    What fails before the first frame is raised here, so that it gets its HTTP status.
    """
    try:
        first = await anext(frames)
    except StopAsyncIteration:
        first = b""

    async def chained() -> AsyncGenerator[bytes, None]:
        try:
            yield first
            async for frame in frames:
                yield frame
        finally:
            await frames.aclose()

    return chained()
