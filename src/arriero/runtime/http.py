"""How does a daemon call another one?  (The token path has its own way.)"""

import errno
import os
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar, overload

import aiohttp
import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode, ErrorResponse, from_body
from arriero.runtime.attention import Attention
from arriero.runtime.sse import SseEvent, SseParser

T = TypeVar("T")
CONNECT_TIMEOUT_S: Final = 10.0
CALL_TIMEOUT_S: Final = 30.0
#: Larger than any answer; a machine that sends without end fills no memory.
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024


class Http:
    """One pool of connections, used as `async with Http() as http`.  Proxies are never used."""

    def __init__(self, *, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self._connect_timeout_s = connect_timeout_s
        #: While we stand still, nobody is late or silent.
        self.attention = Attention()
        self._session: aiohttp.ClientSession | None = None
        #: One for each unix socket that is spoken to.
        self._local: dict[str, aiohttp.ClientSession] = {}

    async def __aenter__(self) -> "Http":
        self._session = self._new(aiohttp.TCPConnector(limit=0, keepalive_timeout=30))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        for session in [self._session, *self._local.values()]:
            await session.close()

    def _new(self, connector: aiohttp.BaseConnector) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._connect_timeout_s),
            trust_env=False,
            auto_decompress=False,
        )

    def session(self, socket_path: str = "") -> aiohttp.ClientSession:
        """Return the aiohttp session for TCP, or the one for a unix socket.

        Raises FileNotFoundError for a socket that is gone: nobody would forget its session again.
        """
        assert self._session is not None, "used outside of its `async with`"
        if not socket_path:
            return self._session
        session = self._local.get(socket_path)
        if session is None:
            if not Path(socket_path).is_socket():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), socket_path)
            connector = aiohttp.UnixConnector(socket_path, limit=0, keepalive_timeout=30)
            session = self._local[socket_path] = self._new(connector)
        return session

    async def forget(self, socket_path: str) -> None:
        """Close what goes through a unix socket that is no more.  Safe to call twice."""
        session = self._local.pop(socket_path, None)
        if session is not None:
            await session.close()

    def peer(
        self, url: str, token: str = "", *, socket_path: str = "", headers: Mapping[str, str] | None = None
    ) -> "Peer":
        """Return a caller of one daemon; `socket_path` leads to it where its own port cannot be reached.

        `headers` go with every request.
        """
        return Peer(self, url.rstrip("/"), token, socket_path, dict(headers or {}))


class Peer:
    """One daemon, called by JSON.

    Every method raises the `ArrieroError` that the daemon answered with, or `unreachable` (a code,
    NODE_UNREACHABLE by default) when it does not answer.
    """

    def __init__(
        self,
        http: Http,
        url: str,
        token: str,
        socket_path: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._http = http
        self.url = url
        self._token = token
        self._socket_path = socket_path
        self._headers = dict(headers or {})

    @overload
    async def call(
        self,
        method: str,
        path: str,
        *,
        answer: type[T],
        body: object = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
        unreachable: ErrorCode = ErrorCode.NODE_UNREACHABLE,
    ) -> T: ...
    @overload
    async def call(
        self,
        method: str,
        path: str,
        *,
        answer: None = None,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
        unreachable: ErrorCode = ErrorCode.NODE_UNREACHABLE,
    ) -> None: ...
    async def call(
        self, method: str, path: str, *, answer: type[Any] | None = None, body: object = None,
        headers: Mapping[str, str] | None = None, timeout_s: float = CALL_TIMEOUT_S,
        unreachable: ErrorCode = ErrorCode.NODE_UNREACHABLE,
    ) -> Any:  # fmt: skip
        """Send a request and return the decoded answer (None where no `answer` type is given)."""
        try:
            async with self._http.attention.within(timeout_s):
                async with self.request(method, path, body=body, headers=headers) as response:
                    content = await _content(response)
                    if response.status >= 400:
                        raise error_of(response.status, content)
        except TimeoutError as error:
            raise ArrieroError(
                unreachable, f"no answer within {timeout_s:g} s", timeout_s=timeout_s
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ArrieroError(unreachable, f"not reachable: {type(error).__name__}") from error
        if answer is None:
            return None
        try:
            return msgspec.json.decode(content, type=answer)
        except msgspec.DecodeError as error:
            raise ArrieroError(
                ErrorCode.VERSION_MISMATCH, f"an answer that is none of ours: {error}"
            ) from error

    def request(
        self, method: str, path: str, *, body: object = None, headers: Mapping[str, str] | None = None,
    ) -> Any:  # fmt: skip
        """Return aiohttp's request context for a path; `body` is sent as JSON, bytes as they are."""
        sent = {**self._headers, **(headers or {})}
        if self._token:
            sent["Authorization"] = f"Bearer {self._token}"
        data: bytes | None = None
        if body is not None:
            data = body if isinstance(body, bytes) else msgspec.json.encode(body)
            sent.setdefault("Content-Type", "application/json")
        session = self._http.session(self._socket_path)
        return session.request(method, self.url + path, data=data, headers=sent)

    async def events(
        self, path: str, *, method: str = "GET", body: object = None,
        headers: Mapping[str, str] | None = None, silence_s: float = 30.0,
        unreachable: ErrorCode = ErrorCode.NODE_UNREACHABLE,
    ) -> AsyncGenerator[SseEvent, None]:  # fmt: skip
        """Yield a stream's events and comments; ends with the stream.

        Raises the daemon's error for a status that is not 2xx, `unreachable` when the connection
        fails, breaks, or brings nothing (not even a comment) for `silence_s`.
        """
        parser = SseParser()
        within, patiently = self._http.attention.within, self._http.attention.patiently
        try:
            async with within(silence_s):
                manager = self.request(method, path, body=body, headers=headers)
                response = await manager.__aenter__()
            try:
                if response.status >= 300:
                    async with within(silence_s):
                        raise error_of(response.status, await _content(response))
                with self._http.attention.watching():
                    # What came stays where it is if nobody takes it.
                    while chunk := await patiently(response.content.readany, silence_s):
                        for event in parser.feed(chunk):
                            yield event
            finally:
                response.close()
        except TimeoutError as error:
            raise ArrieroError(unreachable, f"silent for {silence_s:g} s", silence_s=silence_s) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ArrieroError(unreachable, f"connection broke: {type(error).__name__}") from error
        except ValueError as error:
            raise ArrieroError(
                ErrorCode.VERSION_MISMATCH, f"a stream that is none of ours: {error}"
            ) from error


async def _content(response: aiohttp.ClientResponse) -> bytes:
    """Return an answer's body.  Raises VERSION_MISMATCH if it is larger than any of ours."""
    content = bytearray()
    while piece := await response.content.readany():
        content += piece
        if len(content) > ANSWER_BYTES_MAX:
            raise ArrieroError(
                ErrorCode.VERSION_MISMATCH,
                f"an answer of more than {ANSWER_BYTES_MAX} bytes, which is none of ours",
            )
    return bytes(content)


def error_of(status: int, content: bytes) -> ArrieroError:
    """Return the error that an answer of `status` with `content` speaks of."""
    try:
        return from_body(msgspec.json.decode(content, type=ErrorResponse).error)
    except msgspec.DecodeError:
        # Whatever has the port now: none of our daemons answers like that.
        return ArrieroError(
            ErrorCode.VERSION_MISMATCH, f"answered with status {status}, and nothing of ours", status=status
        )
