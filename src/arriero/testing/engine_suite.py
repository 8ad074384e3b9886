"""What does every engine promise?  One suite, inherited by the test class of each adapter.

    class TestFakeEngine(EngineSuite):
        def make_engine(self) -> Engine: …
        def make_spec(self, folder: Path) -> EngineSpec: …

An ability that an engine lacks is declared (`Engine.abilities`, or a hook that returns None) and
skipped aloud.  Nothing here depends on what a model says, beyond: the same thing twice.
"""

import asyncio
import contextlib
import itertools
import math
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import Sampling
from arriero.engines.base import (
    Engine,
    EngineRequest,
    EngineSpec,
    LoadEvent,
    LoadProgress,
    LoadReady,
    PromptProgress,
    ReasoningDelta,
    StreamFinished,
    TextDelta,
)

DEADLINE_S = 60.0
SLOTS = 4
CONTEXT = 1024
GREEDY = Sampling(max_tokens=24, temperature=0.0)
MESSAGES = [{"role": "user", "content": "Count from 5 to 40."}]


@dataclass(frozen=True, slots=True)
class Said:
    """What a stream brought, in all."""

    text: str
    token_ids: tuple[int, ...]
    finished: StreamFinished
    parts: int


class EngineSuite:
    """Inherit, give the hooks, and pytest runs the shared behaviour."""

    def make_engine(self) -> Engine:
        """Return a new engine."""
        raise NotImplementedError

    def make_spec(self, folder: Path) -> EngineSpec:
        """Return a specification that loads quickly; `folder` is for a model's file and the socket."""
        raise NotImplementedError

    def make_slow_spec(self, folder: Path) -> EngineSpec:
        """Return one whose batches (of 256 tokens) and tokens take long enough to be cancelled."""
        raise NotImplementedError

    def make_broken_spec(self, folder: Path) -> EngineSpec | None:
        """Return one whose loading fails; None: there is no such thing."""
        return None

    def make_unicode_request(self) -> EngineRequest | None:
        """Return a request whose answer has characters of several bytes; None: cannot be had."""
        return None

    # --- Loading and ending -------------------------------------------------------------------

    async def test_loading_tells_rising_fractions_and_ends_ready(self, tmp_path: Path) -> None:
        engine = self.make_engine()
        events = await load(engine, self._spec(tmp_path))
        steps = [event for event in events if isinstance(event, LoadProgress)]
        assert all(a.fraction < b.fraction for a, b in itertools.pairwise(steps))
        assert all(0.0 <= step.fraction <= 1.0 for step in steps)
        assert all(step.layers_loaded <= step.layers_total for step in steps)
        ready = events[-1]
        assert isinstance(ready, LoadReady)
        assert (ready.slots, ready.context_tokens) == (SLOTS, CONTEXT)
        assert await engine.health()
        assert engine.exited() is None
        await engine.unload(1.0)

    async def test_unload_before_load_and_twice_is_harmless(self, tmp_path: Path) -> None:
        engine = self.make_engine()
        await engine.unload(1.0)
        engine = self.make_engine()
        events = await load(engine, self._spec(tmp_path))
        await engine.unload(5.0)
        await engine.unload(5.0)
        assert engine.exited() is None
        assert not await engine.health()
        self._nothing_is_left(events, tmp_path)

    async def test_closing_the_load_leaves_nothing(self, tmp_path: Path) -> None:
        engine = self.make_engine()
        events = engine.load(self._spec(tmp_path))
        first = await anext(events)
        await events.aclose()
        self._nothing_is_left([first], tmp_path)
        await engine.unload(0.0)

    async def test_a_load_that_fails_says_why(self, tmp_path: Path) -> None:
        spec = self.make_broken_spec(tmp_path)
        if spec is None:
            pytest.skip("this engine cannot be given a broken model")
        engine = self.make_engine()
        with pytest.raises(ArrieroError) as caught:
            await load(engine, spec)
        assert caught.value.code in {ErrorCode.MODEL_CORRUPTED, ErrorCode.WORKER_START_FAILED}
        assert str(tmp_path) not in f"{caught.value} {caught.value.details}"
        await engine.unload(0.0)
        self._nothing_is_left([], tmp_path)

    async def test_a_killed_engine_is_noticed(self, tmp_path: Path) -> None:
        async with self._loaded(tmp_path) as (engine, ready):
            if ready.pid is None:
                pytest.skip("this engine has no process of its own")
            async with asyncio.timeout(DEADLINE_S):
                stream = engine.stream(EngineRequest("r", prompt="one two", sampling=_endless()))
                await _first_text(stream)
                os.kill(ready.pid, signal.SIGKILL)
                with pytest.raises(ArrieroError) as caught:
                    async for _ in stream:
                        pass
                assert caught.value.code is ErrorCode.WORKER_LOST
                end = await engine.wait_exited()
            assert (end.exit_code, end.signal, end.is_out_of_memory) == (None, signal.SIGKILL, False)
            assert engine.exited() == end
            assert not await engine.health()
            with pytest.raises(ArrieroError):
                await engine.tokenize("one")

    # --- Generation ---------------------------------------------------------------------------

    async def test_the_same_greedy_request_says_the_same(self, tmp_path: Path) -> None:
        async with self._loaded(tmp_path) as (engine, _):
            first = await say(engine, prompt="one two", sampling=GREEDY)
            second = await say(engine, prompt="one two", sampling=GREEDY)
            assert (first.text, first.token_ids) == (second.text, second.token_ids)

    async def test_the_same_seed_says_the_same(self, tmp_path: Path) -> None:
        async with self._loaded(tmp_path) as (engine, _):
            sampling = Sampling(max_tokens=24, temperature=1.0, seed=7)
            first = await say(engine, prompt="one two", sampling=sampling)
            second = await say(engine, prompt="one two", sampling=sampling)
            assert first.text == second.text

    @pytest.mark.parametrize("count", [1, 2, 17])
    async def test_stops_at_max_tokens(self, tmp_path: Path, count: int) -> None:
        async with self._loaded(tmp_path) as (engine, _):
            sampling = Sampling(max_tokens=count, temperature=0.0, ignore_eos=True)
            said = await say(engine, prompt="one two", sampling=sampling)
            assert said.finished.finish_reason == "length"
            assert said.finished.completion_tokens == count
            if engine.abilities.token_ids:
                assert len(said.token_ids) == count

    async def test_without_max_tokens_it_ends_when_the_context_is_full(self, tmp_path: Path) -> None:
        async with self._loaded(tmp_path, context_tokens=256) as (engine, ready):
            said = await say(engine, prompt="one two", sampling=_endless())
            assert said.finished.finish_reason == "length"
            total = said.finished.prompt_tokens + said.finished.completion_tokens
            assert ready.context_tokens - 1 <= total <= ready.context_tokens + 1

    async def test_stops_at_a_stop_string_and_leaves_it_out(self, tmp_path: Path) -> None:
        async with self._loaded(tmp_path) as (engine, _):
            whole = (await say(engine, prompt="one two", sampling=GREEDY)).text
            stop = whole[7:10]
            sampling = replace_sampling(GREEDY, stop=(stop, "never said"))
            said = await say(engine, prompt="one two", sampling=sampling)
            assert said.text == whole[: whole.index(stop)]
            assert (said.finished.finish_reason, said.finished.stopping_word) == ("stop", stop)

    async def test_token_ids_are_exact_and_continue(self, tmp_path: Path) -> None:
        async with self._loaded(tmp_path) as (engine, _):
            if not engine.abilities.token_ids:
                pytest.skip("this engine tells no token ids")
            whole = await say(engine, prompt="one two", sampling=GREEDY)
            assert await engine.detokenize(whole.token_ids) == whole.text
            prompt_ids = await engine.tokenize("one two")
            cut = 9
            rest = await say(
                engine,
                prompt_ids=[*prompt_ids, *whole.token_ids[:cut]],
                sampling=replace_sampling(GREEDY, max_tokens=24 - cut),
            )
            assert whole.token_ids[:cut] + rest.token_ids == whole.token_ids

    async def test_characters_of_several_bytes_come_whole(self, tmp_path: Path) -> None:
        request = self.make_unicode_request()
        if request is None:
            pytest.skip("this engine cannot be made to answer so")
        async with self._loaded(tmp_path) as (engine, _):
            said = await _drain(engine, request)
            assert not said.text.isascii()
            assert "\ufffd" not in said.text
            assert said.parts > len(said.text.split())
            if engine.abilities.token_ids:
                assert (await engine.detokenize(said.token_ids)).startswith(said.text)

    async def test_chat_answers_and_counts(self, tmp_path: Path) -> None:
        async with self._loaded(tmp_path) as (engine, _):
            if not engine.abilities.chat:
                pytest.skip("this engine has no chat")
            said = await say(engine, messages=MESSAGES, sampling=GREEDY)
            prompt = await engine.apply_template(MESSAGES, {})
            assert MESSAGES[0]["content"] in prompt
            assert said.finished.prompt_tokens == await engine.count_tokens(prompt)
            assert 0 < said.finished.completion_tokens <= 24
            again = await say(engine, prompt=prompt, sampling=GREEDY)
            assert again.text.startswith(said.text)

    async def test_logprobs_come_where_asked_for(self, tmp_path: Path) -> None:
        async with self._loaded(tmp_path) as (engine, _):
            sampling = Sampling(max_tokens=3, temperature=0.0, logprobs=1, ignore_eos=True)
            request = EngineRequest("r", prompt="one two", sampling=sampling)
            entries = [
                entry
                async for event in engine.stream(request)
                if isinstance(event, TextDelta)
                for entry in event.logprobs
            ]
            assert len(entries) == 3
            assert all(entry["logprob"] <= 0.0 and len(entry["top_logprobs"]) == 1 for entry in entries)

    async def test_a_prompt_longer_than_the_context_is_refused(self, tmp_path: Path) -> None:
        async with self._loaded(tmp_path) as (engine, _):
            with pytest.raises(ArrieroError) as caught:
                await say(engine, prompt="a b " * CONTEXT, sampling=GREEDY)
            assert caught.value.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
            assert caught.value.details["n_ctx"] == CONTEXT
            assert caught.value.details["n_prompt_tokens"] >= CONTEXT

    @pytest.mark.parametrize("given", [{}, {"prompt": "a", "prompt_ids": [1]}, {"prompt_ids": [-5]}])
    async def test_a_wrong_request_is_refused(self, tmp_path: Path, given: dict[str, Any]) -> None:
        async with self._loaded(tmp_path) as (engine, _):
            with pytest.raises(ArrieroError) as caught:
                await say(engine, sampling=GREEDY, **given)
            assert caught.value.code is ErrorCode.INVALID_REQUEST

    async def test_more_streams_than_slots_are_safe(self, tmp_path: Path) -> None:
        async with self._loaded(tmp_path) as (engine, _):
            alone = await say(engine, prompt="one two", sampling=GREEDY)
            async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(say(engine, prompt="one two", sampling=GREEDY))
                    for _ in range(2 * SLOTS)
                ]
            assert {task.result().text for task in tasks} == {alone.text}
            await _until(self._is_idle(engine))

    async def test_closing_a_stream_stops_the_computation(self, tmp_path: Path) -> None:
        async with self._loaded(tmp_path, is_slow=True) as (engine, _):
            stream = engine.stream(EngineRequest("r", prompt="one two", sampling=_endless()))
            for _ in range(3):
                await _first_text(stream)
            await stream.aclose()
            before = (await engine.stats()).tokens_computed
            await _until(self._is_idle(engine))
            assert (await engine.stats()).tokens_computed <= before + 2

    async def test_closing_during_the_prompt_stops_within_a_batch(self, tmp_path: Path) -> None:
        async with self._loaded(tmp_path, is_slow=True) as (engine, _):
            prompt_ids = (await engine.tokenize("one two three four five six " * 400))[:2_000]
            request = EngineRequest("r", prompt_ids=prompt_ids, sampling=GREEDY)
            stream = engine.stream(request)
            async for event in stream:
                assert isinstance(event, PromptProgress)
                assert event.total == 2_000
                if event.processed > 0:
                    break
            await stream.aclose()
            await _until(self._is_idle(engine))
            # The batch that was told, the one under way, and one that began meanwhile: 8 in all.
            assert (await engine.stats()).tokens_computed <= 3
            said = await say(engine, prompt="one two", sampling=replace_sampling(GREEDY, max_tokens=2))
            assert said.finished.completion_tokens == 2

    # --- Short questions ----------------------------------------------------------------------

    @pytest.mark.parametrize("text", ["one two", "Hé, ñandú 🦙 and 漢字", "  two  spaces\nand a line "])
    async def test_text_survives_its_tokens(self, tmp_path: Path, text: str) -> None:
        async with self._loaded(tmp_path) as (engine, _):
            ids = await engine.tokenize(text, add_special=False)
            assert await engine.detokenize(ids) == text
            assert await engine.count_tokens(text) >= len(ids) > 0

    async def test_embeddings_have_length_one_and_depend_on_the_input(self, tmp_path: Path) -> None:
        async with self._loaded(tmp_path) as (engine, _):
            if not engine.abilities.embeddings:
                pytest.skip("this engine has no embeddings")
            ids = await engine.tokenize("one two")
            vectors, tokens = await engine.embed(["one two", "three", ids])
            assert len(vectors) == 3
            assert {len(vector) for vector in vectors} == {len(vectors[0])}
            assert all(math.isclose(math.hypot(*vector), 1.0, abs_tol=1e-3) for vector in vectors)
            assert vectors[0] != vectors[1]
            assert tokens >= 3
            again, _ = await engine.embed(["one two"])
            assert all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(vectors[0], again[0], strict=True))

    async def test_stats_count(self, tmp_path: Path) -> None:
        async with self._loaded(tmp_path) as (engine, _):
            before = await engine.stats()
            said = await say(engine, prompt="one two", sampling=GREEDY)
            await _until(self._is_idle(engine))
            after = await engine.stats()
            assert after.completion_tokens - before.completion_tokens == said.finished.completion_tokens
            assert after.tokens_computed > before.tokens_computed
            assert after.memory_mb > 0

    # --- Below --------------------------------------------------------------------------------

    def _spec(self, folder: Path, *, is_slow: bool = False, context_tokens: int = CONTEXT) -> EngineSpec:
        spec = self.make_slow_spec(folder) if is_slow else self.make_spec(folder)
        return replace(spec, slots=SLOTS, context_tokens=4_096 if is_slow else context_tokens)

    @contextlib.asynccontextmanager
    async def _loaded(
        self, folder: Path, *, is_slow: bool = False, context_tokens: int = CONTEXT
    ) -> AsyncIterator[tuple[Engine, LoadReady]]:
        engine = self.make_engine()
        try:
            events = await load(engine, self._spec(folder, is_slow=is_slow, context_tokens=context_tokens))
            ready = events[-1]
            assert isinstance(ready, LoadReady)
            yield engine, ready
        finally:
            await engine.unload(5.0)
        self._nothing_is_left(events, folder)

    def _is_idle(self, engine: Engine) -> Callable[[], Awaitable[bool]]:
        async def check() -> bool:
            return (await engine.stats()).slots_busy == 0

        return check

    def _nothing_is_left(self, events: list[LoadEvent], folder: Path) -> None:
        run_dir = self.make_spec(folder).run_dir
        assert not run_dir.exists() or not list(run_dir.iterdir())
        for event in events:
            if isinstance(event, LoadReady) and event.pid is not None:
                with pytest.raises(ProcessLookupError):
                    os.kill(event.pid, 0)


