"""What do the OpenAI routes of a worker take and answer?"""

from typing import Any

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines.base import EngineRequest
from arriero.runtime.asgi import AsgiApp
from arriero.worker.core import Core
from arriero.worker.embedding import EmbeddingAnswer
from arriero.worker.generation import Generation
from arriero.worker.openai_bodies import ChatBody, CompletionBody, EmbeddingsBody
from arriero.worker.openai_render import ChatAnswer, ChatStream, CompletionAnswer, CompletionStream
from arriero.worker.render import Renderer
from arriero.worker.tool_choice import ForcedCall
from arriero.worker.web import Handler, Request


class OpenAiRoutes:
    """Handlers over one worker."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def table(self) -> dict[tuple[str, str], Handler]:
        """Return the routes."""
        return {
            ("POST", "/v1/chat/completions"): self.chat,
            ("POST", "/v1/completions"): self.completions,
            ("POST", "/v1/embeddings"): self.embeddings,
        }

    async def chat(self, request: Request) -> AsgiApp:
        """Answer a conversation."""
        body = await request.decode(ChatBody)
        asked, forced = body.request(request.request_id, self._core.host.engine.abilities)
        head = self._head("chatcmpl", request)
        call = None if forced is None else ForcedCall(f"call_{self._make_id()}")
        renderer: Renderer = ChatAnswer(head, make_id=self._make_id, forced=call)
        if body.stream:
            renderer = ChatStream(head, include_usage=body.wants_usage, make_id=self._make_id, forced=call)
        return self._generation(request, body, [asked], renderer)

    async def completions(self, request: Request) -> AsgiApp:
        """Go on with a text, or with several one after the other."""
        body = await request.decode(CompletionBody)
        asked = body.requests(request.request_id)
        head = self._head("cmpl", request)
        renderer: Renderer = CompletionAnswer(head)
        if body.stream:
            renderer = CompletionStream(head, include_usage=body.wants_usage)
        return self._generation(request, body, asked, renderer)

    async def embeddings(self, request: Request) -> AsgiApp:
        """Answer a vector for each input."""
        body = await request.decode(EmbeddingsBody)
        abilities = self._core.host.engine.abilities
        if not abilities.embeddings:
            raise ArrieroError(ErrorCode.INVALID_REQUEST, "this engine makes no embeddings", param="model")
        return EmbeddingAnswer(self._core, request, body)

    def _generation(
        self,
        request: Request,
        body: ChatBody | CompletionBody,
        asked: list[EngineRequest],
        renderer: Renderer,
    ) -> Generation:
        return Generation(
            self._core,
            request,
            asked,
            renderer,
            timeout_s=body.timeout,
            may_queue=body.queue is not False,
        )

    def _head(self, prefix: str, request: Request) -> dict[str, Any]:
        return {
            "id": f"{prefix}-{request.request_id}",
            "object": "",
            "created": int(self._core.clock.wall_s()),
            "model": self._core.spec.model_ref,
            "system_fingerprint": self._core.fingerprint,
        }

    def _make_id(self) -> str:
        return self._core.entropy.hex(24)
