"""The engine llama.cpp, from the wheel `xllamacpp`: one child process, spoken to over a unix socket."""

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.engines import (
    formats,
    gguf,
    llamacpp_estimate,
    llamacpp_load,
    llamacpp_stream,
    token_pieces,
    unix_http,
)
from arriero.engines.base import (
    Abilities,
    Engine,
    EngineExit,
    EngineRequest,
    EngineSpec,
    EngineStats,
    Estimate,
    LoadEvent,
    LoadReady,
    ModelFacts,
    StreamEvent,
    StreamFinished,
)
from arriero.engines.child import EngineChild
from arriero.engines.llamacpp_params import SOCKET_NAME, batch_of, environment_of, line_of, options_of
from arriero.runtime.clock import Clock, SystemClock

CHILD_MODULE: Final = "arriero.engines.llamacpp_child"
DISTRIBUTION: Final = "xllamacpp"
#: Short questions (tokenise, template, metrics); a batch under way may hold them up.
CALL_TIMEOUT_S: Final = 60.0
HEALTH_TIMEOUT_S: Final = 2.0
#: A further thread pays from so much of a model on.
BYTES_A_THREAD_MIN: Final = 16 * 1024 * 1024
#: An embedding of many long inputs on a slow machine.
EMBED_TIMEOUT_S: Final = 600.0
#: After the connection broke: so long until the process is known to have ended, too.
_END_WAIT_S: Final = 2.0
_METRICS_PREFIX: Final = "llamacpp:"


class LlamaCpp:
    """The kind: what can be asked before a model is loaded."""

    name = "llamacpp"

    def probe(self) -> dict[str, str]:
        """Return the version of the installed engine.

        Raises BACKEND_UNAVAILABLE if it is not installed.
        """
        if importlib.util.find_spec(DISTRIBUTION) is None:
            fail(ErrorCode.BACKEND_UNAVAILABLE, f"the engine {self.name} needs the package {DISTRIBUTION}")
        return {"engine": self.name, "version": importlib.metadata.version(DISTRIBUTION)}

    def inspect(self, path: Path) -> ModelFacts:
        """Read a model's header with bounds on everything.

        Raises as `gguf.inspect` does, and BACKEND_UNAVAILABLE for safetensors.
        """
        formats.refuse_all_but_gguf(path, self.name)
        return gguf.inspect(path)

    async def estimate(self, spec: EngineSpec) -> Estimate:
        """Return the memory that loading will take, as llama.cpp itself reckons it; raises as `inspect`."""
        await asyncio.to_thread(formats.refuse_all_but_gguf, spec.model_path, self.name)
        header = await asyncio.to_thread(gguf.read_header, spec.model_path)
        return await llamacpp_estimate.estimate(spec, header, threads=_threads(spec))

    def create(self) -> Engine:
        """Return a new engine that has loaded nothing."""
        return LlamaCppEngine()


