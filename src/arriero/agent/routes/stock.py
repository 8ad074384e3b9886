"""Which routes does an agent have for its stock of models as a whole?  Prune, import, backup, restore."""

import asyncio
from typing import Any, Final

from litestar import Request, Response, get, post
from litestar.types import ASGIApp, ControllerRouterHandler

from arriero.agent import catalog_backup, claims
from arriero.agent.catalog import ModelCatalog
from arriero.agent.importer import Importer
from arriero.agent.pruning import InUse, prune
from arriero.agent.routes.watched import watched
from arriero.contracts.records import PruneResult
from arriero.contracts.requests import ImportBody, PruneBody
from arriero.runtime.asgi import BEAT_S
from arriero.runtime.litestar_app import decode_body

RESTORE_PATH: Final = "/v1/models/restore"
#: What the guard must let through.
BODY_LIMITS: Final = {RESTORE_PATH: catalog_backup.BYTES_MAX}
BACKUP_TYPE: Final = "application/vnd.sqlite3"


def stock_routes(
    catalog: ModelCatalog,
    importer: Importer,
    in_use: InUse,
    *,
    inspect: claims.Inspect,
    stop: asyncio.Event | None = None,
    beat_s: float = BEAT_S,
) -> list[ControllerRouterHandler]:
    """Return the handlers; streams end when `stop` is set."""

    @post("/v1/models/prune", status_code=200)
    async def prune_models(request: Request[Any, Any, Any]) -> PruneResult:
        """Remove the models used longest ago until so much is free, or all that may go are gone."""
        body: PruneBody = await decode_body(request, PruneBody)
        return await prune(catalog, in_use, free_bytes=body.free_bytes, is_dry_run=body.dry_run)

    @post("/v1/models/import", status_code=200)
    async def import_models(request: Request[Any, Any, Any]) -> ASGIApp:
        """Copy in the models of a file or folder of this machine; followed as events where asked for."""
        body: ImportBody = await decode_body(request, ImportBody)
        planned = await importer.plan(body.path, body.model_ref)
        return await watched(request, lambda tell: importer.run(planned, tell), stop=stop, beat_s=beat_s)

    @get("/v1/models/backup")
    async def backup_catalog() -> Response[bytes]:
        """Return the catalog as one SQLite file."""
        headers = {"Content-Disposition": 'attachment; filename="catalog.db"'}
        return Response(await catalog_backup.backup(catalog), media_type=BACKUP_TYPE, headers=headers)

    @post(RESTORE_PATH, status_code=200)
    async def restore_catalog(request: Request[Any, Any, Any]) -> ASGIApp:
        """Enter the models of a backup whose files are here unchanged; as events where asked for."""
        claimed = await catalog_backup.read_backup(await request.body(), catalog.models_dir)
        return await watched(
            request,
            lambda tell: catalog_backup.restore(catalog, claimed, inspect=inspect, tell=tell),
            stop=stop,
            beat_s=beat_s,
        )

    return [prune_models, import_models, backup_catalog, restore_catalog]
