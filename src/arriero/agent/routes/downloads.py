"""Which routes does an agent have for downloads?  (`ModelProvisioner`)"""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import msgspec
from litestar import Request, delete, get, post, put
from litestar.params import FromPath, FromQuery
from litestar.types import ASGIApp, ControllerRouterHandler

from arriero.agent.catalog import ModelCatalog
from arriero.agent.provisioner import ModelProvisioner
from arriero.agent.routes.watched import watched
from arriero.agent.scanning import scan
from arriero.contracts.errors import from_body
from arriero.contracts.records import DownloadList, DownloadRecord
from arriero.contracts.requests import DownloadBody, PeersBody, ScanBody
from arriero.runtime import sse
from arriero.runtime.asgi import BEAT_S, SseResponse
from arriero.runtime.litestar_app import decode_body


class DownloadAccepted(msgspec.Struct, frozen=True):
    """The answer of `POST /v1/models/download`."""

    download_id: str
    progress_url: str
    #: Whoever asked leaves with `DELETE /v1/downloads/ID?holder=…`; the last one to leave cancels.
    holder: str


def download_routes(
    provisioner: ModelProvisioner,
    catalog: ModelCatalog,
    *,
    stop: asyncio.Event | None = None,
    beat_s: float = BEAT_S,
) -> list[ControllerRouterHandler]:
    """Return the handlers; `provisioner` is entered by the caller and outlives them."""

    @post("/v1/models/scan", status_code=200)
    async def scan_models(request: Request[Any, Any, Any]) -> ASGIApp:
        """Enter the models that other programs keep here; followed as events where asked for."""
        body: ScanBody = await decode_body(request, ScanBody)
        return await watched(
            request,
            lambda tell: scan(provisioner, catalog, tell, is_dry_run=body.dry_run),
            stop=stop,
            beat_s=beat_s,
        )

    @post("/v1/models/download", status_code=202)
    async def start_download(request: Request[Any, Any, Any]) -> DownloadAccepted:
        """Begin to fetch a model (202), or join the download that runs."""
        body: DownloadBody = await decode_body(request, DownloadBody)
        ticket = provisioner.start(body.model_ref, peers=body.peers, clean=body.clean)
        url = f"/v1/models/download/progress?download_id={ticket.download_id}"
        return DownloadAccepted(ticket.download_id, url, ticket.holder)

    @get("/v1/models/download/progress")
    async def download_progress(request: Request[Any, Any, Any], download_id: FromQuery[str]) -> ASGIApp:
        """Follow a download (`download_id`) as events, after the frame that `Last-Event-ID` names."""
        provisioner.record(download_id)
        after = _seen_before(request.headers.get("last-event-id", ""))
        return cast("ASGIApp", SseResponse(_progress(provisioner, download_id, after), beat_s=beat_s))

    @get("/v1/downloads")
    async def list_downloads() -> DownloadList:
        """Return the downloads, running and ended."""
        return DownloadList(provisioner.records())

    @get("/v1/downloads/{download_id:str}")
    async def get_download(download_id: FromPath[str]) -> DownloadRecord:
        """Return one download."""
        return provisioner.record(download_id)

    @put("/v1/downloads/{download_id:str}/peers")
    async def tell_peers(request: Request[Any, Any, Any], download_id: FromPath[str]) -> DownloadRecord:
        """Tell a download where other agents are by now."""
        body: PeersBody = await decode_body(request, PeersBody)
        return provisioner.tell_peers(download_id, body.peers)

    @delete("/v1/downloads/{download_id:str}", status_code=200)
    async def leave_download(
        download_id: FromPath[str], holder: FromQuery[str | None] = None
    ) -> DownloadRecord:
        """Leave a download, as the `holder` that asked for it; the last one to leave cancels it."""
        return await provisioner.cancel(download_id, holder)

    return [
        scan_models, start_download, download_progress, list_downloads, get_download, tell_peers,
        leave_download,
    ]  # fmt: skip


def _seen_before(header: str) -> int:
    """Return the number in a `Last-Event-ID`; 0, which is everything, for what is none of ours."""
    return int(header) if header.isascii() and header.isdigit() and len(header) <= 18 else 0


async def _progress(
    provisioner: ModelProvisioner, download_id: str, after: int
) -> AsyncGenerator[bytes, None]:
    """Yield a download's events: the present state first, unless it was seen, then each change."""
    frames = provisioner.frames(download_id, after)
    number = after
    try:
        async for number, frame in frames:
            yield sse.encode(msgspec.json.encode(frame), number)
    finally:
        await frames.aclose()
    error = provisioner.record(download_id).error
    if error is not None:
        raise from_body(error)
    yield sse.encode(sse.DONE, number + 1)
