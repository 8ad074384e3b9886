"""Does OpenAI's own SDK find what it expects at a worker?  (Real process, real engine, real SDK.)"""

import base64
import http.client
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from arriero.testing.gguf_writer import write_llama
from arriero.testing.workers import HandWorker, hand_starter

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"to {name}",
            "parameters": {
                "type": "object",
                "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
                "required": ["digit"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("add", "drop")
]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HandWorker]:
    folder: Path = tmp_path_factory.mktemp("worker")
    model = write_llama(folder / "model.gguf")
    with hand_starter(folder) as starter:
        yield starter.start(
            engine="llamacpp",
            model_path=str(model),
            model_ref="file:///m.gguf",
            context_tokens=1024,
            threads=1,
        )


@pytest.fixture
def client(worker: HandWorker) -> Iterator[openai.OpenAI]:
    with (
        openai.DefaultHttpxClient(trust_env=False, timeout=60) as http_client,
        openai.OpenAI(
            base_url=f"{worker.url}/v1", api_key=worker.token, max_retries=0, http_client=http_client
        ) as found,
    ):
        yield found


def raw_stream(worker: HandWorker, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the chunks of a stream, having checked that each has an id line and that [DONE] is last."""
    connection = http.client.HTTPConnection(worker.url.removeprefix("http://"), timeout=60)
    try:
        connection.request("POST", path, json.dumps({**body, "stream": True}), worker.headers)
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    *frames, done, nothing = text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    for number, frame in enumerate(frames):
        assert frame.startswith(f"id: {number}\ndata: ")
    return [json.loads(frame.partition("data: ")[2]) for frame in frames]


def test_chat_at_once(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="any", messages=HELLO, max_completion_tokens=5, temperature=0, seed=1
    )
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "file:///m.gguf")
    assert answer.created > 1_700_000_000 and answer.system_fingerprint
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.logprobs is None and choice.message.tool_calls is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5


def test_chat_as_a_stream_says_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "any", "messages": HELLO, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(not chunk.choices[0].delta.role for chunk in chunks[1:-1])
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "length"
    ]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    last = chunks[-1]
    assert last.choices == [] and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_usage_comes_in_a_stream_only_when_asked_for(worker: HandWorker) -> None:
    body = {"messages": HELLO, "max_tokens": 2}
    assert all("usage" not in chunk for chunk in raw_stream(worker, "/v1/chat/completions", body))
    asked = {**body, "stream_options": {"include_usage": True}}
    *chunks, last = raw_stream(worker, "/v1/chat/completions", asked)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + 2


def test_the_sdks_stream_helper_and_a_stop_word(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "any", "messages": HELLO, "max_tokens": 12, "temperature": 0}
    text = client.chat.completions.create(**asked).choices[0].message.content or ""
    word = next(letter for letter in text[1:] if letter.isascii() and letter != text[0])
    stopped = client.chat.completions.create(**asked, stop=[word]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == text[: text.index(word)]
    with client.chat.completions.stream(**asked, stop=[word]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == stopped.message.content


def test_logprobs_of_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="any", messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in logprobs.content)


def test_an_answer_in_a_json_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["digit"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="any",
        messages=HELLO,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        max_tokens=300,
    )
    found = json.loads(answer.choices[0].message.content or "")
    assert set(found) == {"digit"} and 0 <= found["digit"] <= 9


def test_a_tool_call_that_is_demanded_is_made(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "any", "messages": HELLO, "tools": TOOLS, "max_tokens": 400, "seed": 3}
    (choice,) = client.chat.completions.create(**asked, tool_choice="required").choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.id.startswith("call_")
    assert call.function.name in {"add", "drop"}
    assert 0 <= json.loads(call.function.arguments)["digit"] <= 9
    named: Any = {"type": "function", "function": {"name": "drop"}}
    (choice,) = client.chat.completions.create(**asked, tool_choice=named).choices
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "drop"
    with client.chat.completions.stream(**asked, tool_choice=named) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    (parsed,) = final.choices[0].message.tool_calls or []
    assert parsed.function.name == "drop"


def test_completions_of_one_prompt_of_ids_and_of_several(client: openai.OpenAI, worker: HandWorker) -> None:
    asked: dict[str, Any] = {"model": "any", "max_tokens": 4, "temperature": 0}
    one = client.completions.create(**asked, prompt="the one")
    assert one.id.startswith("cmpl-") and one.object == "text_completion"
    assert (one.choices[0].index, one.choices[0].finish_reason) == (0, "length")
    assert one.usage is not None and one.usage.completion_tokens == 4
    ids = json.loads(_post(worker, "/v1/tokenize", {"text": "the one"}))["token_ids"]
    assert client.completions.create(**asked, prompt=ids).choices[0].text == one.choices[0].text
    two = client.completions.create(**asked, prompt=["the one", "other"])
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].text == one.choices[0].text
    assert two.usage is not None and two.usage.completion_tokens == 8
    chunks = list(client.completions.create(**asked, prompt=["the one", "other"], stream=True))
    for index in (0, 1):
        text = "".join(c.choices[0].text for c in chunks if c.choices[0].index == index)
        assert text == two.choices[index].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"] * 2


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="any", prompt="a", max_tokens=3, temperature=0, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs or ()) == len(logprobs.text_offset or ()) > 0
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs or ())


def test_embeddings_as_numbers_and_as_base64(client: openai.OpenAI, worker: HandWorker) -> None:
    two = client.embeddings.create(model="any", input=["one", "other"], encoding_format="float")
    assert [row.index for row in two.data] == [0, 1]
    assert two.object == "list" and two.usage.total_tokens == two.usage.prompt_tokens > 0
    assert two.data[0].embedding != two.data[1].embedding
    # The SDK's own default asks for base64 and decodes it.
    again = client.embeddings.create(model="any", input="one")
    assert again.data[0].embedding == pytest.approx(two.data[0].embedding, abs=1e-6)
    raw = json.loads(_post(worker, "/v1/embeddings", {"input": "one", "encoding_format": "base64"}))
    content = base64.b64decode(raw["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(content) // 4}f", content)) == pytest.approx(
        two.data[0].embedding, abs=1e-6
    )
    ids = json.loads(_post(worker, "/v1/tokenize", {"text": "one"}))["token_ids"]
    for given in (ids, [ids]):
        row = client.embeddings.create(model="any", input=given, encoding_format="float").data[0]
        assert row.embedding == pytest.approx(two.data[0].embedding, abs=1e-4)
    length = len(two.data[0].embedding)
    assert client.embeddings.create(model="any", input="one", dimensions=length).data
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="any", input="one", dimensions=length - 1)
    assert caught.value.param == "dimensions"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 2}, "n"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"temperature": 9}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_field(
    client: openai.OpenAI, change: dict[str, Any], param: str
) -> None:
    asked: dict[str, Any] = {"model": "any", "messages": HELLO, "max_tokens": 3, **change}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked)
    assert (caught.value.code, caught.value.type) == ("INVALID_REQUEST", "invalid_request_error")
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_what_completions_cannot_do(client: openai.OpenAI, change: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "any", "prompt": "x", "max_tokens": 3, **change})
    assert caught.value.param == param


def test_unknown_fields_and_text_parts_are_taken(client: openai.OpenAI) -> None:
    parts: Any = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    asked: dict[str, Any] = {"model": "any", "max_tokens": 5, "temperature": 0}
    by_parts = client.chat.completions.create(
        **asked, messages=[{"role": "user", "content": parts}], extra_body={"store": True, "new_field": 1}
    )
    by_text = client.chat.completions.create(**asked, messages=HELLO)
    assert by_parts.choices[0].message.content == by_text.choices[0].message.content


def test_errors_become_the_sdks_exceptions(client: openai.OpenAI, worker: HandWorker) -> None:
    long: list[Any] = [{"role": "user", "content": "no " * 3000}]
    for is_stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="any", messages=long, stream=is_stream)
        assert caught.value.code == "CONTEXT_LENGTH_EXCEEDED"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(model="any", messages=HELLO)
    # In the middle of a stream: the whole envelope, which the SDK raises.
    endless: dict[str, Any] = {"ignore_eos": True, "timeout": 0.4}
    with pytest.raises(openai.APIError) as late:
        for _ in client.chat.completions.create(model="any", messages=HELLO, stream=True, extra_body=endless):
            pass
    assert late.value.code == "REQUEST_TIMEOUT"
    assert worker.process.poll() is None


def _post(worker: HandWorker, path: str, body: dict[str, Any]) -> str:
    connection = http.client.HTTPConnection(worker.url.removeprefix("http://"), timeout=60)
    try:
        connection.request("POST", path, json.dumps(body), worker.headers)
        return connection.getresponse().read().decode()
    finally:
        connection.close()
