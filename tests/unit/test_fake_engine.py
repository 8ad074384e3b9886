"""Does the fake engine do what its script says?  (What all engines promise is in tests/conformance.)"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import Sampling
from arriero.engines import fake_text
from arriero.engines.base import EngineRequest, EngineSpec, LoadProgress, TextDelta
from arriero.engines.fake import EXIT_CODE, FakeEngine, script_of


class StepClock:
    """A clock on which every sleep ends at once, and is written down."""

    def __init__(self) -> None:
        self.slept_s: list[float] = []

    def monotonic_s(self) -> float:
        return sum(self.slept_s)

    def wall_s(self) -> float:
        return self.monotonic_s()

    async def sleep_s(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        await asyncio.sleep(0)


def spec(**options: Any) -> EngineSpec:
    return EngineSpec(Path("/nonexistent"), options=options)


async def loaded(clock: StepClock | None = None, **options: Any) -> FakeEngine:
    engine = FakeEngine(clock)
    async for _ in engine.load(spec(**options)):
        pass
    return engine


async def texts(engine: FakeEngine, max_tokens: int = 20, **given: Any) -> AsyncIterator[TextDelta]:
    request = EngineRequest("r", sampling=Sampling(max_tokens=max_tokens), **given)
    async for event in engine.stream(request):
        if isinstance(event, TextDelta):
            yield event


@pytest.mark.parametrize(
    "options",
    [{"speed": 1}, {"token_s": "fast"}, {"token_s": -1.0}, {"load_steps": 1.5}, {"child": "yes"}],
)
def test_unknown_and_wrong_knobs_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArrieroError) as caught:
        script_of(options)
    assert caught.value.code is ErrorCode.INVALID_REQUEST


async def test_it_counts_as_the_demo_model_does() -> None:
    engine = await loaded()
    messages = [{"role": "user", "content": "Count from 5 to 12."}]
    assert "".join([part.text async for part in texts(engine, messages=messages)]) == "5 6 7 8 9 10 11 12"
    await engine.unload(0.0)


@pytest.mark.parametrize("is_chat", [True, False])
async def test_another_one_continues_at_any_token(is_chat: bool) -> None:
    engine = await loaded()
    text = "alpha ñandú beta 🦙🦙"
    prompt = await engine.apply_template([{"role": "user", "content": text}], {}) if is_chat else text
    prompt_ids = await engine.tokenize(prompt)
    whole = [i async for part in texts(engine, 40, prompt_ids=prompt_ids) for i in part.token_ids]
    assert len(whole) == 40
    for cut in range(40):
        given = prompt_ids + whole[:cut]
        rest = [i async for part in texts(engine, 40 - cut, prompt_ids=given) for i in part.token_ids]
        assert whole[:cut] + rest == whole
    await engine.unload(0.0)


async def test_loading_takes_its_time_in_steps() -> None:
    clock = StepClock()
    engine = FakeEngine(clock)
    steps = [e async for e in engine.load(spec(load_s=8.0, load_steps=4)) if isinstance(e, LoadProgress)]
    assert [step.fraction for step in steps] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert clock.slept_s == [2.0] * 4


async def test_loading_fails_with_the_words_of_the_script() -> None:
    engine = FakeEngine()
    with pytest.raises(ArrieroError, match="no such luck") as caught:
        async for _ in engine.load(spec(fail_load="no such luck")):
            pass
    assert caught.value.code is ErrorCode.WORKER_START_FAILED
    assert caught.value.details["log_tail"] == ["no such luck"]


async def test_a_token_and_a_batch_of_the_prompt_take_token_s() -> None:
    clock = StepClock()
    engine = await loaded(clock, token_s=0.5)
    prompt_ids = [*fake_text.tokenize("a " * 300)]
    parts = [part async for part in texts(engine, 7, prompt_ids=prompt_ids)]
    assert len(parts) == 7
    assert clock.slept_s == [0.5] * (2 + 7)


@pytest.mark.parametrize("is_child", [False, True])
async def test_it_dies_after_so_many_tokens_of_a_stream(is_child: bool) -> None:
    engine = await loaded(exit_after_tokens=5, child=is_child)
    count = 0
    with pytest.raises(ArrieroError) as caught:
        async for _ in texts(engine, prompt="one two"):
            count += 1
    assert count == 5
    assert caught.value.code is ErrorCode.WORKER_LOST
    async with asyncio.timeout(60):
        end = await engine.wait_exited()
    assert engine.exited() == end
    assert (end.exit_code, end.signal) == ((None, 9) if is_child else (EXIT_CODE, None))
    assert not await engine.health()
    await engine.unload(0.0)


async def test_a_stream_that_stalls_ends_when_the_engine_is_unloaded() -> None:
    engine = await loaded(stall_after_tokens=2)
    seen: list[str] = []
    is_there = asyncio.Event()

    async def read() -> None:
        with pytest.raises(ArrieroError) as caught:
            async for part in texts(engine, prompt="one two"):
                seen.append(part.text)
                if len(seen) == 2:
                    is_there.set()
        assert caught.value.code is ErrorCode.WORKER_LOST

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(read())
        await is_there.wait()
        await engine.unload(0.0)


async def test_hanging_unload_waits_the_grace_time_out() -> None:
    clock = StepClock()
    engine = await loaded(clock, hang_unload=True)
    await engine.unload(3.0)
    await engine.unload(3.0)
    assert clock.slept_s == [3.0]
