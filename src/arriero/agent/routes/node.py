"""Which routes tell of the machine itself?  Health, capabilities, events, metrics."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final, cast

import msgspec
from litestar import Request, Response, get
from litestar.types import ASGIApp, ControllerRouterHandler

from arriero.agent.events import Feed
from arriero.agent.lease import SCOPE_KEY, Holding
from arriero.agent.machine import Machine
from arriero.agent.metrics import CONTENT_TYPE, AgentMetrics
from arriero.contracts.records import Capabilities, Health
from arriero.contracts.version import API_VERSION, __version__
from arriero.runtime import sse
from arriero.runtime.asgi import SseResponse

#: Who opens the stream misses a machine that says nothing; what is free is told with the beats as well.
SNAPSHOT_LOOK_S: Final = 0.5


def node_routes(
    machine: Machine, feed: Feed, metrics: AgentMetrics, *, stop: asyncio.Event
) -> list[ControllerRouterHandler]:
    """Return the handlers; streams end when `stop` is set."""

    @get("/v1/health")
    async def health() -> Health:
        """Say that the agent lives."""
        return Health(
            status="alive", version=__version__, api_version=API_VERSION, name=machine.node, pid=os.getpid()
        )

    @get("/v1/capabilities")
    async def capabilities() -> Capabilities:
        """Return devices, memory, disk, backends and engines."""
        await machine.look_aside()
        return machine.capabilities()

    @get("/v1/events")
    async def events(request: Request[Any, Any, Any]) -> ASGIApp:
        """Follow this machine as events: a snapshot, every change, a beat a second.

        Who says `X-Arriero-Fence: HOLDER:NUMBER` holds the machine as long as the stream is open.
        """
        holding: Holding | None = cast("dict[str, Any]", request.scope).get(SCOPE_KEY)
        await machine.look_aside(within_s=SNAPSHOT_LOOK_S)
        return cast("ASGIApp", SseResponse(_frames(feed, holding), stop=stop))

    @get("/metrics")
    async def metrics_page() -> Response[bytes]:
        """Return the counters in Prometheus' text form."""
        return Response(await metrics.page(), media_type=CONTENT_TYPE)

    return [health, capabilities, events, metrics_page]


async def _frames(feed: Feed, holding: Holding | None) -> AsyncGenerator[bytes, None]:
    number = 0
    async with aclosing(feed.read(None if holding is None else holding.check)) as events:
        async for event in events:
            number += 1
            yield sse.encode(msgspec.json.encode(event), number)
