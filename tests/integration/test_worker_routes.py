"""What does a worker answer on its native routes, right ones and wrong ones?  (Real process, real engine.)"""

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from arriero.contracts.errors import ErrorResponse
from arriero.contracts.events import DoneFrame, InferenceAnswer, TokenFrame
from arriero.contracts.records import WorkerHealth, WorkerReady
from arriero.contracts.states import WorkerState
from arriero.runtime.sse import SseEvent, SseParser
from arriero.testing.gguf_writer import write_llama
from arriero.testing.workers import HandWorker, hand_starter

GREEDY: dict[str, Any] = {"prompt": "the one", "max_tokens": 6, "temperature": 0.0}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandWorker]:
    folder: Path = tmp_path_factory.mktemp("worker")
    model = write_llama(folder / "model.gguf")
    with hand_starter(folder) as starter:
        yield starter.start(engine="llamacpp", model_path=str(model), context_tokens=256, slots=2)


def ask(
    worker: HandWorker, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers (lower case) and content."""
    connection = http.client.HTTPConnection(worker.url.removeprefix("http://"), timeout=60)
    try:
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, content, {**worker.headers, **(headers or {})})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def refused(
    worker: HandWorker, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, str]:
    """Return status and code of an error, having checked its shape."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    status, _, content = ask(worker, method, path, body, names)
    error = msgspec.json.decode(content, type=ErrorResponse).error
    assert error.details["suggested_action"]
    return status, error.code


def events(content: bytes) -> list[SseEvent]:
    return SseParser().feed(content)


def test_every_answer_says_who_gave_it(worker: HandWorker) -> None:
    for path in ("/v1/health", "/nope"):
        _, headers, _ = ask(worker, "GET", path, headers={"X-Request-Id": "mine-1"})
        assert headers["x-request-id"] == "mine-1"
        assert headers["x-arriero-node"] == "here"
        assert headers["x-arriero-worker"] == worker.spec.worker_id


def test_health_and_ready_of_an_idle_worker(worker: HandWorker) -> None:
    health = msgspec.json.decode(ask(worker, "GET", "/v1/health")[2], type=WorkerHealth)
    assert (health.status, health.state, health.slots_total, health.slots_busy) == ("alive", "idle", 2, 0)
    assert health.worker_id == worker.spec.worker_id
    assert health.context_tokens == 256
    assert health.memory_mb > 20
    assert health.engine_pid in {child.pid for child in worker.children()}
    ready = msgspec.json.decode(ask(worker, "GET", "/v1/ready")[2], type=WorkerReady)
    assert ready == WorkerReady(
        ready=True, state=WorkerState.IDLE, progress_url=f"{worker.url}/v1/progress", model_loaded=True
    )


def test_progress_told_late_is_the_present_state_then_done(worker: HandWorker) -> None:
    first, last = events(ask(worker, "GET", "/v1/progress")[2])
    assert json.loads(first.data)["stage"] == "ready"
    assert json.loads(first.data)["fraction"] == 1.0
    assert last.is_done


def test_a_stream_is_started_tokens_done_in_order_each_with_an_id(worker: HandWorker) -> None:
    status, headers, content = ask(worker, "POST", "/v1/inference/stream", GREEDY, {"X-Request-Id": "s-1"})
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-store"
    found = events(content)
    assert found.pop().is_done
    assert [event.event_id for event in found] == [str(n) for n in range(len(found))]
    frames = [json.loads(event.data) for event in found]
    assert frames[0] == {"request_id": "s-1", "started": True}
    tokens = [msgspec.convert(frame, TokenFrame) for frame in frames if "token" in frame]
    assert [token.index for token in tokens] == list(range(6))
    done = msgspec.convert(frames[-1], DoneFrame)
    assert (done.total_tokens, done.finish_reason, done.prompt_tokens) == (6, "length", 5)
    # The same at once, and by a browser's GET: the same tokens.
    answer = msgspec.json.decode(ask(worker, "POST", "/v1/inference", GREEDY)[2], type=InferenceAnswer)
    assert answer.token_ids == [token.id for token in tokens]
    assert answer.text == "".join(token.token for token in tokens)
    path = "/v1/inference/stream?prompt=the%20one&max_tokens=6&temperature=0"
    by_query = [json.loads(e.data) for e in events(ask(worker, "GET", path)[2]) if '"token"' in e.data]
    assert [frame["id"] for frame in by_query] == answer.token_ids


def test_prompt_ids_and_messages_are_prompts_too(worker: HandWorker) -> None:
    ids = json.loads(ask(worker, "POST", "/v1/tokenize", {"text": "the one"})[2])["token_ids"]
    by_text = json.loads(ask(worker, "POST", "/v1/inference", GREEDY)[2])
    asked = {"prompt_ids": ids, "max_tokens": 6, "temperature": 0.0}
    by_ids = json.loads(ask(worker, "POST", "/v1/inference", asked)[2])
    assert by_ids["token_ids"] == by_text["token_ids"]
    messages = [{"role": "user", "content": "one"}]
    rendered = json.loads(ask(worker, "POST", "/v1/tokenize", {"messages": messages})[2])
    assert "one" in rendered["text"] and rendered["text"] != "one"
    asked = {"messages": messages, "max_tokens": 6, "temperature": 0.0}
    by_messages = json.loads(ask(worker, "POST", "/v1/inference", asked)[2])
    asked = {"prompt": rendered["text"], "max_tokens": 6, "temperature": 0.0}
    assert by_messages["token_ids"] == json.loads(ask(worker, "POST", "/v1/inference", asked)[2])["token_ids"]


def test_a_browser_that_comes_back_starts_nothing_again(worker: HandWorker) -> None:
    before = ask(worker, "GET", "/metrics")[2]
    status, _, content = ask(worker, "GET", "/v1/inference/stream?prompt=x", headers={"Last-Event-ID": "3"})
    assert (status, content) == (204, b"")
    tokens = [line for line in before.splitlines() if line.startswith(b"arriero_worker_completion_tokens")]
    assert all(line in ask(worker, "GET", "/metrics")[2].splitlines() for line in tokens)


def test_metrics_count_what_was_done(worker: HandWorker) -> None:
    def value(name: str) -> float:
        lines = ask(worker, "GET", "/metrics")[2].decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"arriero_worker_{name} ")).split()[-1])

    done, tokens = value('requests_total{outcome="done"}'), value("completion_tokens_total")
    first_tokens = value("first_token_seconds_count")
    ask(worker, "POST", "/v1/inference", GREEDY)
    assert value('requests_total{outcome="done"}') == done + 1
    assert value("completion_tokens_total") == tokens + 6
    assert value("first_token_seconds_count") == first_tokens + 1
    assert value("slots") == 2
    assert value("load_seconds") > 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 3}, "prompt"),
        ({"prompt": "a", "prompt_ids": [1]}, "prompt_ids"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "temperature": 3}, "temperature"),
        ({"prompt": "a", "temperature": "warm"}, "temperature"),
        ({"prompt": "a", "timeout": 0}, "timeout"),
        ({"prompt": "a", "colour": "red"}, "colour"),
        ({"prompt_ids": [-1]}, "prompt_ids[0]"),
        ([1, 2], None),
        (b"{", None),
        (b"\xff\xfe", None),
        (b"[" * 100_000, None),
    ],
)
def test_a_body_that_is_not_valid_names_the_field(
    worker: HandWorker, body: object, param: str | None
) -> None:
    status, _, content = ask(worker, "POST", "/v1/inference/stream", body)
    error = msgspec.json.decode(content, type=ErrorResponse).error
    assert (status, error.code, error.details.get("param")) == (400, "INVALID_REQUEST", param), error


