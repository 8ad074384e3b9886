"""The whole path with every part real: OpenAI's SDK, orchestrator, agent, workers, engines."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from arriero.client.api import task_events
from arriero.contracts.errors import ArrieroError
from arriero.contracts.events import TaskEvent, TaskFailed, TaskQueued, TaskToken
from arriero.contracts.records import WorkerRecord
from arriero.contracts.requests import SpawnBody, TaskBody
from arriero.contracts.states import NodeState, WorkerState
from arriero.testing.gguf_writer import write_llama
from arriero.testing.pool import Pool, eventually

COUNT: list[Any] = [{"role": "user", "content": "Count from 5 to 25."}]


@pytest.fixture(scope="module")
def demo_pool() -> Iterator[Pool]:
    with Pool({"stop_grace_s": 2}) as pool:
        pool.start()
        # Its worker belongs to all tests: none of them is to be told that it left it behind.
        pool.orchestrator.spawn(SpawnBody(model_ref="demo"))
        eventually("the demo model is loaded", lambda: is_idle(pool, "demo"))
        yield pool
        assert pool.stop() == []


@pytest.fixture
def sdk(demo_pool: Pool) -> Iterator[OpenAI]:
    url = demo_pool.record("orchestrator").url
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def new_fake_pool() -> Pool:
    return Pool({"engine": "fake", "stop_grace_s": 2})


@pytest.fixture(scope="module")
def fake_pool() -> Iterator[Pool]:
    with new_fake_pool() as pool:
        pool.start()
        yield pool
        assert pool.stop() == []


@contextmanager
def worker(pool: Pool, folder: Path, **options: Any) -> Iterator[str]:
    """Have an idle worker with the fake engine, for a model of its own; yield the model's reference."""
    model_ref = write_llama(folder / "a.gguf").as_uri()
    pool.orchestrator.spawn(SpawnBody(model_ref=model_ref, engine="fake", options=options))
    eventually("the worker is idle", lambda: is_idle(pool, model_ref))
    try:
        yield model_ref
    finally:
        for record in workers(pool, model_ref):
            pool.orchestrator.stop_worker(record.worker_id)
        eventually("the workers are gone", lambda: not workers(pool, model_ref))


def workers(pool: Pool, model_ref: str) -> list[WorkerRecord]:
    return [record for record in pool.orchestrator.workers() if record.model_ref == model_ref]


def statuses(pool: Pool) -> list[NodeState]:
    return [node.status for node in pool.orchestrator.nodes()]


def is_idle(pool: Pool, model_ref: str) -> bool:
    found = workers(pool, model_ref)
    return bool(found) and all(
        record.state is WorkerState.IDLE and record.slots_available == record.slots_total for record in found
    )


class Reader(threading.Thread):
    """Runs a task and keeps its events."""

    def __init__(self, pool: Pool, body: TaskBody) -> None:
        super().__init__()
        self.events: list[TaskEvent] = []
        self.stream = pool.orchestrator.run_task(body, total_s=60)
        self.failure: ArrieroError | None = None
        #: It leaves after the next event.
        self.let_go = threading.Event()

    def run(self) -> None:
        with self.stream:
            try:
                for event in task_events(self.stream):
                    self.events.append(event)
                    if isinstance(event, TaskFailed) or self.let_go.is_set():
                        return
            except ArrieroError as error:
                self.failure = error

    @classmethod
    def to_its_end(cls, pool: Pool, body: TaskBody) -> "Reader":
        reader = cls(pool, body)
        reader.start()
        reader.join(70)
        return reader

    @property
    def failed_with(self) -> str:
        last = self.events[-1]
        return last.error.code if isinstance(last, TaskFailed) else ""

    @property
    def tokens(self) -> list[TaskToken]:
        return [event for event in self.events if isinstance(event, TaskToken)]


def test_the_sdk_chats_and_streams_the_same(sdk: OpenAI) -> None:
    whole = sdk.chat.completions.create(model="demo", messages=COUNT, temperature=0, max_tokens=40)
    assert whole.model == "demo"
    text = whole.choices[0].message.content
    assert text and text.startswith("5 6 7")
    with sdk.chat.completions.create(
        model="demo", messages=COUNT, temperature=0, max_tokens=40, stream=True,
        stream_options={"include_usage": True},
    ) as stream:  # fmt: skip
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_whatever_generates_is_measured(sdk: OpenAI, demo_pool: Pool) -> None:
    def told() -> float:
        (worker,) = workers(demo_pool, "demo")
        return worker.tokens_per_s

    known = {0.0, told()}
    sdk.chat.completions.create(model="demo", messages=COUNT, temperature=0, max_tokens=40)
    eventually("a speed is told", lambda: told() not in known)
    known.add(told())
    with sdk.completions.create(model="demo", prompt="5 6 7", max_tokens=40, stream=True) as stream:
        list(stream)
    eventually("another one is told", lambda: told() not in known)
    explained = demo_pool.orchestrator.explain(TaskBody(model="demo"))
    assert explained.nodes[0].speed_tokens_per_s == told()


