"""A scripted engine, with a knob for every failure: the same each time, quick, without a model.

It ships with the product (demonstrations, chaos and acceptance tests) and passes the same suite as
the real ones.  It never proves anything about hardware.

Knobs (`EngineSpec.options`, unknown ones are refused):

- `load_s`, `load_steps`: how long loading takes, and in how many steps.
- `fail_load`: loading fails when the time of its first step is over, with this text
  (WORKER_START_FAILED).
- `token_s`: how long a token takes, and so does a batch of 256 tokens of a prompt.
- `exit_after_tokens`: the engine dies when a stream has brought so many tokens and would bring one
  more (counted for each stream by itself; the others die with it).
- `stall_after_tokens`: a stream falls silent, for ever, after so many tokens.
- `hang_unload`: it does not react to being asked to end; only the kill after the grace time works.
- `memory_mb`: what it claims to need.
- `child`: it runs a real process that computes nothing but can be killed; `pid` is then told, and
  the process's end is the engine's.
"""

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.engines import fake_text, gguf
from arriero.engines.base import (
    Abilities,
    Engine,
    EngineExit,
    EngineRequest,
    EngineSpec,
    EngineStats,
    Estimate,
    LoadEvent,
    LoadProgress,
    LoadReady,
    ModelFacts,
    PromptProgress,
    StreamEvent,
    StreamFinished,
    TextDelta,
)
from arriero.engines.child import EngineChild
from arriero.engines.model_file import shown_name
from arriero.runtime.clock import Clock, SystemClock

CHILD_MODULE: Final = "arriero.engines.fake_child"
BATCH_TOKENS: Final = 256
BLOCKS: Final = 8
CONTEXT_DEFAULT: Final = 4_096
EXIT_CODE: Final = 70
_CHILD_END_WAIT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class FakeScript:
    """The knobs; see the module."""

    load_s: float = 0.0
    load_steps: int = 4
    token_s: float = 0.0
    fail_load: str | None = None
    exit_after_tokens: int | None = None
    stall_after_tokens: int | None = None
    hang_unload: bool = False
    memory_mb: int = 64
    child: bool = False


def script_of(options: dict[str, Any]) -> FakeScript:
    """Return the script in `options`.  Raises INVALID_REQUEST for an unknown knob or a wrong value."""
    known = sorted(field.name for field in fields(FakeScript))
    for key in options:
        if key not in known:
            fail(
                ErrorCode.INVALID_REQUEST,
                f"the engine fake has no option {key!r}; it has {', '.join(known)}",
                param=key,
            )
    try:
        script = msgspec.convert(options, FakeScript)
    except msgspec.ValidationError as error:
        raise ArrieroError(ErrorCode.INVALID_REQUEST, f"an option of the engine fake: {error}") from error
    for key in known:
        value = getattr(script, key)
        if isinstance(value, int | float) and value < 0:
            fail(ErrorCode.INVALID_REQUEST, f"the engine option {key} is {value!r}, less than 0", param=key)
    return script


class Fake:
    """The kind: what can be asked before a model is loaded."""

    name = "fake"

    def probe(self) -> dict[str, str]:
        """Return what it is."""
        return {"engine": self.name, "version": "1"}

    def inspect(self, path: Path) -> ModelFacts:
        """Return the facts of a GGUF file, or made-up ones: any other file is a model, too.

        Raises INVALID_MODEL_PATH if there is no such file.
        """
        try:
            return gguf.inspect(path)
        except ArrieroError as error:
            if error.code is ErrorCode.INVALID_MODEL_PATH:
                raise
        size = path.stat().st_size
        return ModelFacts(
            "fake", BLOCKS, CONTEXT_DEFAULT, 1 << 24, "none", 0, size, True, False, shown_name(path)
        )

    async def estimate(self, spec: EngineSpec) -> Estimate:
        """Return what the script claims."""
        memory_mb = script_of(spec.options).memory_mb
        context = spec.context_tokens or CONTEXT_DEFAULT
        return Estimate(memory_mb, 0, context) if spec.backend == "cpu" else Estimate(0, memory_mb, context)

    def create(self) -> Engine:
        """Return a new engine that has loaded nothing."""
        return FakeEngine()


