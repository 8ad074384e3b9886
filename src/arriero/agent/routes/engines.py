"""Which routes does an agent have for the builds of its engine?"""

import asyncio
from typing import Annotated, Any, TypeAlias

from litestar import Request, get, post, put
from litestar.params import FromPath, QueryParameter
from litestar.types import ASGIApp, ControllerRouterHandler

from arriero.agent.engine_install import EngineInstaller
from arriero.agent.machine import Machine
from arriero.agent.routes.watched import watched
from arriero.contracts.records import EngineList, UploadRecord
from arriero.contracts.requests import EngineInstallBody
from arriero.runtime.asgi import BEAT_S
from arriero.runtime.litestar_app import decode_body

Offset: TypeAlias = Annotated[int, QueryParameter(ge=0)]


def engine_routes(
    machine: Machine,
    installer: EngineInstaller,
    *,
    stop: asyncio.Event | None = None,
    beat_s: float = BEAT_S,
) -> list[ControllerRouterHandler]:
    """Return the handlers; streams end when `stop` is set."""

    @get("/v1/engines")
    async def engines() -> EngineList:
        """Return the builds of the engine there are, and the one that suits the machine."""
        await machine.look_aside()
        return machine.engine_list()

    @post("/v1/engines/install", status_code=200)
    async def install(request: Request[Any, Any, Any]) -> ASGIApp:
        """Put a build of the engine beside the one there is; followed as events where asked for."""
        body: EngineInstallBody = await decode_body(request, EngineInstallBody)
        await machine.look_aside()
        installer.plan(body)
        return await watched(request, lambda tell: installer.install(body, tell), stop=stop, beat_s=beat_s)

    @get("/v1/engines/uploads/{name:str}")
    async def uploaded(name: FromPath[str]) -> UploadRecord:
        """Return how much of a wheel has come in."""
        return await installer.uploads.size_of(name)

    @put("/v1/engines/uploads/{name:str}", status_code=200)
    async def upload(
        name: FromPath[str], request: Request[Any, Any, Any], offset: Offset = 0
    ) -> UploadRecord:
        """Take a piece of a wheel, which an installation may then name."""
        return await installer.uploads.write(name, offset, await request.body())

    return [engines, install, uploaded, upload]
