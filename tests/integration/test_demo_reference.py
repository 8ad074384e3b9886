"""Does the engine, running the demo model, agree with the reference tokens from PyTorch?"""

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from arriero import demo_model

_REFERENCE: Final[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "reference" / "demo_tokens.json").read_text(encoding="utf-8")
)
_CASES: Final[list[dict[str, Any]]] = _REFERENCE["cases"]
_CHATS: Final = [case for case in _CASES if "messages" in case]
_READY_WITHIN_S: Final = 60.0
_STOP_WITHIN_S: Final = 60.0
#: Runs in the child: one server on a unix socket, ended by the end of its standard input.
_CHILD: Final = """
import sys
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames = [sys.argv[2]]
params.n_ctx = 1024
params.n_parallel = 1
params.n_gpu_layers = 0
params.cpuparams.n_threads = 1
params.cache_ram_mib = 0
params.use_jinja = True
params.ui = False
params.endpoint_slots = False
server = xllamacpp.Server(params)
sys.stdin.read()
"""
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
_TOKENIZED: Final = (
    "Count from 5 to 25.",
    "12345 67 8  9   10\t11\n\n 12",
    "It's what they're saying; I'd've said we'll see. DON'T 'tis",
    "naïve café Ñandú übergröße ¿qué?",
    "日本語 テスト 한국어 中文123 ١٢٣ Ⅷ½²",
    "🦙 llama 🦙🏔️ 👩‍👩‍👧 e\u0301",
    ' {"name": "Ada", "age": 36}\n</tool_call>  ',
    "\u00a0non\u2003breaking\u3000spaces \r\n end",
    "a" * 50 + " " * 20 + "_-_-_!!!???...",
)


class _Engine:
    """Talks to one engine over its unix socket."""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path

    def post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        status, answer = self.request("POST", route, body)
        assert status == 200, answer
        return answer

    def request(
        self, method: str, route: str, body: dict[str, Any] | None = None
    ) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("localhost", timeout=60)
        try:
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(15)
            connection.sock.connect(self._socket_path)
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request(method, route, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def greedy_ids(self, prompt_ids: list[int], *, tokens_max: int) -> list[int]:
        answer = self.post(
            "/completion",
            {
                "prompt": prompt_ids,
                "n_predict": tokens_max,
                "temperature": 0,
                "return_tokens": True,
                "cache_prompt": False,
            },
        )
        ids: list[int] = answer["tokens"]
        return ids


@pytest.fixture(scope="module")
def engine() -> Iterator[_Engine]:
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        socket_path = f"{folder}/engine.sock"
        with (Path(folder) / "stderr").open("wb") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(demo_model.path()), socket_path],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            )
        assert child.stdin is not None
        try:
            engine = _Engine(socket_path)
            _wait_ready(engine, child, Path(folder) / "stderr")
            yield engine
        finally:
            child.stdin.close()
            try:
                child.wait(_STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _wait_ready(engine: _Engine, child: "subprocess.Popen[bytes]", stderr: Path) -> None:
    deadline = time.monotonic() + _READY_WITHIN_S
    while True:
        try:
            if engine.request("GET", "/health")[0] == 200:
                return
        except OSError:
            pass
        last = stderr.read_text(encoding="utf-8", errors="replace")[-2000:]
        assert child.poll() is None, last
        assert time.monotonic() < deadline, last
        time.sleep(0.02)


@pytest.mark.parametrize("case", _CASES, ids=[str(index) for index in range(len(_CASES))])
def test_greedy_tokens_equal_the_reference(engine: _Engine, case: dict[str, Any]) -> None:
    expected = case["token_ids"]
    assert engine.greedy_ids(case["prompt_ids"], tokens_max=len(expected)) == expected


@pytest.mark.parametrize("case", _CASES, ids=[str(index) for index in range(len(_CASES))])
def test_engine_reads_the_prompt_as_the_reference_does(engine: _Engine, case: dict[str, Any]) -> None:
    body = {"content": case["prompt"], "add_special": True, "parse_special": True}
    assert engine.post("/tokenize", body)["tokens"] == case["prompt_ids"]


@pytest.mark.parametrize("case", _CHATS, ids=[str(index) for index in range(len(_CHATS))])
def test_engine_renders_the_chat_as_the_reference_does(engine: _Engine, case: dict[str, Any]) -> None:
    body: dict[str, Any] = {key: case[key] for key in ("messages", "tools") if key in case}
    assert engine.post("/apply-template", body)["prompt"] == case["prompt"]


def test_the_reference_is_not_trivial() -> None:
    assert len(_CASES) >= 24
    assert any(case["finish_reason"] == "length" for case in _CASES)
    assert max(len(case["token_ids"]) for case in _CASES) >= 190


@pytest.mark.parametrize("text", _TOKENIZED)
def test_tokenizing_any_text_can_be_undone(engine: _Engine, text: str) -> None:
    ids = engine.post("/tokenize", {"content": text})["tokens"]
    assert engine.post("/detokenize", {"tokens": ids})["content"] == text


def test_a_tool_call_comes_back_as_one(engine: _Engine) -> None:
    answer = engine.post(
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
            "tools": [_TOOL],
            "temperature": 0,
        },
    )
    choice = answer["choices"][0]
    call = choice["message"]["tool_calls"][0]["function"]
    assert choice["finish_reason"] == "tool_calls"
    assert call["name"] == "get_weather"
    assert json.loads(call["arguments"]) == {"city": "Paris"}


def test_an_answer_without_a_tool_stays_text(engine: _Engine) -> None:
    answer = engine.post(
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "Count from 5 to 25."}],
            "tools": [_TOOL],
            "temperature": 0,
        },
    )
    message = answer["choices"][0]["message"]
    assert not message.get("tool_calls")
    assert message["content"] == " ".join(str(number) for number in range(5, 26))
