"""What do the tests of a catalog's upkeep share: an agent's routes over HTTP, and the sync client?"""

import asyncio
import contextlib
import functools
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.integration.model_files import Kit, inspect, kit_in

from arriero.agent.importer import Importer
from arriero.agent.routes.catalog import catalog_routes
from arriero.agent.routes.stock import BODY_LIMITS, stock_routes
from arriero.client.api import Agent
from arriero.engines.base import ModelFacts
from arriero.runtime.asgi import Guard
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SystemEntropy
from arriero.runtime.litestar_app import make_app
from arriero.runtime.serve import bind, serve, url_of
from arriero.runtime.tasks import start_ready

T = TypeVar("T")


@dataclass(slots=True)
class Stock:
    """A catalog behind its routes; `used` is what workers are said to have."""

    kit: Kit
    agent: Agent
    used: set[str]

    async def ask(self, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call the blocking client in a thread."""
        return await asyncio.to_thread(functools.partial(call, *args, **kwargs))


@contextlib.asynccontextmanager
async def stock_in(
    folder: Path, *, inspect: Callable[[Path], ModelFacts] = inspect
) -> AsyncGenerator[Stock, None]:
    used: set[str] = set()
    async with kit_in(folder, inspect=inspect) as kit:
        importer = Importer(kit.catalog, inspect=inspect, clock=SystemClock(), entropy=SystemEntropy())
        stop, sock = asyncio.Event(), bind("127.0.0.1", 0)
        app: Any = make_app(
            [
                *catalog_routes(kit.catalog, lambda: used, stop=stop, beat_s=0.05),
                *stock_routes(kit.catalog, importer, lambda: used, inspect=inspect, stop=stop, beat_s=0.05),
            ],
            title="agent",
        )

        async def run(announce: Any) -> None:
            async def on_started() -> None:
                announce(url_of(sock))

            await serve(
                Guard(app, body_bytes_max_of=BODY_LIMITS), sock, stop=stop, grace_s=1, on_started=on_started
            )

        async with asyncio.TaskGroup() as group:
            url = await start_ready(group, run, name="serve")
            try:
                yield Stock(kit, Agent(url), used)
            finally:
                stop.set()
