"""How is a worker told to end, and that its node was taken over?"""

from arriero.contracts.requests import EndBody, FenceBody
from arriero.runtime.asgi import AsgiApp
from arriero.worker.core import Core
from arriero.worker.web import Handler, Request, json_answer


class AdminRoutes:
    """Handlers over one worker."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def table(self) -> dict[tuple[str, str], Handler]:
        """Return the routes."""
        return {
            ("POST", "/v1/admin/drain"): self.drain,
            ("POST", "/v1/admin/fence"): self.fence,
            ("POST", "/v1/admin/shutdown"): self.shutdown,
        }

    async def drain(self, request: Request) -> AsgiApp:
        """Take no new request, let the others finish, then end."""
        body = await request.decode(EndBody, default=b"{}")
        self._core.end("drained over HTTP", grace_s=body.grace_s)
        return json_answer(self._core.health(), 202)

    async def fence(self, request: Request) -> AsgiApp:
        """Take the node's newest number; what came under a smaller one is over.  Answers the newest known."""
        body = await request.decode(FenceBody)
        self._core.fence(body.number)
        return json_answer(FenceBody(number=self._core.fencing.number))

    async def shutdown(self, request: Request) -> AsgiApp:
        """End after a grace time at the latest; what still runs then is cancelled."""
        body = await request.decode(EndBody, default=b"{}")
        grace_s = self._core.spec.stop_grace_s if body.grace_s is None else body.grace_s
        self._core.end("shut down over HTTP", grace_s=grace_s)
        return json_answer(self._core.health(), 202)
