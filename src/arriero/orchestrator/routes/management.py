"""Which questions of management does the orchestrator answer?"""

from typing import Annotated, Any, TypeAlias
from urllib.parse import quote, unquote

import msgspec
from litestar import Request, Response, delete, get, post
from litestar.params import FromPath, FromQuery, QueryParameter
from litestar.types import ControllerRouterHandler

from arriero.contracts import refs
from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.placements import PlacementExplained
from arriero.contracts.records import (
    DownloadList,
    DownloadRecord,
    Health,
    TaskRecord,
    WorkerList,
    WorkerRecord,
)
from arriero.contracts.requests import DownloadBody, SpawnBody, SpawnOnNode, TaskBody
from arriero.contracts.states import DownloadState
from arriero.contracts.version import API_VERSION, __version__
from arriero.domain.placement import Wants, labels_of
from arriero.orchestrator import metrics
from arriero.orchestrator.core import Orchestrator
from arriero.orchestrator.routes.nodes import node_routes
from arriero.runtime import bodies

#: `all=1` in a query.
All: TypeAlias = Annotated[int, QueryParameter(name="all")]
Asked: TypeAlias = Request[Any, Any, Any]


class OpenAiModel(msgspec.Struct, frozen=True, kw_only=True):
    """One row of OpenAI's list of models."""

    id: str
    created: int
    object: str = "model"
    owned_by: str = "arriero"


