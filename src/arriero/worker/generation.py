"""How do an engine's tokens come to their client?

The token path: per token one event from the engine, one rendering, one send.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines.base import EngineRequest, StreamFinished
from arriero.runtime.asgi import BEAT_S, Send
from arriero.worker.admitted import AdmittedRequest
from arriero.worker.core import Core
from arriero.worker.flights import Flight
from arriero.worker.render import Renderer, tokens_of
from arriero.worker.web import Request

#: An engine has so long to let go of a stream that we close.
_CLOSE_S: Final = 10.0


class Generation(AdmittedRequest):
    """Answers with what the engine generates, for one prompt or for several one after the other."""

    def __init__(
        self,
        core: Core,
        request: Request,
        asked: Sequence[EngineRequest],
        renderer: Renderer,
        *,
        timeout_s: float | None = None,
        may_queue: bool = True,
        head_after_s: float = BEAT_S,
        is_raw: bool = False,
    ) -> None:
        super().__init__(
            core,
            request,
            is_stream=renderer.is_stream,
            timeout_s=timeout_s,
            may_queue=may_queue,
            head_after_s=head_after_s,
        )
        self._asked = list(asked)
        #: Messages are put through the template here, and what it makes is a plain prompt: token by
        #: token, ids and all.
        self._is_raw = is_raw
        self._renderer = renderer
        self._has_token = False

    def opening(self) -> bytes:
        """Return a stream's first frame."""
        return self._renderer.opening()

    def queued(self, position: int) -> bytes:
        """Return what a stream says when the place in the queue has changed."""
        return self._renderer.queued(position)

    def closing(self, duration_ms: int) -> bytes:
        """Return the stream's last frames, or the whole body."""
        return self._renderer.closing(duration_ms)

    async def check(self) -> None:
        """Raise INVALID_REQUEST if the model does not generate, CONTEXT_LENGTH_EXCEEDED for a long prompt."""
        if not self._core.host.engine.abilities.chat:
            raise ArrieroError(
                ErrorCode.INVALID_REQUEST, "this model makes embeddings alone; it does not generate"
            )
        for number, asked in enumerate(self._asked):
            if self._is_raw and asked.messages is not None:
                prompt = await self._core.host.engine.apply_template(asked.messages, {})
                asked = self._asked[number] = dataclasses.replace(asked, prompt=prompt, messages=None)
            await self._core.check_fits(asked)

    async def compute(self, flight: Flight, send: Send) -> None:
        """Generate.  The engine has let go of it when this returns or raises."""
        for asked in self._asked:
            await self._generate(asked, flight, send)

    async def _generate(self, asked: EngineRequest, flight: Flight, send: Send) -> None:
        renderer, metrics, is_stream = self._renderer, self._core.metrics, self._is_stream
        now_s = asyncio.get_running_loop().time
        events = self._core.host.engine.stream(asked)
        tokens = 0
        first_s: float | None = None
        try:
            async for event in events:
                flight.heard_s = now_s()
                if is_stream and not self._is_started:
                    await self._start(send)
                if frame := renderer.event(event):
                    await self._send(send, frame)
                if isinstance(event, StreamFinished):
                    metrics.prompt_tokens += event.prompt_tokens
                    tokens = event.completion_tokens
                elif brought := tokens_of(event):
                    if not self._has_token:
                        self._has_token = True
                        metrics.first_token_s.observe(flight.heard_s - self._arrived_s)
                    if first_s is None:
                        first_s = flight.heard_s
                    tokens += brought
            if first_s is not None:
                # From the first token on: neither the queue nor the prompt counts.
                metrics.speed.finished(tokens=tokens - 1, seconds=flight.heard_s - first_s)
        finally:
            metrics.completion_tokens += tokens
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S):
                    await events.aclose()
