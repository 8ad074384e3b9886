"""What is sent to llama.cpp for a request, and what do its streamed chunks mean?

Without I/O: requests in, bodies out; bytes of a stream in, events out.  Two dialects: `/completion`
for prompts (ids of every token) and `/v1/chat/completions` for messages (template, tools, reasoning
and schemas are llama.cpp's).

llama.cpp sends no chunk for a token that ends inside a character, so that token's id is missing;
the chunk's running count shows it.  `token_pieces` finds the id by its bytes; where even those are
unknown (a model that writes broken UTF-8), the id is UNKNOWN_ID, so that counts stay exact.
"""

from collections.abc import Iterator
from typing import Any, Final, NoReturn

import msgspec

from arriero.contracts.errors import ErrorCode, fail
from arriero.contracts.requests import Sampling
from arriero.engines.base import (
    EngineRequest,
    PromptProgress,
    ReasoningDelta,
    StreamEvent,
    StreamFinished,
    TextDelta,
    ToolCallDelta,
)
from arriero.engines.token_pieces import UNKNOWN_ID, TokenPieces

COMPLETION_PATH: Final = "/completion"
CHAT_PATH: Final = "/v1/chat/completions"

#: What of a client's options reaches llama.cpp; the rest is ours to set, or not for it.
_CHAT_OPTIONS: Final = frozenset(
    {
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "response_format",
        "json_schema",
        "grammar",
        "chat_template_kwargs",
        "reasoning_effort",
        "reasoning_format",
        "add_generation_prompt",
        "continue_final_message",
    }
)
_PROMPT_OPTIONS: Final = frozenset({"json_schema", "grammar"})
_MESSAGE_CHARS_MAX: Final = 500


# --- Requests --------------------------------------------------------------------------------


def body_of(request: EngineRequest) -> tuple[str, bytes]:
    """Return path and body of the engine's request.

    Raises INVALID_REQUEST unless exactly one of prompt, prompt_ids and messages is given.
    """
    given = [part for part in (request.prompt, request.prompt_ids, request.messages) if part is not None]
    if len(given) != 1:
        fail(ErrorCode.INVALID_REQUEST, "exactly one of prompt, prompt_ids and messages must be given")
    sampling = request.sampling
    body = _sampling(sampling)
    body |= {"stream": True, "return_progress": True, "cache_prompt": True}
    if request.messages is None:
        body |= {key: value for key, value in request.chat_options.items() if key in _PROMPT_OPTIONS}
        body["prompt"] = list(request.prompt_ids) if request.prompt_ids is not None else request.prompt
        body["return_tokens"] = True
        body["n_predict"] = -1 if sampling.max_tokens is None else sampling.max_tokens
        if sampling.logprobs is not None:
            body["n_probs"] = max(1, sampling.logprobs)
        return COMPLETION_PATH, msgspec.json.encode(body)
    body |= {key: value for key, value in request.chat_options.items() if key in _CHAT_OPTIONS}
    body["messages"] = list(request.messages)
    body["max_tokens"] = -1 if sampling.max_tokens is None else sampling.max_tokens
    body["stream_options"] = {"include_usage": True}
    if tells_chat_ids(request):
        # The running count, and ids by way of logprobs: taken after sampling they cost nothing.
        body |= {"timings_per_token": True, "logprobs": True, "top_logprobs": max(1, sampling.logprobs or 1)}
        body["post_sampling_probs"] = sampling.logprobs is None
    return CHAT_PATH, msgspec.json.encode(body)


def tells_chat_ids(request: EngineRequest) -> bool:
    """Return whether ids can be had for a chat: llama.cpp refuses logprobs beside tools."""
    return not request.chat_options.get("tools")


def _sampling(sampling: Sampling) -> dict[str, Any]:
    """Return the fields that both dialects share; what is None stays the engine's default."""
    names = (
        "temperature",
        "seed",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repeat_penalty",
    )
    body: dict[str, Any] = {name: value for name in names if (value := getattr(sampling, name)) is not None}
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.ignore_eos:
        body["ignore_eos"] = True
    if sampling.logit_bias:
        body["logit_bias"] = [
            [int(token) if token.lstrip("-").isdecimal() else token, bias]
            for token, bias in sampling.logit_bias.items()
        ]
    return body