def test_the_sdk_completes_embeds_and_lists(sdk: OpenAI) -> None:
    completion = sdk.completions.create(model="demo", prompt="Once upon", max_tokens=5, temperature=0)
    assert completion.usage is not None and completion.usage.completion_tokens == 5
    vectors = sdk.embeddings.create(model="demo", input=["one", "two"])
    assert [vector.index for vector in vectors.data] == [0, 1]
    assert any(vectors.data[0].embedding)
    assert "demo" in [model.id for model in sdk.models.list()]
    assert sdk.models.retrieve("demo").object == "model"


def test_the_sdk_says_where_a_request_is_computed(sdk: OpenAI, demo_pool: Pool) -> None:
    (here,) = demo_pool.orchestrator.nodes()
    place = {"arriero": {"node": here.name, "backend": "cpu"}}
    answer = sdk.chat.completions.with_raw_response.create(
        model="demo", messages=COUNT, max_tokens=3, extra_body=place
    )
    assert answer.headers["X-Arriero-Node"] == here.name
    assert sdk.embeddings.create(model="demo", input="one", extra_body=place).data
    assert sdk.completions.create(model="demo", prompt="Once", max_tokens=3, extra_body=place).choices
    with pytest.raises(openai.NotFoundError) as refused:
        sdk.chat.completions.create(model="demo", messages=COUNT, extra_body={"arriero": {"node": "lima"}})
    assert refused.value.code == "NODE_NOT_FOUND"
    with pytest.raises(openai.BadRequestError) as wrong:
        sdk.completions.create(model="demo", prompt="x", extra_body={"arriero": {"nodes": ["lima"]}})
    assert (wrong.value.code, wrong.value.param) == ("INVALID_REQUEST", "arriero.nodes")