def test_a_number_out_of_bounds_is_told_with_its_limit(worker: HandWorker) -> None:
    _, _, content = ask(worker, "POST", "/v1/inference", {"prompt": "a", "max_tokens": 0})
    message = msgspec.json.decode(content, type=ErrorResponse).error.message
    assert "max_tokens is 0" in message and ">= 1" in message


def test_a_prompt_that_does_not_fit_is_refused_before_the_first_byte(worker: HandWorker) -> None:
    for body in ({"prompt": "no " * 400}, {"prompt_ids": [5] * 256}, {"prompt": "z" * 7_900_000}):
        status, _, content = ask(worker, "POST", "/v1/inference/stream", body)
        error = msgspec.json.decode(content, type=ErrorResponse).error
        assert (status, error.code) == (400, "CONTEXT_LENGTH_EXCEEDED")
        assert error.details["n_ctx"] == 256
        assert error.details["n_prompt_tokens"] >= 256


def test_a_body_over_the_limit_is_refused_and_disturbs_nobody(worker: HandWorker) -> None:
    large = b'{"prompt": "' + b"x" * 10_000_000 + b'"}'
    assert refused(worker, "POST", "/v1/inference", large) == (413, "REQUEST_TOO_LARGE")
    assert ask(worker, "POST", "/v1/inference", GREEDY)[0] == 200


@pytest.mark.parametrize("text", ["0", "-5", "nan", "soon", "1e300"])
def test_a_deadline_that_is_none_is_refused(worker: HandWorker, text: str) -> None:
    answer = refused(worker, "POST", "/v1/inference", GREEDY, X_Request_Deadline=text)
    assert answer == (400, "INVALID_REQUEST")


def test_queries_are_checked_like_bodies(worker: HandWorker) -> None:
    for query in ("prompt=a&max_tokens=0", "prompt=a&colour=red", "prompt=a&prompt=b", "", "prompt=%ff"):
        assert refused(worker, "GET", f"/v1/inference/stream?{query}") == (400, "INVALID_REQUEST"), query


def test_strangers_are_kept_out(worker: HandWorker) -> None:
    path = "/v1/health"
    assert refused(worker, "GET", path, Authorization="Bearer wrong") == (401, "INVALID_API_KEY")
    assert refused(worker, "GET", path, Authorization="Basic x") == (401, "MISSING_API_KEY")
    assert refused(worker, "GET", path, Origin="https://evil.example") == (403, "FORBIDDEN")
    assert refused(worker, "GET", path, Host="evil.example") == (403, "FORBIDDEN")
    assert worker.token not in worker.log()


def test_what_is_not_there_and_what_may_not_be_done(worker: HandWorker) -> None:
    assert refused(worker, "GET", "/v1/nothing") == (404, "NOT_FOUND")
    assert refused(worker, "DELETE", "/v1/inference/") == (404, "NOT_FOUND")
    assert refused(worker, "PUT", "/v1/health") == (405, "INVALID_REQUEST")


def test_cancelling_what_is_not_there_is_no_error(worker: HandWorker) -> None:
    for _ in range(2):
        status, _, content = ask(worker, "DELETE", "/v1/inference/unknown-1")
        assert (status, content) == (204, b"")


def test_prompts_are_not_logged(worker: HandWorker) -> None:
    ask(worker, "GET", "/v1/inference/stream?prompt=verysecret&max_tokens=2")
    ask(worker, "POST", "/v1/inference", {"prompt": "verysecret", "max_tokens": 2})
    assert "verysecret" not in worker.log()