class LlamaCppEngine:
    """One model in one llama.cpp."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.abilities = Abilities(grammar=True)
        self._clock = clock or SystemClock()
        self._child: EngineChild | None = None
        self._folder: Path | None = None
        self._socket_path = ""
        self._is_ready = False
        #: What an embedding model reads at most; None: its context alone limits an input.
        self._input_tokens_max: int | None = None
        self._pieces = token_pieces.TokenPieces()

    # --- Life ---------------------------------------------------------------------------------

    async def load(self, spec: EngineSpec) -> AsyncGenerator[LoadEvent, None]:
        """Check the file, start the child, tell its progress; see `Engine.load`.

        Raises also what `gguf.read_header` and `line_of` raise, and BACKEND_UNAVAILABLE for
        safetensors, before anything is started.
        """
        assert self._child is None, "an engine is loaded once"
        await asyncio.to_thread(formats.refuse_all_but_gguf, spec.model_path, LlamaCpp.name)
        header, self._pieces = await asyncio.to_thread(token_pieces.read, spec.model_path)
        options = options_of(spec)
        if header.facts.is_embedding:
            self.abilities = Abilities(chat=False, grammar=False)
            self._input_tokens_max = batch_of(spec, header, options)
        try:
            self._folder = _private_folder(spec.run_dir)
            self._socket_path = os.fspath(self._folder / SOCKET_NAME)
            state = llamacpp_load.LoadState()
            self._child = child = await EngineChild.start(
                CHILD_MODULE,
                line_of(spec, header, self._folder / SOCKET_NAME, threads=_threads(spec)),
                env=environment_of(spec),
                on_line=state.take,
                hidden=(f"{spec.model_path.parent}{os.sep}", f"{self._folder}{os.sep}"),
            )
            steps = llamacpp_load.progress(
                child,
                state,
                self._socket_path,
                blocks=header.facts.block_count,
                stall_s=spec.loading_stall_s if options.loading_stall_s is None else options.loading_stall_s,
                clock=self._clock,
            )
            async with contextlib.aclosing(steps):
                async for step in steps:
                    yield step
            try:
                ready = await self._ready(child)
            except unix_http.ConnectionLost:
                await child.wait_ended(_END_WAIT_S)
                end = child.exited() or EngineExit(None, None, False, child.log_tail())
                llamacpp_load.fail_for_exit(end, backend=spec.backend)
        except BaseException:
            # Also when the iterator is closed early: nothing is left running.
            await self.unload(0.0)
            raise
        self._is_ready = True
        yield ready

    async def _ready(self, child: EngineChild) -> LoadReady:
        answer = await unix_http.call(self._socket_path, "GET", "/props", timeout_s=CALL_TIMEOUT_S)
        told = _props_decoder.decode(answer.body)
        return LoadReady(
            slots=told.total_slots,
            context_tokens=told.default_generation_settings.n_ctx,
            memory_mb=child.memory_mb(),
            pid=child.pid,
        )

    def exited(self) -> EngineExit | None:
        """Return how the engine ended by itself, None while it lives or when we stopped it."""
        return self._child.exited() if self._child is not None else None

    async def wait_exited(self) -> EngineExit:
        """Wait, without a limit, until the engine ends by itself; never returns after `unload`."""
        assert self._child is not None, "nothing is loaded"
        return await self._child.wait_exited()

    async def unload(self, grace_s: float) -> None:
        """Close the child's stdin, wait `grace_s`, then kill; remove its socket.  Safe to call twice.

        While it loads, the child does not look at its stdin and has nothing to lose: killed at once.
        """
        try:
            if self._child is not None:
                await self._child.stop(grace_s if self._is_ready else 0.0)
        finally:
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None

    # --- Generation ---------------------------------------------------------------------------

    async def stream(self, request: EngineRequest) -> AsyncGenerator[StreamEvent, None]:
        """Generate; closing the iterator closes the connection, which cancels; see `Engine.stream`."""
        path, body = llamacpp_stream.body_of(request)
        is_chat = path == llamacpp_stream.CHAT_PATH
        kind = llamacpp_stream.ChatReader if is_chat else llamacpp_stream.CompletionReader
        reader = kind(request, self._pieces)
        is_finished = False
        try:
            async with await unix_http.open_exchange(self._path(), "POST", path, body) as exchange:
                status = await exchange.status()
                if status != 200:
                    llamacpp_stream.fail_for_body(status, await exchange.read_all())
                while data := await exchange.read():
                    for event in reader.feed(data):
                        is_finished = is_finished or isinstance(event, StreamFinished)
                        yield event
                    if is_finished:
                        return
        except unix_http.ConnectionLost as error:
            raise await self._lost() from error
        fail(ErrorCode.TOKEN_STREAM_ERROR, "the engine's answer ended before its end")

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        """Return a vector of length 1 for each input, and the prompt tokens used in all.

        Raises CONTEXT_LENGTH_EXCEEDED for an input that is longer than the context, or than the
        batch of an embedding model (it reads an input at once).
        """
        given = [item if isinstance(item, str) else list(item) for item in inputs]
        body = {"input": given, "encoding_format": "float"}
        answer = await self._post("/v1/embeddings", body, timeout_s=EMBED_TIMEOUT_S)
        if answer.status != 200:
            await self._check_lengths(given)
            llamacpp_stream.fail_for_body(answer.status, answer.body)
        told = _embeddings_decoder.decode(answer.body)
        ordered = sorted(told.data, key=lambda row: row.index)
        return [row.embedding for row in ordered], told.usage.prompt_tokens

    async def _check_lengths(self, given: list[str | list[int]]) -> None:
        """Raise CONTEXT_LENGTH_EXCEEDED for the first input that one batch cannot hold."""
        if self._input_tokens_max is None:
            return
        for item in given:
            count = len(item) if isinstance(item, list) else await self.count_tokens(item)
            if count > self._input_tokens_max:
                fail(
                    ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                    f"an input has {count} tokens, at most {self._input_tokens_max} can be embedded",
                    n_prompt_tokens=count,
                    n_ctx=self._input_tokens_max,
                )

    # --- Short questions ----------------------------------------------------------------------

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return the token ids of `text`; special tokens written in it are recognised."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return _tokens_decoder.decode(await self._asked("/tokenize", body)).tokens

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`; bytes that are no UTF-8 come as U+FFFD."""
        return _content_decoder.decode(await self._asked("/detokenize", {"tokens": list(token_ids)})).content

    async def count_tokens(self, text: str) -> int:
        """Return how many tokens `text` has as a prompt."""
        return len(await self.tokenize(text))

    async def apply_template(self, messages: Sequence[dict[str, Any]], options: dict[str, Any]) -> str:
        """Return the prompt that the model's chat template makes of `messages`."""
        body = {**options, "messages": list(messages)}
        return _prompt_decoder.decode(await self._asked("/apply-template", body)).prompt

    async def stats(self) -> EngineStats:
        """Return the counts since start; `tokens_computed` counts a batch of a prompt as one."""
        try:
            answer = await unix_http.call(self._path(), "GET", "/metrics", timeout_s=CALL_TIMEOUT_S)
        except unix_http.ConnectionLost as error:
            raise await self._lost() from error
        counts = _metrics(answer.body.decode())
        return EngineStats(
            slots_busy=counts.get("requests_processing", 0),
            prompt_tokens=counts.get("prompt_tokens_total", 0),
            completion_tokens=counts.get("tokens_predicted_total", 0),
            memory_mb=self._child.memory_mb() if self._child is not None else 0,
            tokens_computed=counts.get("n_decode_total", 0),
        )

    async def health(self) -> bool:
        """Return whether the engine answers now; waits 2 s at most."""
        return self._child is not None and await llamacpp_load.is_healthy(self._socket_path)

    # --- Below --------------------------------------------------------------------------------

    def _path(self) -> str:
        assert self._socket_path, "nothing is loaded"
        return self._socket_path

    async def _post(self, path: str, body: Any, *, timeout_s: float) -> unix_http.Answer:
        try:
            return await unix_http.call(
                self._path(), "POST", path, msgspec.json.encode(body), timeout_s=timeout_s
            )
        except unix_http.ConnectionLost as error:
            raise await self._lost() from error

    async def _asked(self, path: str, body: Any) -> bytes:
        answer = await self._post(path, body, timeout_s=CALL_TIMEOUT_S)
        if answer.status != 200:
            llamacpp_stream.fail_for_body(answer.status, answer.body)
        return answer.body

    async def _lost(self) -> ArrieroError:
        """Return why the engine does not answer any more; waits shortly for its end to be known."""
        assert self._child is not None
        await self._child.wait_ended(_END_WAIT_S)
        end = self._child.exited()
        if end is None:
            return ArrieroError(ErrorCode.WORKER_LOST, "the engine closed the connection, or was stopped")
        details = {"exit_code": end.exit_code, "signal": end.signal, "log_tail": list(end.log_tail[-20:])}
        if end.is_out_of_memory:
            return ArrieroError(ErrorCode.OUT_OF_MEMORY, "the kernel killed the engine for memory", **details)
        how = f"signal {end.signal}" if end.signal is not None else f"exit code {end.exit_code}"
        return ArrieroError(ErrorCode.WORKER_LOST, f"the engine ended ({how})", **details)


