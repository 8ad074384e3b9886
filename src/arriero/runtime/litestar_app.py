"""How does a daemon's Litestar application answer errors in the one shape?"""

import logging
from collections.abc import Sequence
from typing import Any

from litestar import Litestar, Request, Response
from litestar.exceptions import HTTPException, NotFoundException
from litestar.openapi.config import OpenAPIConfig
from litestar.plugins import PluginProtocol
from litestar.plugins.core import MsgspecDIPlugin
from litestar.types import ControllerRouterHandler

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.version import __version__
from arriero.runtime import bodies
from arriero.runtime.asgi import error_bytes

_log = logging.getLogger("arriero.http")


class _Application(Litestar):
    """Leaves alone what it could support of libraries that we have no use for.

    Where those are installed, to import them would take a fifth of a daemon's start.
    """

    @staticmethod
    def _get_default_plugins(plugins: list[PluginProtocol]) -> list[PluginProtocol]:
        return [*plugins, MsgspecDIPlugin()]


def make_app(
    handlers: Sequence[ControllerRouterHandler], *, title: str, openapi_path: str | None = None
) -> Litestar:
    """Return an application of `handlers`; all failures answer in the one error shape."""
    openapi = (
        OpenAPIConfig(title=title, version=__version__, path=openapi_path or "/schema")
        if openapi_path
        else None
    )
    return _Application(
        route_handlers=list(handlers),
        openapi_config=openapi,
        exception_handlers={
            ArrieroError: _on_arriero_error,
            HTTPException: _on_http_error,
            Exception: _on_fault,
        },
        request_max_body_size=None,  # The guard bounds bodies.
        logging_config=None,
    )


def _answer(
    request: Request[Any, Any, Any], error: ArrieroError, status: int | None = None
) -> Response[bytes]:
    headers = {"Retry-After": "1"} if error.kind.http_status in (429, 503) else None
    return Response(
        error_bytes(error, path=request.scope["path"]),
        status_code=status or error.kind.http_status,
        media_type="application/json",
        headers=headers,
    )


def _on_arriero_error(request: Request[Any, Any, Any], error: ArrieroError) -> Response[bytes]:
    return _answer(request, error)


def _on_http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    if isinstance(error, NotFoundException):
        return _answer(request, ArrieroError(ErrorCode.NOT_FOUND, f"no route {request.scope['path'][:200]}"))
    if error.status_code >= 500:
        return _on_fault(request, error)
    extra = error.extra if isinstance(error.extra, list) else []
    reasons = [
        f"{item.get('key', '')}: {item.get('message', '')}".strip(": ")
        for item in extra
        if isinstance(item, dict)
    ]
    message = "; ".join(reasons) or str(error.detail)
    return _answer(request, ArrieroError(ErrorCode.INVALID_REQUEST, message[:500]), error.status_code)


def _on_fault(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    _log.error("a request failed: %s", request.scope["path"], exc_info=error)
    return _answer(request, ArrieroError(ErrorCode.INTERNAL_ERROR))


async def decode_body(request: Request[Any, Any, Any], kind: type[Any]) -> Any:
    """Return the request's JSON body as `kind`.  Raises INVALID_REQUEST with the field and the reason."""
    return bodies.decode(await request.body(), kind)
