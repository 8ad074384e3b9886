"""What may an OpenAI request ask of this worker, and what does the engine get of it?

Unknown fields are tolerated, as OpenAI's clients send ever new ones; known ones are checked, and
what cannot be done is refused with the field's name in `param`.
"""

from typing import Annotated, Any, Final, NoReturn, TypeAlias

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import Sampling, StopWord, Temperature, TimeoutS, TokensMax
from arriero.engines.base import Abilities, EngineRequest
from arriero.worker.tool_choice import ToolChoice, tool_choice_of

PROMPTS_MAX: Final = 128
INPUTS_MAX: Final = 2048
_ROLES: Final = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_Penalty: TypeAlias = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]
_Fraction: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
_Seed: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_TokenId: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Stop: TypeAlias = Annotated[list[StopWord], msgspec.Meta(max_length=16)] | StopWord | None


def refuse(param: str, message: str, **details: Any) -> NoReturn:
    """Raise INVALID_REQUEST for a field."""
    raise ArrieroError(ErrorCode.INVALID_REQUEST, message, param=param, **details)


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's `stream_options`."""

    include_usage: bool | None = None


class _Common(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that chat and completions share; those after `logit_bias` are not OpenAI's."""

    model: Annotated[str, msgspec.Meta(max_length=2048)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: TokensMax | None = None
    temperature: Temperature | None = None
    top_p: _Fraction | None = None
    seed: _Seed | None = None
    stop: _Stop = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: dict[str, Annotated[float, msgspec.Meta(ge=-100.0, le=100.0)]] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0)] | None = None
    min_p: _Fraction | None = None
    repeat_penalty: Annotated[float, msgspec.Meta(ge=0.0, le=10.0)] | None = None
    ignore_eos: bool | None = None
    timeout: TimeoutS | None = None
    queue: bool | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_common(self) -> None:
        """Raise INVALID_REQUEST for what no route can do."""
        if self.n not in (None, 1):
            refuse("n", f"n is {self.n}; this server answers with one choice, n must be 1", limit=1)
        if self.stream_options is not None and not self.stream:
            refuse("stream_options", "stream_options is allowed only where stream is true")
        for key in self.logit_bias or {}:
            if not (key.isascii() and key.isdigit()):
                refuse("logit_bias", f"the key {key[:40]!r} of logit_bias is no token id")

    def sampling(self, max_tokens: int | None, logprobs: int | None) -> Sampling:
        """Return how the engine chooses tokens."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            # The engine's seeds have 32 bits; the same seed still gives the same answer.
            seed=None if self.seed is None else self.seed % 2**32,
            stop=stop,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repeat_penalty=self.repeat_penalty,
            logit_bias=self.logit_bias or None,
            logprobs=logprobs,
            ignore_eos=bool(self.ignore_eos),
        )


class ChatBody(_Common, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]
    max_completion_tokens: TokensMax | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def request(self, request_id: str, abilities: Abilities) -> tuple[EngineRequest, ToolChoice | None]:
        """Return what the engine is asked, and the tool call that the answer must be, if it must.

        Raises INVALID_REQUEST with the field's name.
        """
        self.check_common()
        if self.top_logprobs is not None and not self.logprobs:
            refuse("top_logprobs", "top_logprobs is allowed only where logprobs is true")
        messages = [_message(message, f"messages[{i}]") for i, message in enumerate(self.messages)]
        self._check_format(abilities)
        forced = tool_choice_of(self.tools, self.tool_choice, abilities)
        options: dict[str, Any] = {}
        for name in (
            "response_format",
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "chat_template_kwargs",
        ):
            if (value := getattr(self, name)) is not None:
                options[name] = value
        if forced is not None:
            if self.response_format is not None and self.response_format.get("type") != "text":
                refuse(
                    "response_format",
                    "response_format and a tool_choice that demands a call exclude each other",
                )
            options = forced.options(options)
        tokens_max = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return (
            EngineRequest(
                request_id=request_id,
                messages=messages if forced is None else forced.messages(messages),
                sampling=self.sampling(tokens_max, logprobs),
                chat_options=options,
            ),
            forced,
        )

    def _check_format(self, abilities: Abilities) -> None:
        if self.response_format is None:
            return
        kind = self.response_format.get("type")
        if kind not in ("text", "json_object", "json_schema"):
            refuse("response_format.type", f"response_format.type is {str(kind)[:40]!r}; it must be text, "
                   "json_object or json_schema")  # fmt: skip
        if kind == "json_schema":
            schema = self.response_format.get("json_schema")
            if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
                refuse("response_format.json_schema", "response_format.json_schema.schema must be an object")
        if kind != "text" and not abilities.grammar:
            refuse("response_format", "this engine cannot hold an answer to a format")


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a message with its text in one piece, as templates expect it."""
    role = message.get("role")
    if role not in _ROLES:
        refuse(
            f"{where}.role",
            f"{where}.role is {str(role)[:40]!r}; it must be one of {', '.join(sorted(_ROLES))}",
        )
    content = message.get("content")
    if content is None:
        if role != "assistant":
            refuse(f"{where}.content", f"{where}.content is missing")
        if not (message.get("tool_calls") or message.get("function_call")):
            refuse(f"{where}.content", f"{where} has neither content nor tool_calls")
    elif isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif not isinstance(content, str):
        refuse(f"{where}.content", f"{where}.content is neither text nor a list of parts")
    changed = {**message, "role": "system" if role == "developer" else role}
    if content is not None:
        changed["content"] = content
    return changed