# --- Answers ---------------------------------------------------------------------------------


class _Progress(msgspec.Struct):
    total: int = 0
    cache: int = 0
    processed: int = 0


class _Timings(msgspec.Struct):
    cache_n: int = 0
    prompt_n: int = 0
    predicted_n: int = 0


class _Failure(msgspec.Struct):
    code: int = 500
    message: str = ""
    type: str = ""
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class _Completion(msgspec.Struct):
    content: str = ""
    tokens: list[int] = []
    stop: bool = False
    tokens_predicted: int = 0
    tokens_evaluated: int = 0
    stop_type: str = ""
    stopping_word: str = ""
    prompt_progress: _Progress | None = None
    timings: _Timings | None = None
    completion_probabilities: list[dict[str, Any]] = []
    error: _Failure | None = None


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function | None = None


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Logprobs(msgspec.Struct):
    content: list[dict[str, Any]] | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _CachedTokens(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _CachedTokens | None = None


class _Chat(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    prompt_progress: _Progress | None = None
    error: _Failure | None = None


class _Refusal(msgspec.Struct):
    error: _Failure


_completion_decoder: Final = msgspec.json.Decoder(_Completion)
_chat_decoder: Final = msgspec.json.Decoder(_Chat)
_refusal_decoder: Final = msgspec.json.Decoder(_Refusal)
_FINISH: Final = {"limit": "length", "length": "length", "tool_calls": "tool_calls"}


class CompletionReader:
    """Reads a stream of `/completion`."""

    def __init__(self, request: EngineRequest, pieces: TokenPieces) -> None:
        self._logprobs_max = request.sampling.logprobs
        self._pieces = pieces
        self._told = 0
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[StreamEvent]:
        """Return the events that `data` completes; raises what an error chunk says."""
        *parts, self._rest = (self._rest + data).split(b"\n\n")
        for part in parts:
            if part.startswith(b"data: ") and part != b"data: [DONE]":
                yield from self._chunk(_completion_decoder.decode(part[6:]))

    def _chunk(self, chunk: _Completion) -> Iterator[StreamEvent]:
        if chunk.error is not None:
            fail_for(chunk.error)
        if chunk.prompt_progress is not None:
            # Such a chunk has a token of its own that means nothing.
            yield _progress(chunk.prompt_progress)
            return
        ids = tuple(chunk.tokens)
        missing = chunk.tokens_predicted - self._told - len(ids)
        if missing > 0:
            ids = self._pieces.missing_ids(chunk.content, missing, ids[0] if ids else UNKNOWN_ID) + ids
        self._told += len(ids)
        if ids or chunk.content:
            yield TextDelta(chunk.content, ids, _entries(chunk.completion_probabilities, self._logprobs_max))
        if chunk.stop:
            yield StreamFinished(
                finish_reason=_FINISH.get(chunk.stop_type, "stop"),
                prompt_tokens=chunk.tokens_evaluated,
                completion_tokens=chunk.tokens_predicted,
                cached_tokens=chunk.timings.cache_n if chunk.timings is not None else 0,
                stopping_word=chunk.stopping_word,
            )


class ChatReader:
    """Reads a stream of `/v1/chat/completions`."""

    def __init__(self, request: EngineRequest, pieces: TokenPieces) -> None:
        self._logprobs_max = request.sampling.logprobs
        self._has_ids = tells_chat_ids(request)
        self._pieces = pieces
        self._told = 0
        self._rest = b""
        self._finish_reason = ""

    def feed(self, data: bytes) -> Iterator[StreamEvent]:
        """Return the events that `data` completes; raises what an error chunk says."""
        *parts, self._rest = (self._rest + data).split(b"\n\n")
        for part in parts:
            if part.startswith(b"data: ") and part != b"data: [DONE]":
                yield from self._chunk(_chat_decoder.decode(part[6:]))

    def _chunk(self, chunk: _Chat) -> Iterator[StreamEvent]:
        if chunk.error is not None:
            fail_for(chunk.error)
        if chunk.prompt_progress is not None:
            yield _progress(chunk.prompt_progress)
            return
        for choice in chunk.choices:
            yield from self._choice(choice, chunk.timings)
        if chunk.usage is not None and self._finish_reason:
            rest = chunk.usage.completion_tokens - self._told
            if self._has_ids and rest > 0:
                yield TextDelta("", (UNKNOWN_ID,) * rest)
            details = chunk.usage.prompt_tokens_details
            yield StreamFinished(
                finish_reason=_FINISH.get(self._finish_reason, "stop"),
                prompt_tokens=chunk.usage.prompt_tokens,
                completion_tokens=chunk.usage.completion_tokens,
                cached_tokens=details.cached_tokens if details is not None else 0,
            )

    def _choice(self, choice: _Choice, timings: _Timings | None) -> Iterator[StreamEvent]:
        delta = choice.delta
        entries = (choice.logprobs.content or []) if choice.logprobs is not None else []
        ids = tuple(int(entry.get("id", UNKNOWN_ID)) for entry in entries)
        text = delta.content or ""
        if self._has_ids and timings is not None:
            missing = timings.predicted_n - self._told - len(ids)
            if missing > 0:
                ids = self._pieces.missing_ids(text, missing, ids[0] if ids else UNKNOWN_ID) + ids
        self._told += len(ids)
        if delta.reasoning_content:
            yield ReasoningDelta(delta.reasoning_content, () if text else ids)
            ids = ids if text else ()
        if text or ids:
            yield TextDelta(text, ids, _entries(entries, self._logprobs_max))
        for call in delta.tool_calls or ():
            function = call.function or _Function()
            yield ToolCallDelta(call.index, call.id, function.name, function.arguments or "")
        if choice.finish_reason is not None:
            self._finish_reason = choice.finish_reason


def fail_for_body(status: int, body: bytes) -> NoReturn:
    """Raise what an answer that is not 2xx says."""
    try:
        failure = _refusal_decoder.decode(body).error
    except msgspec.DecodeError:
        failure = _Failure(status, f"the engine answered with status {status}")
    fail_for(failure)


def fail_for(failure: _Failure) -> NoReturn:
    """Raise CONTEXT_LENGTH_EXCEEDED, INVALID_REQUEST, MODEL_LOADING or TOKEN_STREAM_FAILED."""
    if failure.type == "exceed_context_size_error":
        prompt, context = failure.n_prompt_tokens, failure.n_ctx
        fail(
            ErrorCode.CONTEXT_LENGTH_EXCEEDED,
            f"the prompt has {prompt} tokens, the context of a slot {context}",
            n_prompt_tokens=prompt,
            n_ctx=context,
        )
    message = failure.message[:_MESSAGE_CHARS_MAX]
    if failure.code == 503:
        fail(ErrorCode.MODEL_LOADING, message)
    if 400 <= failure.code < 500 or failure.code == 501:
        fail(ErrorCode.INVALID_REQUEST, message)
    fail(ErrorCode.TOKEN_STREAM_FAILED, f"the engine failed: {message}", status=failure.code)


def _progress(told: _Progress) -> PromptProgress:
    return PromptProgress(told.processed, told.total, told.cache)


def _entries(entries: list[dict[str, Any]], logprobs_max: int | None) -> tuple[dict[str, Any], ...]:
    """Return OpenAI's logprobs entries where they are asked for, with as many others as asked for."""
    if logprobs_max is None:
        return ()
    return tuple(
        {
            "token": entry.get("token", ""),
            "logprob": entry.get("logprob", 0.0),
            "bytes": entry.get("bytes"),
            "top_logprobs": [
                {key: other.get(key) for key in ("token", "logprob", "bytes")}
                for other in entry.get("top_logprobs", [])[:logprobs_max]
            ],
        }
        for entry in entries
    )
