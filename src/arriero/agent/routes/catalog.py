"""Which routes does an agent have for the models it has?  (`ModelCatalog`)"""

import asyncio
from typing import Annotated, Any

from litestar import Request, delete, get, post, put
from litestar.params import FromPath, QueryParameter
from litestar.types import ASGIApp, ControllerRouterHandler

from arriero.agent.catalog import ModelCatalog
from arriero.agent.estimates import Estimates
from arriero.agent.pruning import InUse, refuse_if_in_use
from arriero.agent.routes.model_files import file_answer
from arriero.agent.routes.watched import Tell, watched
from arriero.contracts.records import ModelEstimate, ModelList, ModelRecord
from arriero.contracts.requests import PinBody
from arriero.runtime.asgi import BEAT_S
from arriero.runtime.litestar_app import decode_body

#: As a spawn takes them.
ContextTokens = Annotated[int | None, QueryParameter(ge=64, le=1_048_576)]
Slots = Annotated[int | None, QueryParameter(ge=1, le=64)]


def catalog_routes(
    catalog: ModelCatalog,
    in_use: InUse = set,
    *,
    stop: asyncio.Event | None = None,
    beat_s: float = BEAT_S,
) -> list[ControllerRouterHandler]:
    """Return the handlers; `in_use` tells which models workers have, streams end when `stop` is set."""

    @get("/v1/models")
    async def list_models() -> ModelList:
        """Return the catalog."""
        return ModelList(await catalog.records(), catalog.notices)

    @get("/v1/models/{model_id:str}")
    async def one_model(model_id: FromPath[str]) -> ModelRecord:
        """Return one model."""
        return (await catalog.by_id(model_id)).record

    @put("/v1/models/{model_id:str}/pin")
    async def pin_model(request: Request[Any, Any, Any], model_id: FromPath[str]) -> ModelRecord:
        """Say whether a model may be pruned."""
        body: PinBody = await decode_body(request, PinBody)
        return await catalog.set_pinned(model_id, body.is_pinned)

    @delete("/v1/models/{model_id:str}")
    async def remove_model(model_id: FromPath[str]) -> None:
        """Remove a model, and its files where they are ours; refused (409) while a worker has it."""
        entry = await catalog.by_id(model_id)
        refuse_if_in_use(entry.record, in_use)
        await catalog.remove(model_id)

    @post("/v1/models/{model_id:str}/verify", status_code=200)
    async def verify_model(request: Request[Any, Any, Any], model_id: FromPath[str]) -> ASGIApp:
        """Read a model's files again and compare their checksums; followed as events where asked for."""
        record = (await catalog.by_id(model_id)).record

        async def verify(tell: Tell) -> ModelRecord:
            return await catalog.verify(
                model_id, lambda read: tell(record.model_ref, read, record.size_bytes)
            )

        return await watched(request, verify, stop=stop, beat_s=beat_s)

    @get("/v1/models/{model_id:str}/files/{name:str}")
    async def model_file(
        request: Request[Any, Any, Any], model_id: FromPath[str], name: FromPath[str]
    ) -> ASGIApp:
        """Return a model's file; ranges are honoured."""
        return file_answer(await catalog.by_id(model_id), name, request.headers)

    return [list_models, one_model, pin_model, remove_model, verify_model, model_file]


def estimate_routes(catalog: ModelCatalog, estimates: Estimates) -> list[ControllerRouterHandler]:
    """Return the handler that tells what a model needs here."""

    @get("/v1/models/{model_id:str}/estimate")
    async def estimate_model(
        model_id: FromPath[str], context_tokens: ContextTokens = None, slots: Slots = None
    ) -> ModelEstimate:
        """Return what a model needs on each device, and whether it fits now (`context_tokens`, `slots`)."""
        entry = await catalog.by_id(model_id)
        return await estimates.of(entry, context_tokens=context_tokens, slots=slots)

    return [estimate_model]
