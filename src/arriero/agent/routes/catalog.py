"""Which routes does an agent have for the models it has?  (`ModelCatalog`)"""

from typing import Any

from litestar import Request, delete, get, post
from litestar.params import FromPath
from litestar.types import ASGIApp, ControllerRouterHandler

from arriero.agent.catalog import ModelCatalog
from arriero.agent.routes.model_files import file_answer
from arriero.contracts.records import ModelList, ModelRecord


def catalog_routes(catalog: ModelCatalog) -> list[ControllerRouterHandler]:
    """Return the handlers."""

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
