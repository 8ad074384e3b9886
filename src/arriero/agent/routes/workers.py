"""Which routes does an agent have for its workers?"""

import asyncio
from typing import Annotated, Any, cast

from litestar import Request, Response, delete, get, post
from litestar.params import FromPath, QueryParameter
from litestar.types import ASGIApp, ControllerRouterHandler

from arriero.agent.routes.admin import fence_in
from arriero.agent.spawner import Spawner
from arriero.agent.supervisor import Supervisor
from arriero.agent.worker_logs import TextStream, follow, last_lines
from arriero.contracts.records import WorkerList, WorkerRecord
from arriero.contracts.requests import ReadyCallback, SpawnBody
from arriero.runtime.asgi import bearer_token
from arriero.runtime.litestar_app import decode_body

READY_PATH = "/v1/workers/ready"
LINES_DEFAULT = 200
LINES_MAX = 10_000

WorkerId = FromPath[str]
Lines = Annotated[int, QueryParameter(ge=0, le=LINES_MAX)]
Force = Annotated[bool, QueryParameter(name="force")]
Follow = Annotated[bool, QueryParameter(name="follow")]


def worker_routes(
    supervisor: Supervisor, spawner: Spawner, *, stop: asyncio.Event
) -> list[ControllerRouterHandler]:
    """Return the handlers; streams end when `stop` is set."""

    @get("/v1/workers")
    async def list_workers() -> WorkerList:
        """Return the workers of this machine, those that ended lately too."""
        return WorkerList(list(supervisor.registry))

    @post("/v1/workers", status_code=202)
    async def spawn(request: Request[Any, Any, Any]) -> WorkerRecord:
        """Start a worker (202); it comes back `starting`."""
        body: SpawnBody = await decode_body(request, SpawnBody)
        fence = fence_in(request)
        return await spawner.spawn(body, holder="" if fence is None else fence.holder)

    @get("/v1/workers/{worker_id:str}")
    async def one_worker(worker_id: WorkerId) -> WorkerRecord:
        """Return one worker."""
        return supervisor.registry.get(worker_id)

    @delete("/v1/workers/{worker_id:str}", status_code=202)
    async def stop_worker(worker_id: WorkerId, force: Force = False) -> Response[WorkerRecord | None]:
        """Begin to stop a worker, gracefully unless `force` (202); 204 for one that ended."""
        if supervisor.stop(worker_id, is_forced=force):
            return Response(supervisor.registry.get(worker_id), status_code=202)
        return Response(None, status_code=204)

    @post(READY_PATH, status_code=200)
    async def ready(request: Request[Any, Any, Any]) -> WorkerRecord:
        """Take a worker's ready callback, with that worker's own token."""
        # The guard lets this path through: each worker has its own token for it.
        token = bearer_token(request.headers.get("authorization", "").encode())
        callback: ReadyCallback = await decode_body(request, ReadyCallback)
        return supervisor.called_back(callback, token.decode("utf-8", "replace"))

    @get("/v1/workers/{worker_id:str}/logs")
    async def worker_log(
        worker_id: WorkerId, lines: Lines = LINES_DEFAULT, is_followed: Follow = False
    ) -> ASGIApp:
        """Return the end of a worker's log (`lines`); with `follow=1` until it ends."""
        path, ended = supervisor.log_of(worker_id)
        blocks = follow(path, ended, lines=lines) if is_followed else last_lines(path, lines)
        return cast("ASGIApp", TextStream(blocks, stop))

    return [list_workers, spawn, one_worker, stop_worker, ready, worker_log]
