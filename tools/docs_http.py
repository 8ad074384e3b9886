"""Which routes do the three daemons have?  Read from their own tables and docstrings."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

from litestar import Litestar
from litestar.routes import HTTPRoute

from arriero.agent.routes.admin import admin_routes
from arriero.agent.routes.catalog import catalog_routes, estimate_routes
from arriero.agent.routes.downloads import download_routes
from arriero.agent.routes.engines import engine_routes
from arriero.agent.routes.node import node_routes
from arriero.agent.routes.stock import stock_routes
from arriero.agent.routes.workers import worker_routes
from arriero.orchestrator.routes.management import handlers
from arriero.orchestrator.routes.streams import STREAM_ROUTES
from arriero.worker.routes.admin import AdminRoutes
from arriero.worker.routes.inference import InferenceRoutes
from arriero.worker.routes.openai import OpenAiRoutes
from arriero.worker.routes.status import StatusRoutes

Row = tuple[str, str, str]
#: The handlers are read, never called: what they would work on is not there.
NOTHING = cast(Any, None)


def sentence(handler: Callable[..., Any]) -> str:
    """Return the first sentence of a handler's docstring."""
    return (inspect.getdoc(handler) or "").split("\n\n")[0].replace("\n", " ")


def litestar_rows(route_handlers: Iterable[Any]) -> list[Row]:
    app = Litestar(list(route_handlers), openapi_config=None)
    return [
        (route.path_format, method, sentence(handler.fn))
        for route in app.routes
        if isinstance(route, HTTPRoute)
        for handler in route.route_handlers
        for method in sorted(handler.http_methods - {"OPTIONS", "HEAD"})
    ]


def worker_rows() -> list[Row]:
    found: list[Row] = []
    for kind in (StatusRoutes, InferenceRoutes, OpenAiRoutes, AdminRoutes):
        routes = kind(NOTHING)
        for (method, path), handler in routes.table().items():
            shown = f"{path}{{request_id}}" if path.endswith("/") else path
            found.append((shown, method, sentence(handler)))
    return found


def rows() -> dict[str, list[Row]]:
    """Return path, method and sentence of each route, by daemon."""
    agent = [
        *node_routes(NOTHING, NOTHING, NOTHING, stop=NOTHING),
        *worker_routes(NOTHING, NOTHING, stop=NOTHING),
        *admin_routes(NOTHING, NOTHING),
        *catalog_routes(NOTHING),
        *estimate_routes(NOTHING, NOTHING),
        *stock_routes(NOTHING, NOTHING, NOTHING, inspect=NOTHING),
        *download_routes(NOTHING, NOTHING),
        *engine_routes(NOTHING, NOTHING),
    ]
    return {
        "Orchestrator": sorted([*litestar_rows(handlers(NOTHING)), *STREAM_ROUTES]),
        "Agent": sorted(litestar_rows(agent)),
        "Worker": sorted(worker_rows()),
    }
