"""What does the native inference API take and answer?"""

from typing import Any, Final

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import InferenceBody, Sampling, TokenizeAnswer, TokenizeBody
from arriero.engines.base import EngineRequest
from arriero.runtime.asgi import AsgiApp
from arriero.worker.core import Core
from arriero.worker.generation import Generation
from arriero.worker.render import NativeAnswer, NativeStream
from arriero.worker.web import Handler, Plain, Request, convert, json_answer

#: A stream says `started` after so long at the latest, also while the engine has said nothing.
_STARTED_AFTER_S: Final = 1.0


class InferenceRoutes:
    """Handlers over one worker."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def table(self) -> dict[tuple[str, str], Handler]:
        """Return the routes."""
        return {
            ("POST", "/v1/inference"): self.answer,
            ("POST", "/v1/inference/stream"): self.stream,
            ("GET", "/v1/inference/stream"): self.stream_by_query,
            ("DELETE", "/v1/inference/"): self.cancel,
            ("POST", "/v1/tokenize"): self.tokenize,
        }

    async def answer(self, request: Request) -> AsgiApp:
        """Generate, and answer when all is there."""
        return self._generation(request, await request.decode(InferenceBody), is_stream=False)

    async def stream(self, request: Request) -> AsgiApp:
        """Generate, token by token."""
        return self._generation(request, await request.decode(InferenceBody), is_stream=True)

    async def stream_by_query(self, request: Request) -> AsgiApp:
        """Generate for a browser's EventSource.

        One that comes back with `Last-Event-ID` has lost its stream: it is told that it is over, and
        nothing is generated a second time.
        """
        if request.header(b"last-event-id"):
            return Plain(204)
        return self._generation(request, convert(_of_query(request), InferenceBody), is_stream=True)

    async def cancel(self, request: Request) -> AsgiApp:
        """End a request; its slot is free when this is answered.  The same for one that is not there."""
        request_id = request.path.rpartition("/")[2]
        error = ArrieroError(ErrorCode.REQUEST_CANCELLED, "the request was cancelled by DELETE")
        await self._core.flights.cancel(request_id, error)
        return Plain(204)

    async def tokenize(self, request: Request) -> AsgiApp:
        """Answer the token ids of a text, or of messages put through the chat template."""
        body = await request.decode(TokenizeBody)
        if (body.text is None) == (body.messages is None):
            raise ArrieroError(
                ErrorCode.INVALID_REQUEST, "give exactly one of text and messages", param="text"
            )
        self._core.lifecycle.check_takes_requests()
        engine = self._core.host.engine
        text = body.text
        if text is None:
            text = await engine.apply_template(body.messages or (), {})
        ids = await engine.tokenize(text, add_special=body.add_special)
        return json_answer(TokenizeAnswer(token_ids=ids, text=text))

    def _generation(self, request: Request, body: InferenceBody, *, is_stream: bool) -> Generation:
        given = [name for name in ("prompt", "prompt_ids", "messages") if getattr(body, name) is not None]
        if len(given) != 1:
            raise ArrieroError(
                ErrorCode.INVALID_REQUEST,
                f"give exactly one of prompt, prompt_ids and messages; given: {', '.join(given) or 'none'}",
                param=given[-1] if given else "prompt",
            )
        engine_request = EngineRequest(
            request_id=request.request_id,
            prompt=body.prompt,
            prompt_ids=body.prompt_ids,
            messages=body.messages,
            sampling=_sampling(body),
        )
        renderer = NativeStream(request.request_id) if is_stream else NativeAnswer(request.request_id)
        return Generation(
            self._core,
            request,
            [engine_request],
            renderer,
            timeout_s=body.timeout,
            may_queue=body.queue,
            head_after_s=_STARTED_AFTER_S,
            is_raw=True,
        )


def _sampling(body: InferenceBody) -> Sampling:
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return Sampling(
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        seed=body.seed,
        stop=stop,
        top_p=body.top_p,
        top_k=body.top_k,
        ignore_eos=body.ignore_eos,
    )


def _of_query(request: Request) -> dict[str, Any]:
    """Return the query as a body: `stop` may come several times, `prompt_ids` has commas."""
    values: dict[str, Any] = {}
    for name, value in request.query():
        if name == "prompt_ids":
            values.setdefault(name, []).extend(value.split(","))
        elif name == "stop":
            values.setdefault(name, []).append(value)
        elif name in values:
            raise ArrieroError(ErrorCode.INVALID_REQUEST, f"{name[:40]} is given twice", param=name[:40])
        else:
            values[name] = value
    return values
