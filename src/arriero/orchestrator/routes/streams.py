"""Which requests are answered below the framework, byte by byte or event by event?

The OpenAI routes, task events, the live feed, and what is passed on to workers and agents.
"""

from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias
from urllib.parse import parse_qs, quote, urlencode

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.requests import TaskBody
from arriero.orchestrator.core import Orchestrator
from arriero.orchestrator.exchange import header, read_body, remaining_ms, request_id
from arriero.orchestrator.proxy import AGENT_CODES
from arriero.orchestrator.task import Task, events_after, frames
from arriero.orchestrator.upstream import Address
from arriero.runtime import bodies
from arriero.runtime.asgi import AsgiApp, Receive, Scope, Send, SseResponse, send_error

Handler: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
RELAYED: Final = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
_PLACE: Final = "; an object `arriero` in the body says where: `node`, `backend`, `device`, `labels`."
#: What an agent's routes begin with that anybody may ask for through us.
_PASSED_ON: Final = (["v1", "models"], ["v1", "engines"])
#: Path, method and purpose of the routes that are answered here and not by the management routes.
STREAM_ROUTES: Final = (
    ("/v1/chat/completions", "POST", f"OpenAI's chat, streamed or not{_PLACE}"),
    ("/v1/completions", "POST", f"OpenAI's completions, streamed or not{_PLACE}"),
    ("/v1/embeddings", "POST", f"OpenAI's embeddings{_PLACE}"),
    ("/v1/downloads/progress", "GET", "Follow a download (`download_id`) as events."),
    ("/v1/downloads/{download_id}/progress", "GET", "Follow a download as events."),
    ("/v1/events", "GET", "Follow nodes, workers and tasks as events."),
    (
        "/v1/nodes/{name}/proxy/{path}",
        "ANY",
        "An agent's routes below `/v1/models` and `/v1/engines`, wherever it lives.",
    ),
    ("/v1/tasks", "POST", "Accept a task (202), or run it as an event stream that owns it."),
    ("/v1/tasks/{task_id}/events", "GET", "Follow a task's events, from `Last-Event-ID` on."),
    ("/v1/workers/{worker_id}/logs", "GET", "Return a worker's log; with `follow=1` until it ends."),
    ("/v1/workers/{worker_id}/proxy/{path}", "ANY", "Any route of a worker, wherever it lives."),
)