class _Settings(msgspec.Struct):
    n_ctx: int


class _Props(msgspec.Struct):
    default_generation_settings: _Settings
    total_slots: int


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Content(msgspec.Struct):
    content: str


class _Prompt(msgspec.Struct):
    prompt: str


class _Embedding(msgspec.Struct):
    index: int
    embedding: list[float]


class _EmbeddingsUsage(msgspec.Struct):
    prompt_tokens: int = 0


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]
    usage: _EmbeddingsUsage


_props_decoder: Final = msgspec.json.Decoder(_Props)
_tokens_decoder: Final = msgspec.json.Decoder(_Tokens)
_content_decoder: Final = msgspec.json.Decoder(_Content)
_prompt_decoder: Final = msgspec.json.Decoder(_Prompt)
_embeddings_decoder: Final = msgspec.json.Decoder(_Embeddings)


def _private_folder(run_dir: Path) -> Path:
    """Make a folder of our own (0700) in `run_dir`, which is made if it is not there."""
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="e", dir=run_dir))
    except OSError as error:
        raise ArrieroError(
            ErrorCode.STATE_DIR_UNUSABLE, f"no folder for the engine's socket can be made: {error.strerror}"
        ) from error


def _threads(spec: EngineSpec) -> int:
    """Return as many threads as the machine has physical cores that we may use; fewer for a tiny model.

    Threads meet after every operation: with a model of a megabyte that costs more than they bring
    (measured: one thread gave 1.0 of the engine's rate through the whole path at 8 streams, two
    gave 0.77, on two cores).
    """
    if spec.threads:
        return spec.threads
    import psutil

    useful = spec.model_path.stat().st_size // BYTES_A_THREAD_MIN + 1

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, min(cores, useful))


def _metrics(text: str) -> dict[str, int]:
    """Return llama.cpp's own counters from its Prometheus page."""
    counts: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith(_METRICS_PREFIX):
            name, _, number = line[len(_METRICS_PREFIX) :].partition(" ")
            with contextlib.suppress(ValueError):
                counts[name] = int(float(number))
    return counts
