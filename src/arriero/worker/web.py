"""How does a request come to its handler, and an answer out?  Plain ASGI: a worker starts often."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias, TypeVar
from urllib.parse import parse_qsl

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.domain import deadlines
from arriero.runtime.asgi import (
    AsgiApp,
    Headers,
    Message,
    Receive,
    Scope,
    Send,
    error_bytes,
    send_error,
)
from arriero.runtime.bodies import field_and_reason
from arriero.worker.fencing import HEADER as FENCE_HEADER
from arriero.worker.fencing import Fencing

T = TypeVar("T")
_log = logging.getLogger("arriero.http")


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as the handlers see it."""

    scope: Scope
    receive: Receive
    path: str
    request_id: str
    #: When its head was read, on the loop's clock.
    arrived_s: float
    #: The number that it came under; None: it said none.
    fence: int | None = None

    def header(self, name: bytes) -> bytes:
        """Return a header's value (the name in lower case); empty if it is not there."""
        for key, value in self.scope["headers"]:
            if key == name:
                return bytes(value)
        return b""

    def query(self) -> list[tuple[str, str]]:
        """Return the query's parameters in order.  Raises INVALID_REQUEST if there are too many."""
        try:
            text = self.scope["query_string"].decode("latin-1")
            return parse_qsl(text, keep_blank_values=True, max_num_fields=100, errors="strict")
        except ValueError as error:
            raise ArrieroError(ErrorCode.INVALID_REQUEST, "the query is not well formed") from error

    def deadline_s(self, timeout_s: float | None = None) -> float | None:
        """Return when the engine's work must stop (loop's clock), so that there is time to say so.

        The tighter one of `X-Request-Deadline` and `timeout_s`; None if neither is given.  Raises
        INVALID_REQUEST if the header is not well formed.
        """
        given = self.header(b"x-request-deadline").decode("latin-1")
        remaining_ms: float | None = None
        if given:
            try:
                remaining_ms = deadlines.parse_header(given)
            except ValueError as error:
                raise ArrieroError(
                    ErrorCode.INVALID_REQUEST,
                    f"X-Request-Deadline {given[:40]!r} is no number of milliseconds within 1 … "
                    f"{deadlines.REMAINING_MS_MAX:.0f}",
                    param="X-Request-Deadline",
                ) from error
        limit_ms = deadlines.tightest(remaining_ms, None if timeout_s is None else timeout_s * 1000)
        return None if limit_ms is None else self.arrived_s + deadlines.for_next_hop(limit_ms) / 1000

    async def body(self) -> bytes:
        """Return the whole body; the guard bounds it.  Raises REQUEST_CANCELLED if the client went away."""
        chunks: list[bytes] = []
        while True:
            message = await self.receive()
            if message["type"] != "http.request":
                raise ArrieroError(
                    ErrorCode.REQUEST_CANCELLED, "the client went away before its request was whole"
                )
            chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(chunks)

    async def decode(self, kind: type[T], *, default: bytes = b"") -> T:
        """Return the JSON body as `kind`; an empty body counts as `default`.

        Raises INVALID_REQUEST with the field (`param`) and the reason.
        """
        return decode(await self.body() or default, kind)


def decode(content: bytes, kind: type[T]) -> T:
    """Return JSON as `kind`.  Raises INVALID_REQUEST with the field (`param`) and the reason."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise _invalid(error, _given(content)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArrieroError(ErrorCode.INVALID_REQUEST, f"the body is no JSON: {error}"[:300]) from error
    except RecursionError as error:
        raise ArrieroError(ErrorCode.INVALID_REQUEST, "the body is nested too deeply") from error


def _given(content: bytes) -> Any:
    try:
        return msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError):
        return None  # Wrong further on as well; the first thing wrong is told.


def convert(value: Mapping[str, Any], kind: type[T]) -> T:
    """Return query parameters as `kind`.  Raises INVALID_REQUEST like `decode`."""
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(error, value) from error


def _invalid(error: msgspec.ValidationError, given: Any) -> ArrieroError:
    """Return the error with the field as `param`, from its path or from the message that names it.

    The value is told where it is a number: a text may be a prompt.
    """
    param, reason = field_and_reason(error)
    value = given.get(param) if isinstance(given, Mapping) else None
    shown = f"{param} is {value}: {reason}" if isinstance(value, int | float) else str(error)
    return ArrieroError(
        ErrorCode.INVALID_REQUEST, shown[:500], param=param[:200] or None, reason=reason[:300]
    )


Handler: TypeAlias = Callable[[Request], Awaitable[AsgiApp]]


class Router:
    """Routes by method and path; a path that ends in `/` takes what follows as one name."""

    def __init__(
        self, routes: Mapping[tuple[str, str], Handler], now_s: Callable[[], float], fencing: Fencing
    ) -> None:
        self._routes = dict(routes)
        self._fencing = fencing
        self._methods: dict[str, list[str]] = {}
        for method, path in routes:
            self._methods.setdefault(path, []).append(method)
        self._now_s = now_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        path: str = scope["path"]
        request = Request(scope, receive, path, scope["state"]["request_id"], self._now_s())
        if given := request.header(FENCE_HEADER):
            request = replace(request, fence=self._fencing.admit(given))
        is_started = False

        async def noting(message: Message) -> None:
            nonlocal is_started
            is_started = True
            await send(message)

        try:
            app = await self._find(scope["method"], path)(request)
        except ArrieroError:
            raise  # The guard answers.
        except Exception:  # noqa: BLE001  The edge: the client is told, the log has the traceback.
            _log.exception("a request failed: %s", path)
            await send_error(noting, ArrieroError(ErrorCode.INTERNAL_ERROR), path=path)
            return
        await app(scope, receive, send)

    def _find(self, method: str, path: str) -> Handler:
        known = path
        if path not in self._methods or path.endswith("/"):
            parent, _, name = path.rpartition("/")
            known = f"{parent}/"
            if not name or known not in self._methods:
                raise ArrieroError(ErrorCode.NOT_FOUND, f"there is no route {path[:200]}")
        handler = self._routes.get((method, known))
        if handler is None:
            return _method_not_allowed(self._methods[known])
        return handler


def _method_not_allowed(methods: list[str]) -> Handler:
    async def handler(request: Request) -> AsgiApp:
        allowed = ", ".join(sorted(methods))
        error = ArrieroError(
            ErrorCode.INVALID_REQUEST,
            f"{request.path[:200]} takes {allowed}, not {request.scope['method'][:20]}",
        )
        content = error_bytes(error, path=request.path)
        return Plain(405, content, headers=[(b"allow", allowed.encode())])

    return handler


class Plain:
    """An answer that is there at once."""

    def __init__(
        self,
        status: int,
        content: bytes = b"",
        *,
        content_type: bytes = b"application/json",
        headers: Headers | None = None,
    ) -> None:
        self._status = status
        self._content = content
        self._headers: Headers = [*(headers or [])]
        if status != 204:
            self._headers += [(b"content-type", content_type), (b"content-length", b"%d" % len(content))]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": self._status, "headers": self._headers})
        await send({"type": "http.response.body", "body": self._content})


def json_answer(value: object, status: int = 200) -> Plain:
    """Return `value` as a JSON answer."""
    return Plain(status, msgspec.json.encode(value))


class Signed:
    """ASGI middleware that puts the node's and the worker's name on every answer."""

    def __init__(self, app: AsgiApp, headers: Headers) -> None:
        self._app = app
        self._headers: Final = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""

        async def signing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
            await send(message)

        await self._app(scope, receive, signing)
