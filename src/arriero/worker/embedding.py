"""How do an engine's vectors come to their client?"""

import base64
import struct
from collections.abc import Sequence
from typing import Any

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines.base import EngineRequest
from arriero.runtime.asgi import Send
from arriero.worker.admitted import AdmittedRequest
from arriero.worker.core import Core
from arriero.worker.flights import Flight
from arriero.worker.openai_bodies import EmbeddingsBody
from arriero.worker.render import encode
from arriero.worker.web import Request


class EmbeddingAnswer(AdmittedRequest):
    """Answers with a vector for each input."""

    def __init__(self, core: Core, request: Request, body: EmbeddingsBody) -> None:
        super().__init__(
            core, request, is_stream=False, timeout_s=body.timeout, may_queue=body.queue is not False
        )
        self._inputs: list[str | list[int]] = body.inputs()
        self._is_base64 = body.encoding_format == "base64"
        self._dimensions = body.dimensions
        self._vectors: list[list[float]] = []
        self._prompt_tokens = 0

    async def check(self) -> None:
        """Raise CONTEXT_LENGTH_EXCEEDED if an input does not fit."""
        for given in self._inputs:
            text, ids = (given, None) if isinstance(given, str) else (None, given)
            await self._core.check_fits(EngineRequest(request_id="", prompt=text, prompt_ids=ids))

    async def compute(self, flight: Flight, send: Send) -> None:
        """Embed, a few inputs at a time: a request that is cancelled leaves no long work behind."""
        at_once = self._core.slots.total
        for start in range(0, len(self._inputs), at_once):
            some: Sequence[str | list[int]] = self._inputs[start : start + at_once]
            vectors, tokens = await self._core.host.engine.embed(some)
            flight.heard_s = self._core.now_s()
            self._vectors += vectors
            self._prompt_tokens += tokens
            self._core.metrics.prompt_tokens += tokens
            self._check_dimensions(len(vectors[0]))

    def _check_dimensions(self, given: int) -> None:
        if self._dimensions not in (None, given):
            raise ArrieroError(
                ErrorCode.INVALID_REQUEST,
                f"dimensions is {self._dimensions}; this model's vectors have {given} and are not shortened",
                param="dimensions",
                limit=given,
            )

    def closing(self, duration_ms: int) -> bytes:
        """Return the body."""
        entries: list[dict[str, Any]] = [
            {"object": "embedding", "index": index, "embedding": self._shape(vector)}
            for index, vector in enumerate(self._vectors)
        ]
        usage = {"prompt_tokens": self._prompt_tokens, "total_tokens": self._prompt_tokens}
        return encode({"object": "list", "data": entries, "model": self._core.spec.model_ref, "usage": usage})

    def _shape(self, vector: list[float]) -> list[float] | str:
        if not self._is_base64:
            return vector
        # OpenAI's form: 32-bit floats, little-endian.
        return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