class OpenAiModels(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's list of models."""

    data: list[OpenAiModel]
    object: str = "list"


class DownloadAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/downloads`: 202."""

    download_id: str
    progress_url: str
    node: str
    #: Whoever asked leaves with `DELETE /v1/downloads/ID?holder=…`; the last one to leave cancels.
    holder: str


def handlers(o: Orchestrator) -> list[ControllerRouterHandler]:
    """Return the routes of management."""
    return [
        *_health_routes(o),
        *node_routes(o),
        *_placement_routes(o),
        *_worker_routes(o),
        *_download_routes(o),
        *_model_routes(o),
        *_task_routes(o),
    ]


def _health_routes(o: Orchestrator) -> list[ControllerRouterHandler]:
    @get("/health")
    async def health() -> Health:
        """Say that it lives."""
        import os

        return Health(status="alive", version=__version__, api_version=API_VERSION, pid=os.getpid())

    @get("/ready")
    async def ready() -> dict[str, Any]:
        """Say whether any node takes work; 503 if none does."""
        nodes = {node.name: str(node.state) for node in o.registry.nodes()}
        if not o.registry.is_ready():
            fail(ErrorCode.NODE_UNREACHABLE, "no node is ready: is an agent running?", nodes=nodes)
        return {"ready": True, "nodes": nodes}

    @get("/metrics", media_type="text/plain; version=0.0.4")
    async def scrape() -> bytes:
        """Return the counters in Prometheus' text form."""
        return metrics.exposition(o)

    return [health, ready, scrape]


def _placement_routes(o: Orchestrator) -> list[ControllerRouterHandler]:
    @post("/v1/placements:explain", status_code=200)
    async def explain(request: Asked) -> PlacementExplained:
        """Say where a request would go now, and why nowhere else."""
        body = bodies.decode(await request.body(), TaskBody)
        model = body.model or o.settings.default_model
        refs.parse(model)
        wants = Wants(model, body.node, body.backend, body.device, labels=labels_of(body.labels))
        return o.explain(wants)

    return [explain]


def _worker_routes(o: Orchestrator) -> list[ControllerRouterHandler]:
    @get("/v1/workers")
    async def list_workers(
        model_ref: FromQuery[str | None] = None, node: FromQuery[str | None] = None, with_ended: All = 0
    ) -> WorkerList:
        """Return the live workers; with `all=1` also those that ended lately."""
        live = o.registry.workers.select(model_ref=model_ref, node=node)
        ended = [
            record
            for record in (o.registry.ended() if with_ended else [])
            if model_ref in (None, record.model_ref) and node in (None, record.node)
        ]
        return WorkerList([o.registry.public(record) for record in [*ended, *live]])

    @post("/v1/workers", status_code=202)
    async def spawn(request: Asked, node: FromQuery[str | None] = None) -> WorkerRecord:
        """Start a worker, where idle ones make room if there is none; it comes back `starting`."""
        asked = bodies.decode(await request.body(), SpawnOnNode)
        body = SpawnBody(**{name: getattr(asked, name) for name in SpawnBody.__struct_fields__})
        on_node, labels = node or asked.node, labels_of(asked.labels)
        await o.scheduler.joined(on_node, labels)
        record = await o.provisioner.spawn(body, on_node, labels)
        return o.registry.public(record)

    @get("/v1/workers/{worker_id:str}")
    async def get_worker(worker_id: FromPath[str]) -> WorkerRecord:
        """Return one worker, also one that ended lately."""
        return o.registry.public(o.registry.worker(worker_id))

    @delete("/v1/workers/{worker_id:str}", status_code=202)
    async def stop_worker(
        worker_id: FromPath[str], force: FromQuery[bool] = False
    ) -> Response[WorkerRecord | None]:
        """Begin to stop a worker, gracefully unless `force`; 204 for one that ended."""
        record = o.registry.worker(worker_id)
        if record.worker_id not in o.registry.workers:
            return Response(None, status_code=204)
        node = o.registry.reachable(record.node)
        path = f"/v1/workers/{worker_id}" + ("?force=true" if force else "")
        await node.peer.call("DELETE", path)
        return Response(o.registry.public(record), status_code=202)

    return [list_workers, spawn, get_worker, stop_worker]


def _download_routes(o: Orchestrator) -> list[ControllerRouterHandler]:
    @get("/v1/downloads")
    async def list_downloads() -> DownloadList:
        """Return the downloads of the pool."""
        return DownloadList([download for _, download in o.registry.downloads()])

    @post("/v1/downloads", status_code=202)
    async def start_download(request: Asked) -> DownloadAccepted:
        """Begin to fetch a model onto a node."""
        body = bodies.decode(await request.body(), DownloadBody)
        refs.parse(body.model_ref)
        await o.scheduler.joined(body.node)
        node = o.node_for_download(Wants(body.model_ref, body.node))
        started = await o.provisioner.start_download(node, body.model_ref, peers=body.peers, clean=body.clean)
        # Known at once, whichever comes first: the next request or the agent's event.
        node.downloads.setdefault(
            started.download_id,
            _queued(started.download_id, body.model_ref, node.name, o.clock.wall_s()),
        )
        return DownloadAccepted(
            download_id=started.download_id,
            progress_url=f"/v1/downloads/progress?download_id={started.download_id}",
            node=node.name,
            holder=started.holder,
        )

    @get("/v1/downloads/{download_id:str}")
    async def get_download(download_id: FromPath[str]) -> DownloadRecord:
        """Return one download."""
        return o.node_of_download(download_id).downloads[download_id]

    @delete("/v1/downloads/{download_id:str}", status_code=200)
    async def leave_download(
        download_id: FromPath[str], holder: FromQuery[str | None] = None
    ) -> DownloadRecord:
        """Leave a download, as the `holder` that asked for it; the last one to leave cancels it."""
        node = o.registry.reachable(o.node_of_download(download_id).name)
        path = f"/v1/downloads/{download_id}" + (f"?holder={quote(holder, safe='')}" if holder else "")
        record = await node.peer.call("DELETE", path, answer=DownloadRecord)
        return msgspec.structs.replace(record, node=node.name)

    return [list_downloads, start_download, get_download, leave_download]


def _queued(download_id: str, model_ref: str, node: str, started_unix: float) -> DownloadRecord:
    return DownloadRecord(
        download_id=download_id,
        model_ref=model_ref,
        state=DownloadState.QUEUED,
        bytes_downloaded=0,
        bytes_total=None,
        started_unix=started_unix,
        node=node,
        holders=1,
    )


def _model_routes(o: Orchestrator) -> list[ControllerRouterHandler]:
    @get("/v1/models")
    async def list_models() -> OpenAiModels:
        """Return the models that can be asked for without a download, in OpenAI's shape."""
        return OpenAiModels(data=list(_models(o).values()))

    @get("/v1/models/{model:path}")
    async def get_model(request: Asked, model: FromPath[str]) -> OpenAiModel:
        """Return one model."""
        # The framework folds `//` into `/`: the reference is in the path as it came.
        raw: bytes = request.scope.get("raw_path") or model.encode()
        name = unquote(raw.decode("latin-1").partition("?")[0].removeprefix("/v1/models/"))
        found = _models(o).get(name)
        if found is None:
            raise ArrieroError(
                ErrorCode.MODEL_NOT_FOUND, f"no model {name[:200]!r}", param="model", model=name[:200]
            )
        return found

    return [list_models, get_model]


def _models(o: Orchestrator) -> dict[str, OpenAiModel]:
    found = {"demo": OpenAiModel(id="demo", created=0)}
    for record in o.registry.workers:
        found[record.model_ref] = OpenAiModel(id=record.model_ref, created=int(record.started_unix))
    for model in o.registry.views.models():
        found[model.model_ref] = OpenAiModel(id=model.model_ref, created=int(model.added_unix))
    return dict(sorted(found.items()))


def _task_routes(o: Orchestrator) -> list[ControllerRouterHandler]:
    @get("/v1/tasks/{task_id:str}")
    async def get_task(task_id: FromPath[str]) -> TaskRecord:
        """Return a task with its text so far."""
        return await o.tasks.record(task_id)

    @delete("/v1/tasks/{task_id:str}", status_code=204)
    async def cancel_task(task_id: FromPath[str]) -> None:
        """Cancel a task; nothing happens to one that is over."""
        await o.tasks.cancel(task_id)

    @get("/openapi.json")
    async def openapi(request: Asked) -> Response[bytes]:
        """Return the description of all routes."""
        from arriero.orchestrator.routes.schema import document

        return Response(document(request.app), media_type="application/json")

    return [get_task, cancel_task, openapi]
