"""Which routes end an agent, or an orchestrator's hold on it?"""

from collections.abc import Awaitable, Callable
from typing import Any, cast

from litestar import Request, post
from litestar.types import ControllerRouterHandler

from arriero.agent.lease import FENCE_KEY
from arriero.contracts.errors import ErrorCode, fail
from arriero.contracts.fence import FENCE_HEADER, Fence
from arriero.contracts.records import WorkerList
from arriero.contracts.requests import ShutdownBody
from arriero.runtime.litestar_app import decode_body


def admin_routes(
    shut_down: Callable[[ShutdownBody], WorkerList], release: Callable[[str], Awaitable[None]]
) -> list[ControllerRouterHandler]:
    """Return the handlers."""

    @post("/v1/admin/shutdown", status_code=202)
    async def shutdown(request: Request[Any, Any, Any]) -> WorkerList:
        """End the agent, with its workers unless `workers` is false, as SIGTERM does (202 first)."""
        body = await decode_body(request, ShutdownBody) if await request.body() else ShutdownBody()
        return shut_down(body)

    @post("/v1/admin/release", status_code=204)
    async def let_go(request: Request[Any, Any, Any]) -> None:
        """Let go of the machine; workers bound to who asks are gone when this is answered."""
        fence = fence_in(request)
        if fence is None:
            fail(ErrorCode.INVALID_REQUEST, f"{FENCE_HEADER} says who lets go", param=FENCE_HEADER)
        await release(fence.holder)

    return [shutdown, let_go]


def fence_in(request: Request[Any, Any, Any]) -> Fence | None:
    """Return the number that a request came under, which was found to be the newest."""
    return cast("dict[str, Any]", request.scope).get(FENCE_KEY)
