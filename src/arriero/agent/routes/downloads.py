"""Which routes does an agent have for downloads?  (`ModelProvisioner`)"""

from collections.abc import AsyncGenerator
from typing import Any, cast

import msgspec
from litestar import Request, delete, get, post
from litestar.params import FromPath, FromQuery
from litestar.types import ASGIApp, ControllerRouterHandler

from arriero.agent.provisioner import ModelProvisioner
from arriero.contracts.errors import from_body
from arriero.contracts.records import DownloadList, DownloadRecord
from arriero.contracts.requests import DownloadBody
from arriero.runtime import sse
from arriero.runtime.asgi import BEAT_S, SseResponse
from arriero.runtime.litestar_app import decode_body


class DownloadAccepted(msgspec.Struct, frozen=True):
    """The answer of `POST /v1/models/download`."""

    download_id: str
    progress_url: str


def download_routes(
    provisioner: ModelProvisioner, *, beat_s: float = BEAT_S
) -> list[ControllerRouterHandler]:
    """Return the handlers; `provisioner` is entered by the caller and outlives them."""

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