async def load(engine: Engine, spec: EngineSpec) -> list[LoadEvent]:
    """Load to the end and return what was told."""
    async with asyncio.timeout(DEADLINE_S):
        return [event async for event in engine.load(spec)]


async def say(engine: Engine, *, sampling: Sampling, **given: Any) -> Said:
    """Generate to the end and return what came; `given` is prompt, prompt_ids or messages."""
    return await _drain(engine, EngineRequest("r", sampling=sampling, **given))


def replace_sampling(sampling: Sampling, **changes: Any) -> Sampling:
    """Return `sampling` with some fields changed."""
    fields = {name: getattr(sampling, name) for name in sampling.__struct_fields__}
    return Sampling(**{**fields, **changes})


async def _drain(engine: Engine, request: EngineRequest) -> Said:
    texts: list[str] = []
    ids: list[int] = []
    finished: StreamFinished | None = None
    async with asyncio.timeout(DEADLINE_S):
        async for event in engine.stream(request):
            assert finished is None, "nothing comes after the end"
            if isinstance(event, TextDelta | ReasoningDelta):
                texts.append(event.text)
                ids += event.token_ids
            elif isinstance(event, StreamFinished):
                finished = event
    assert finished is not None
    return Said("".join(texts), tuple(ids), finished, len(texts))


async def _first_text(stream: AsyncIterator[Any]) -> TextDelta:
    async with asyncio.timeout(DEADLINE_S):
        while not isinstance(event := await anext(stream), TextDelta):
            pass
        return event


async def _until(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await check():  # noqa: ASYNC110  The engine tells it only when it is asked.
            await asyncio.sleep(0.01)


def _endless() -> Sampling:
    return Sampling(temperature=0.0, ignore_eos=True)
