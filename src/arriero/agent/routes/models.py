"""Which routes does an agent have for its models and their downloads?"""

from collections.abc import AsyncGenerator
from typing import Any, cast

import msgspec
from litestar import Request, delete, get, post
from litestar.params import FromPath, FromQuery
from litestar.types import ASGIApp, ControllerRouterHandler

from arriero.agent.catalog import ModelCatalog
from arriero.agent.provisioner import ModelProvisioner
from arriero.agent.routes.model_files import file_answer
from arriero.contracts.errors import from_body
from arriero.contracts.records import DownloadList, DownloadRecord, ModelList, ModelRecord
from arriero.contracts.requests import DownloadBody
from arriero.runtime import sse
from arriero.runtime.asgi import BEAT_S, SseResponse
from arriero.runtime.litestar_app import decode_body


class DownloadAccepted(msgspec.Struct, frozen=True):
    """The answer of `POST /v1/models/download`."""

    download_id: str
    progress_url: str


def model_routes(
    provisioner: ModelProvisioner, catalog: ModelCatalog, *, beat_s: float = BEAT_S
) -> list[ControllerRouterHandler]:
    """Return the handlers; `provisioner` is entered by the caller and outlives them."""
    return [*_catalog_routes(catalog), *_download_routes(provisioner, beat_s)]


def _catalog_routes(catalog: ModelCatalog) -> list[ControllerRouterHandler]:
    @get("/v1/models")
    async def list_models() -> ModelList:
        """Return the catalog."""
        return ModelList(await catalog.records())

    @delete("/v1/models/{model_id:str}")
    async def remove_model(model_id: FromPath[str]) -> None:
        """Remove a model, and its files where they are ours."""
        await catalog.remove(model_id)

    @post("/v1/models/{model_id:str}/verify", status_code=200)
    async def verify_model(model_id: FromPath[str]) -> ModelRecord:
        """Read a model's files again and compare their checksums."""
        return await catalog.verify(model_id)

    @get("/v1/models/{model_id:str}/files/{name:str}")
    async def model_file(
        request: Request[Any, Any, Any], model_id: FromPath[str], name: FromPath[str]
    ) -> ASGIApp:
        """Return a model's file; ranges are honoured."""
        return file_answer(await catalog.by_id(model_id), name, request.headers)

    return [list_models, remove_model, verify_model, model_file]


def _download_routes(provisioner: ModelProvisioner, beat_s: float) -> list[ControllerRouterHandler]:
    @post("/v1/models/download", status_code=202)
    async def start_download(request: Request[Any, Any, Any]) -> DownloadAccepted:
        """Begin to fetch a model (202), or join the download that runs."""
        body: DownloadBody = await decode_body(request, DownloadBody)
        record = provisioner.start(body.model_ref)
        url = f"/v1/models/download/progress?download_id={record.download_id}"
        return DownloadAccepted(record.download_id, url)

    @get("/v1/models/download/progress")
    async def download_progress(download_id: FromQuery[str]) -> ASGIApp:
        """Follow a download (`download_id`) as events."""
        provisioner.record(download_id)
        return cast("ASGIApp", SseResponse(_progress(provisioner, download_id), beat_s=beat_s))

    @get("/v1/downloads")
    async def list_downloads() -> DownloadList:
        """Return the downloads, running and ended."""
        return DownloadList(provisioner.records())

    @delete("/v1/downloads/{download_id:str}", status_code=200)
    async def cancel_download(download_id: FromPath[str]) -> DownloadRecord:
        """Cancel a download."""
        return await provisioner.cancel(download_id)

    return [start_download, download_progress, list_downloads, cancel_download]


async def _progress(provisioner: ModelProvisioner, download_id: str) -> AsyncGenerator[bytes, None]:
    """Yield a download's events.  `Last-Event-ID` is not looked at: the present state says it all."""
    event_id = 0
    frames = provisioner.frames(download_id)
    try:
        async for frame in frames:
            event_id += 1
            yield sse.encode(msgspec.json.encode(frame), event_id)
    finally:
        await frames.aclose()
    error = provisioner.record(download_id).error
    if error is not None:
        raise from_body(error)
    yield sse.encode(sse.DONE, event_id + 1)