class Front:
    """The orchestrator's application: streams here, everything else by `management`."""

    def __init__(self, orchestrator: Orchestrator, management: AsgiApp) -> None:
        self._o = orchestrator
        self._management = management
        self._exact: dict[tuple[str, str], Handler] = {("POST", path): orchestrator.relay for path in RELAYED}
        self._exact["POST", "/v1/tasks"] = self._post_task
        self._exact["GET", "/v1/events"] = self._feed
        self._exact["GET", "/v1/downloads/progress"] = self._download_progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._management(scope, receive, send)
            return
        handler = self._exact.get((scope["method"], scope["path"])) or self._by_shape(scope)
        try:
            await handler(scope, receive, send)
        except ArrieroError as error:
            # Handlers raise before their first byte alone: afterwards the stream tells.
            await send_error(send, error, path=scope["path"])

    def _by_shape(self, scope: Scope) -> Handler:
        parts = scope["path"].split("/", 5)
        if len(parts) >= 5 and parts[1] == "v1":
            what, kind = parts[2], parts[4]
            if what == "workers" and kind == "proxy":
                return self._proxy
            if what == "nodes" and kind == "proxy":
                return self._node_proxy
            if scope["method"] == "GET":
                if what == "workers" and kind == "logs" and len(parts) == 5:
                    return self._worker_logs
                if what == "tasks" and kind == "events" and len(parts) == 5:
                    return self._task_events
                if what == "downloads" and kind == "progress" and len(parts) == 5:
                    return self._download_progress
        return self._management

    # --- Tasks ---------------------------------------------------------------------------

    async def _post_task(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bodies.decode(await read_body(receive), TaskBody)
        is_owned = "text/event-stream" in header(scope, b"accept")
        accepted = await self._o.tasks.accept(
            body,
            request_id=request_id(scope),
            remaining_ms=remaining_ms(scope, body.timeout),
            is_owned=is_owned,
            key=header(scope, b"idempotency-key"),
        )
        task = accepted.task
        record = task.shown() if isinstance(task, Task) else task
        location = (b"location", f"/v1/tasks/{record.task_id}".encode())
        if not is_owned:
            await send_json(send, 202, record, location)
            return
        if not isinstance(task, Task):
            task = await self._o.tasks.with_events(record.task_id)
        is_owner = accepted.is_new
        await SseResponse(frames(task, after=0, is_owner=is_owner), headers=[location])(scope, receive, send)

    async def _task_events(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = await self._o.tasks.with_events(scope["path"].split("/")[3])
        after = events_after(task, header(scope, b"last-event-id"))
        await SseResponse(frames(task, after=after, is_owner=False))(scope, receive, send)

    async def _feed(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = self._o.feed.listen(self._o.snapshot)
        await SseResponse(stream, stop=self._o.stop)(scope, receive, send)

    # --- Passing on ----------------------------------------------------------------------

    async def _proxy(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts = scope["path"].split("/", 5)
        record = self._o.registry.workers.get(parts[3])
        rest = quote(parts[5] if len(parts) > 5 else "", safe="/:@!$&'()*+,;=~-._")
        await self._o.proxy(
            scope,
            receive,
            send,
            address=self._o.registry.address(record),
            target=f"/{rest}{_query(scope)}",
            added=[
                (b"x-arriero-node", record.node.encode()),
                (b"x-arriero-worker", record.worker_id.encode()),
            ],
        )

    async def _worker_logs(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = self._o.registry.worker(scope["path"].split("/")[3])
        target = f"/v1/workers/{record.worker_id}/logs{_query(scope)}"
        await self._to_agent(scope, receive, send, record.node, target)

    async def _node_proxy(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts = scope["path"].split("/", 5)
        rest = parts[5].split("/") if len(parts) > 5 else []
        # An agent's other routes tell secrets: its events carry the workers' tokens.
        if rest[:2] not in _PASSED_ON or ".." in rest:
            fail(ErrorCode.NOT_FOUND, f"no route {scope['path'][:200]}", path=scope["path"][:200])
        target = "/" + quote("/".join(rest), safe="/:@!$&'()*+,;=~-._") + _query(scope)
        await self._to_agent(scope, receive, send, parts[3], target)

    async def _download_progress(self, scope: Scope, receive: Receive, send: Send) -> None:
        download_id = self._download_id(scope)
        node = self._o.node_of_download(download_id)
        target = "/v1/models/download/progress?" + urlencode({"download_id": download_id})
        await self._to_agent(scope, receive, send, node.name, target)

    def _download_id(self, scope: Scope) -> str:
        parts: list[str] = scope["path"].split("/")
        if len(parts) == 5:
            return parts[3]
        given = parse_qs(scope["query_string"].decode("latin-1")).get("download_id", [])
        if len(given) != 1:
            fail(ErrorCode.INVALID_REQUEST, "download_id: one is required", param="download_id")
        return str(given[0])

    async def _to_agent(self, scope: Scope, receive: Receive, send: Send, node: str, target: str) -> None:
        address: Address = self._o.registry.reachable(node).address
        added = [(b"x-arriero-node", node.encode())]
        await self._o.proxy(
            scope, receive, send, address=address, target=target, added=added, codes=AGENT_CODES
        )


def _query(scope: Scope) -> str:
    query = scope.get("query_string", b"").decode("latin-1")
    return f"?{query}" if query else ""


async def send_json(send: Send, status: int, value: object, *headers: tuple[bytes, bytes]) -> None:
    """Answer with a JSON document."""
    body = msgspec.json.encode(value)
    length = (b"content-length", str(len(body)).encode())
    all_headers = [(b"content-type", b"application/json"), length, *headers]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})