def test_the_sdk_raises_its_own_errors(sdk: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.chat.completions.create(model="gpt-4", messages=COUNT)
    assert (refused.value.code, refused.value.param) == ("INVALID_MODEL_REFERENCE", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.chat.completions.create(model="demo", messages=COUNT, max_tokens=-1)
    assert refused.value.code == "INVALID_REQUEST"
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.completions.create(model="demo", prompt="count " * 5000, stream=True)
    assert refused.value.code == "CONTEXT_LENGTH_EXCEEDED"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("hf:no/such")
    with pytest.raises(openai.BadRequestError) as refused:
        sdk.chat.completions.create(model="file:///no/such/model.gguf", messages=COUNT, stream=True)
    assert refused.value.code == "INVALID_MODEL_PATH"


def test_a_stream_that_is_left_frees_its_slot(sdk: OpenAI, demo_pool: Pool) -> None:
    with sdk.completions.create(
        model="demo", prompt="Once upon a time", stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(iter(stream))
    eventually("the slot is free", lambda: is_idle(demo_pool, "demo"))


def test_sixteen_streams_on_four_slots_all_complete_and_tell_their_place(
    fake_pool: Pool, tmp_path: Path
) -> None:
    with worker(fake_pool, tmp_path, token_s=0.02) as model:
        holders = [Reader(fake_pool, TaskBody(model=model, prompt="on", max_tokens=4000)) for _ in range(4)]
        for holder in holders:
            holder.start()
        eventually("all slots are taken", lambda: all(holder.tokens for holder in holders))
        body = TaskBody(model=model, prompt="x", max_tokens=8, temperature=0)
        readers = [Reader(fake_pool, body) for _ in range(16)]
        for reader in readers:
            reader.start()
        eventually("all others wait", lambda: workers(fake_pool, model)[0].queued == 16)
        for holder in holders:
            holder.let_go.set()
        for reader in (*holders, *readers):
            reader.join(70)
        assert [(reader.failure, len(reader.tokens)) for reader in readers] == [(None, 8)] * 16
        assert len({"".join(token.token for token in reader.tokens) for reader in readers}) == 1
        positions = [
            [event.position for event in reader.events if isinstance(event, TaskQueued)]
            for reader in (*holders, *readers)
        ]
        assert [bool(told) for told in positions] == [False] * 4 + [True] * 16
        assert all(told == sorted(told, reverse=True) for told in positions)
        assert [record.slots_total for record in workers(fake_pool, model)] == [4]


def test_a_killed_worker_ends_its_streams_with_one_error_and_the_next_request_works(
    fake_pool: Pool, tmp_path: Path
) -> None:
    with worker(fake_pool, tmp_path, token_s=0.05) as model:
        reader = Reader(fake_pool, TaskBody(model=model, prompt="x", max_tokens=2000))
        reader.start()
        eventually("tokens flow", lambda: len(reader.tokens) > 2)
        url = fake_pool.record("orchestrator").url
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as sdk:
            stream = sdk.completions.create(model=model, prompt="x", max_tokens=2000, stream=True)
            next(iter(stream))
            os.kill(workers(fake_pool, model)[0].pid, signal.SIGKILL)
            with pytest.raises(openai.APIError) as broken:
                list(stream)
        assert broken.value.code == "WORKER_LOST"
        reader.join(70)
        failed = reader.events[-1]
        assert isinstance(failed, TaskFailed) and failed.error.code == "WORKER_LOST"
        assert failed.error.details["signal"] == "SIGKILL"
        again = Reader.to_its_end(fake_pool, TaskBody(model=model, prompt="x", max_tokens=3))
        assert (again.failure, len(again.tokens)) == (None, 3)


def test_an_engine_that_dies_in_the_stream_shows_what_came(fake_pool: Pool, tmp_path: Path) -> None:
    with worker(fake_pool, tmp_path, exit_after_tokens=5) as model:
        reader = Reader.to_its_end(fake_pool, TaskBody(model=model, prompt="x", max_tokens=50))
        assert (reader.failed_with, len(reader.tokens)) == ("WORKER_LOST", 5)


def test_one_deadline_frees_the_slot_everywhere(fake_pool: Pool, tmp_path: Path) -> None:
    with worker(fake_pool, tmp_path, stall_after_tokens=3) as model:
        body = TaskBody(model=model, prompt="x", max_tokens=50, timeout=5.0)
        reader = Reader.to_its_end(fake_pool, body)
        assert (reader.failed_with, len(reader.tokens)) == ("REQUEST_TIMEOUT", 3)
        eventually("the slot is free", lambda: is_idle(fake_pool, model))


def test_a_load_that_fails_says_why(fake_pool: Pool, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "a.gguf")
    record = fake_pool.orchestrator.spawn(
        SpawnBody(
            model_ref=model.as_uri(),
            engine="fake",
            options={"load_s": 4.5, "load_steps": 1, "fail_load": "no tensors"},
        )
    )
    reader = Reader.to_its_end(fake_pool, TaskBody(model=model.as_uri(), prompt="x"))
    assert reader.failed_with == "WORKER_START_FAILED"
    ended = fake_pool.orchestrator.worker(record.worker_id)
    assert ended.state is WorkerState.FAILED and ended.exit is not None
    assert ended.exit.code == "WORKER_START_FAILED"


def test_an_agent_is_killed_and_replaced_while_a_stream_flows(tmp_path: Path) -> None:
    with new_fake_pool() as pool:
        pool.start()
        with worker(pool, tmp_path, token_s=0.05) as model:
            reader = Reader(pool, TaskBody(model=model, prompt="x", max_tokens=160))
            reader.start()
            eventually("tokens flow", lambda: len(reader.tokens) > 2)
            pool.kill("agent")

            def state() -> NodeState:
                return pool.orchestrator.nodes()[0].status

            eventually("the node is gone", lambda: state() is NodeState.UNREACHABLE)
            pool.start("agent")
            eventually("the node is back", lambda: state() is NodeState.READY)
            reader.join(70)
            assert (reader.failure, len(reader.tokens)) == (None, 160)
            eventually("the slot is free", lambda: is_idle(pool, model))
        assert pool.stop() == []


def test_an_orchestrator_is_killed_and_the_next_one_finds_the_worker(tmp_path: Path) -> None:
    with new_fake_pool() as pool:
        pool.start()
        with worker(pool, tmp_path) as model:
            before = workers(pool, model)
            pool.kill("orchestrator")
            pool.start("orchestrator")
            eventually("the worker is known", lambda: is_idle(pool, model))
            assert [r.worker_id for r in workers(pool, model)] == [r.worker_id for r in before]
            reader = Reader.to_its_end(pool, TaskBody(model=model, prompt="x", max_tokens=3))
            assert len(reader.tokens) == 3
        assert pool.stop() == []


def test_with_cascade_the_orchestrator_takes_the_agent_along() -> None:
    with new_fake_pool() as pool:
        pool.start("agent")
        daemon = pool.begin("orchestrator", "--cascade")
        try:
            eventually("the node is ready", lambda: statuses(pool) == [NodeState.READY])
            reader = Reader.to_its_end(pool, TaskBody(prompt="x", max_tokens=3))
            assert (reader.failure, len(reader.tokens)) == (None, 3), reader.events
            daemon.terminate()
            assert daemon.wait(60) == 0
        finally:
            daemon.kill()
            daemon.communicate()
        assert pool.process("agent").wait(30) == 0
        assert pool.state.worker_runs() == []
        assert pool.stop() == []
