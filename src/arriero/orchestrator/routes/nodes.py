"""Which questions about the machines of the pool are answered, and what can be done to them?

What takes long is an event stream of its steps (`followed`); all that can be refused before is.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Final, TypeAlias, cast

from litestar import Request, Response, delete, get, patch, post
from litestar.params import FromPath, FromQuery
from litestar.types import ASGIApp, ControllerRouterHandler

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.events import NodeDone
from arriero.contracts.records import CUT_HEADER, FindingList, NodeList, NodeRecord
from arriero.contracts.requests import NodeAddBody, NodeUpdateBody
from arriero.orchestrator.core import Orchestrator
from arriero.orchestrator.membership import unheard
from arriero.orchestrator.reach import told_of_node
from arriero.orchestrator.routes.followed import Followed, Tell, Work
from arriero.runtime import bodies

Asked: TypeAlias = Request[Any, Any, Any]
LOG_LINES_MAX: Final = 100_000
#: Whoever changes an address waits so long for what is done to the machine: less than a client does.
UPDATE_PATIENCE_S: Final = 20.0


def node_routes(o: Orchestrator) -> list[ControllerRouterHandler]:
    """Return the handlers."""
    return [*_looking(o), *_changing(o), *_working(o)]


@contextlib.contextmanager
def _of(name: str) -> Iterator[None]:
    """Have whatever fails within give advice for that node."""
    try:
        yield
    except ArrieroError as error:
        told_of_node(error, name)
        raise


def _followed(o: Orchestrator, work: Work, *, name: str | None = None) -> ASGIApp:
    """Return what does a piece of work; `name`: to a node that is registered."""

    async def done(tell: Tell) -> NodeDone:
        with _of(name) if name is not None else contextlib.nullcontext():
            return await work(tell)

    return cast("ASGIApp", Followed(done, stop=o.stop))


def _looking(o: Orchestrator) -> list[ControllerRouterHandler]:
    @get("/v1/nodes")
    async def list_nodes() -> NodeList:
        """Return the machines of the pool."""
        return NodeList([node.record() for node in o.registry.nodes()])

    @get("/v1/nodes/{name:str}")
    async def get_node(name: FromPath[str]) -> NodeRecord:
        """Return one machine."""
        return o.registry.node(name).record()

    @get("/v1/nodes/{name:str}/doctor")
    async def doctor(name: FromPath[str]) -> FindingList:
        """Look over a machine behind SSH for what is wrong with it."""
        with _of(name):
            return FindingList(await o.upkeep.doctor(name))

    @get("/v1/nodes/{name:str}/logs", media_type="text/plain; charset=utf-8")
    async def logs(name: FromPath[str], lines: FromQuery[int] = 100) -> Response[bytes]:
        """Return the last `lines` of the log of a machine's agent.

        `X-Arriero-Cut: true`: earlier ones of them are left out, they would be more than 4 MiB.
        """
        if not 1 <= lines <= LOG_LINES_MAX:
            fail(
                ErrorCode.INVALID_REQUEST, f"lines: {lines} is not within 1 … {LOG_LINES_MAX}", param="lines"
            )
        with _of(name):
            end = await o.upkeep.logs(name, lines)
        return Response(end.content, headers={CUT_HEADER: "true"} if end.is_cut else {})

    return [list_nodes, get_node, doctor, logs]


def _changing(o: Orchestrator) -> list[ControllerRouterHandler]:
    @patch("/v1/nodes/{name:str}")
    async def update(request: Asked, name: FromPath[str]) -> NodeRecord:
        """Change labels, address, key, accepted host key or hardware address of a machine."""
        body = bodies.decode(await request.body(), NodeUpdateBody)
        if not body.connects_anew:
            return (await o.membership.update(name, body)).record()
        # One that is being upgraded or removed is held again by whoever does that.
        async with o.underway.only(name, "changed", unheard, patience_s=UPDATE_PATIENCE_S):
            return (await o.membership.update(name, body)).record()

    @post("/v1/nodes/{name:str}/undrain", status_code=200)
    async def undrain(name: FromPath[str]) -> NodeRecord:
        """Give a machine work again."""
        return (await o.membership.wish_drained(name, is_drained=False)).record()

    return [update, undrain]


def _working(o: Orchestrator) -> list[ControllerRouterHandler]:
    @post("/v1/nodes", status_code=200)
    async def add(request: Asked) -> ASGIApp:
        """Have a machine join: an event stream of steps, at its end the machine."""
        body = bodies.decode(await request.body(), NodeAddBody)
        o.adding.check(body)
        return _followed(o, lambda tell: o.adding.add(body, tell))

    @post("/v1/nodes/{name:str}/drain", status_code=200)
    async def drain(name: FromPath[str], wait_s: FromQuery[float | None] = None) -> ASGIApp:
        """Give a machine no new work, and wait up to `wait_s` for what runs there: steps as events."""
        o.registry.node(name)
        return _followed(o, lambda tell: o.upkeep.drain(name, tell, wait_s=wait_s), name=name)

    @post("/v1/nodes/{name:str}/upgrade", status_code=200)
    async def upgrade(name: FromPath[str], carry: FromQuery[bool] = False) -> ASGIApp:
        """Bring a machine to the orchestrator's version: an event stream of steps."""
        o.membership.remote(name)
        grace_s = o.settings.stop_grace_s
        return _followed(o, lambda tell: o.upkeep.upgrade(name, tell, carry=carry, wait_s=grace_s), name=name)

    @delete("/v1/nodes/{name:str}", status_code=200)
    async def remove(
        name: FromPath[str], purge: FromQuery[bool] = False, force: FromQuery[bool] = False
    ) -> ASGIApp:
        """Stop what we started on a machine and forget it: an event stream of steps."""
        o.membership.remote(name)
        return _followed(o, lambda tell: o.upkeep.remove(name, tell, purge=purge, force=force), name=name)

    return [add, drain, upgrade, remove]