class FakeEngine:
    """One scripted engine."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.abilities = Abilities(grammar=False)
        self._clock = clock or SystemClock()
        self._script = FakeScript()
        self._context = CONTEXT_DEFAULT
        self._slots = asyncio.Semaphore(1)
        self._busy = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._computed = 0
        self._child: EngineChild | None = None
        self._is_loaded = False
        self._is_unloaded = False
        #: Set when the engine has ended, by itself or because it was unloaded.
        self._ended = asyncio.Event()
        self._exit: EngineExit | None = None
        self._exited = asyncio.Event()

    # --- Life ---------------------------------------------------------------------------------

    async def load(self, spec: EngineSpec) -> AsyncGenerator[LoadEvent, None]:
        """Tell the steps of loading; the model's path is not looked at."""
        assert not self._is_loaded, "an engine is loaded once"
        self._is_loaded = True
        script = self._script = script_of(spec.options)
        self._context = spec.context_tokens or CONTEXT_DEFAULT
        self._slots = asyncio.Semaphore(spec.slots)
        try:
            if script.child:
                self._child = await EngineChild.start(
                    CHILD_MODULE,
                    f"{'hang' if script.hang_unload else 'serve'} {os.getpid()}\n".encode(),
                    env={},
                    on_line=lambda _: None,
                )
            for step in range(script.load_steps + 1):
                fraction = step / max(1, script.load_steps)
                yield LoadProgress(fraction, int(fraction * BLOCKS), BLOCKS, int(fraction * script.memory_mb))
                if step < script.load_steps and script.load_s > 0:
                    await self._wait(script.load_s / script.load_steps)
                if script.fail_load is not None:
                    fail(ErrorCode.WORKER_START_FAILED, script.fail_load, log_tail=[script.fail_load])
        except BaseException:
            await self.unload(0.0)
            raise
        pid = self._child.pid if self._child is not None else None
        yield LoadReady(spec.slots, self._context, script.memory_mb, pid)

    def exited(self) -> EngineExit | None:
        """Return how it ended by itself; None while it lives or when it was unloaded."""
        if self._child is not None and self._exit is None:
            return self._child.exited()
        return self._exit

    async def wait_exited(self) -> EngineExit:
        """Wait until it ends by itself; never returns after `unload`."""
        if self._child is not None and self._exit is None:
            return await self._child.wait_exited()
        await self._exited.wait()
        assert self._exit is not None
        return self._exit

    async def unload(self, grace_s: float) -> None:
        """End it; waits all of `grace_s` if the script says so.  Safe to call twice."""
        is_first, self._is_unloaded = not self._is_unloaded, True
        try:
            if self._child is not None:
                await self._child.stop(grace_s)
            elif is_first and self._script.hang_unload and not self._ended.is_set():
                await self._clock.sleep_s(grace_s)
        finally:
            self._ended.set()

    # --- Generation ---------------------------------------------------------------------------

    async def stream(self, request: EngineRequest) -> AsyncGenerator[StreamEvent, None]:
        """Generate what the prompt's words give; closing the iterator ends it at once."""
        prompt_ids = self._prompt_ids(request)
        if len(prompt_ids) >= self._context:
            fail(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {len(prompt_ids)} tokens, the context of a slot {self._context}",
                n_prompt_tokens=len(prompt_ids),
                n_ctx=self._context,
            )
        self._check_alive()
        async with self._slots:
            self._busy += 1
            try:
                async with contextlib.aclosing(self._generate(request, prompt_ids)) as events:
                    async for event in events:
                        yield event
            finally:
                self._busy -= 1

    async def _generate(
        self, request: EngineRequest, prompt_ids: list[int]
    ) -> AsyncGenerator[StreamEvent, None]:
        script, sampling = self._script, request.sampling
        yield PromptProgress(0, len(prompt_ids))
        for start in range(0, len(prompt_ids), BATCH_TOKENS):
            await self._step()
            processed = min(len(prompt_ids), start + BATCH_TOKENS)
            yield PromptProgress(processed, len(prompt_ids))
        self._prompt_tokens += len(prompt_ids)
        room = self._context - len(prompt_ids)
        tokens_max = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        said, whole, text = b"", "", ""
        count = 0
        for token_id in itertools.islice(fake_text.answer_ids(prompt_ids), tokens_max):
            if count == script.exit_after_tokens:
                await self._die()
            if count == script.stall_after_tokens:
                await self._wait(None)
            await self._step()
            count += 1
            self._completion_tokens += 1
            said += fake_text.token_bytes(token_id)
            whole = said.decode("utf-8", "ignore" if _is_cut(said) else "replace")
            word, end = _stopped(whole, sampling.stop)
            shown = whole[:end]
            yield TextDelta(shown[len(text) :], (token_id,), _logprobs(token_id, sampling.logprobs))
            text = shown
            if word is not None:
                yield StreamFinished("stop", len(prompt_ids), count, stopping_word=word)
                return
        if len(whole) > len(text):
            yield TextDelta(whole[len(text) :])
        yield StreamFinished("length" if count == tokens_max else "stop", len(prompt_ids), count)

    def _prompt_ids(self, request: EngineRequest) -> list[int]:
        given = [part for part in (request.prompt, request.prompt_ids, request.messages) if part is not None]
        if len(given) != 1:
            fail(ErrorCode.INVALID_REQUEST, "exactly one of prompt, prompt_ids and messages must be given")
        if request.prompt_ids is not None:
            try:
                fake_text.detokenize(request.prompt_ids)
            except ValueError as error:
                raise ArrieroError(ErrorCode.INVALID_REQUEST, str(error), param="prompt_ids") from error
            return list(request.prompt_ids)
        prompt = request.prompt if request.messages is None else fake_text.template(request.messages)
        return [fake_text.BEGIN_ID, *fake_text.tokenize(prompt or "")]

    # --- Short questions ----------------------------------------------------------------------

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Return the ids of `text`."""
        self._check_alive()
        return [*([fake_text.BEGIN_ID] if add_special else []), *fake_text.tokenize(text)]

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`."""
        self._check_alive()
        try:
            return fake_text.detokenize(token_ids)
        except ValueError as error:
            raise ArrieroError(ErrorCode.INVALID_REQUEST, str(error)) from error

    async def count_tokens(self, text: str) -> int:
        """Return how many tokens `text` has as a prompt."""
        return len(await self.tokenize(text))

    async def apply_template(self, messages: Sequence[dict[str, Any]], options: dict[str, Any]) -> str:
        """Return the prompt that the fake template makes of `messages`."""
        self._check_alive()
        return fake_text.template(messages)

    async def embed(self, inputs: Sequence[str | Sequence[int]]) -> tuple[list[list[float]], int]:
        """Return a vector of length 1 for each input, the same for the same tokens."""
        self._check_alive()
        each = [fake_text.tokenize(item) if isinstance(item, str) else list(item) for item in inputs]
        for _ in each:
            await self._step()
        return [fake_text.vector(ids) for ids in each], sum(len(ids) for ids in each)

    async def stats(self) -> EngineStats:
        """Return the counts since start."""
        self._check_alive()
        return EngineStats(
            self._busy, self._prompt_tokens, self._completion_tokens, self._script.memory_mb, self._computed
        )

    async def health(self) -> bool:
        """Return whether it is loaded and has not ended."""
        return self._is_loaded and not self._has_ended()

    # --- Below --------------------------------------------------------------------------------

    async def _step(self) -> None:
        """Compute one token, or one batch of a prompt."""
        if self._script.token_s > 0:
            await self._wait(self._script.token_s)
        else:
            await asyncio.sleep(0)  # Others get their turn, as they would with a real engine.
        self._check_alive()
        self._computed += 1

    async def _wait(self, seconds: float | None) -> None:
        """Wait so long (None: for ever), or until the engine ends.  Raises WORKER_LOST then."""
        async with asyncio.TaskGroup() as group:
            waits = [group.create_task(self._wait_ended(), name="fake-ended")]
            if seconds is not None:
                waits.append(group.create_task(self._clock.sleep_s(seconds), name="fake-sleep"))
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        self._check_alive()

    async def _wait_ended(self) -> None:
        if self._child is None:
            await self._ended.wait()
        else:
            while not await self._child.wait_ended(3600.0):
                pass

    async def _die(self) -> None:
        """End as a crash would: the process is killed, or this object plays dead."""
        if self._child is not None:
            self._child.crash()
            await self._child.wait_ended(_CHILD_END_WAIT_S)
        else:
            self._exit = EngineExit(EXIT_CODE, None, False, ("fake: exit_after_tokens",))
            self._ended.set()
            self._exited.set()
        self._check_alive()

    def _has_ended(self) -> bool:
        return self._is_unloaded or self._ended.is_set() or self.exited() is not None

    def _check_alive(self) -> None:
        if not self._has_ended():
            return
        end = self.exited()
        if end is None:
            fail(ErrorCode.WORKER_LOST, "the engine was stopped")
        details = {"exit_code": end.exit_code, "signal": end.signal, "log_tail": list(end.log_tail[-20:])}
        if end.is_out_of_memory:
            fail(ErrorCode.OUT_OF_MEMORY, "the kernel killed the engine for memory", **details)
        how = f"signal {end.signal}" if end.signal is not None else f"exit code {end.exit_code}"
        fail(ErrorCode.WORKER_LOST, f"the engine ended ({how})", **details)


def _is_cut(raw: bytes) -> bool:
    """Return whether `raw` ends inside a character."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.end == len(raw) and error.reason == "unexpected end of data"
    return False


def _stopped(text: str, words: Sequence[str]) -> tuple[str | None, int]:
    """Return the stop string that `text` holds first, if any, and how much of `text` may be shown.

    An end that may become a stop string is held back.
    """
    found = [(text.index(word), word) for word in words if word in text]
    if found:
        end, word = min(found)
        return word, end
    held = (n for word in words for n in range(len(word) - 1, 0, -1) if text.endswith(word[:n]))
    return None, len(text) - max(held, default=0)


def _logprobs(token_id: int, logprobs_max: int | None) -> tuple[dict[str, Any], ...]:
    if logprobs_max is None:
        return ()
    raw = fake_text.token_bytes(token_id)
    entry: dict[str, Any] = {"token": raw.decode("utf-8", "replace"), "logprob": 0.0, "bytes": list(raw)}
    return ({**entry, "top_logprobs": [entry][:logprobs_max]},)