def _part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        refuse(where, f"{where} is no object")
    kind = part.get("type")
    if kind not in ("text", "refusal"):
        refuse(f"{where}.type", f"{where}.type is {str(kind)[:40]!r}; this server takes text alone")
    text = part.get(kind)
    if not isinstance(text, str):
        refuse(f"{where}.{kind}", f"{where}.{kind} is no text")
    return text


class CompletionBody(_Common, frozen=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[str | _TokenId | list[_TokenId]]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def requests(self, request_id: str) -> list[EngineRequest]:
        """Return what the engine is asked, one after the other: a choice for each prompt.

        Raises INVALID_REQUEST with the field's name.
        """
        self.check_common()
        if self.echo:
            refuse("echo", "echo is not supported")
        if self.best_of not in (None, 1):
            refuse("best_of", f"best_of is {self.best_of}; it must be 1", limit=1)
        if self.suffix:
            refuse("suffix", "suffix is not supported")
        sampling = self.sampling(self.max_tokens, self.logprobs)
        prompts = texts_or_ids(self.prompt, "prompt", count_max=PROMPTS_MAX, may_be_empty=True)
        return [
            EngineRequest(
                request_id=request_id if len(prompts) == 1 else f"{request_id}-{i}",
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_ids=None if isinstance(prompt, str) else prompt,
                sampling=sampling,
            )
            for i, prompt in enumerate(prompts)
        ]


class EmbeddingsBody(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/embeddings`."""

    input: str | list[str | _TokenId | list[_TokenId]]
    model: Annotated[str, msgspec.Meta(max_length=2048)] | None = None
    encoding_format: str | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1)] | None = None
    timeout: TimeoutS | None = None
    queue: bool | None = None

    def inputs(self) -> list[str | list[int]]:
        """Return the inputs, each a text or token ids.  Raises INVALID_REQUEST with the field's name."""
        if self.encoding_format not in (None, "float", "base64"):
            refuse(
                "encoding_format",
                f"encoding_format is {self.encoding_format[:40]!r}; it must be float or base64",
            )
        return texts_or_ids(self.input, "input", count_max=INPUTS_MAX)


def texts_or_ids(
    given: str | list[str | int | list[int]], param: str, *, count_max: int, may_be_empty: bool = False
) -> list[str | list[int]]:
    """Return the texts and token lists of a field that may be one text, one token list, or a list of them.

    Raises INVALID_REQUEST for an empty list, an empty token list, a mixture, or too many.
    """
    if isinstance(given, str):
        given = [given]
    if not given:
        refuse(param, f"{param} is an empty list")
    numbers = [item for item in given if isinstance(item, int)]
    if numbers:
        if len(numbers) != len(given):
            refuse(param, f"{param} mixes token ids with texts or lists")
        return [numbers]
    items = [item for item in given if not isinstance(item, int)]
    if len(items) > count_max:
        refuse(param, f"{param} has {len(items)} entries, the limit is {count_max}", limit=count_max)
    for i, item in enumerate(items):
        if not item and not (may_be_empty and isinstance(item, str)):
            refuse(f"{param}[{i}]", f"{param}[{i}] is empty")
    return items
