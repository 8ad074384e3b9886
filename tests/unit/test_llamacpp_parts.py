"""Do the parts of the llama.cpp adapter read what llama.cpp writes?  (Without the engine.)"""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import Sampling
from arriero.engines.base import (
    EngineExit,
    EngineRequest,
    EngineSpec,
    ReasoningDelta,
    StreamFinished,
    TextDelta,
    ToolCallDelta,
)
from arriero.engines.gguf import read_header
from arriero.engines.llamacpp_estimate import MemoryTable
from arriero.engines.llamacpp_load import LoadState, fail_for_exit
from arriero.engines.llamacpp_params import environment_of, line_of, options_of
from arriero.engines.llamacpp_stream import ChatReader, CompletionReader, body_of
from arriero.engines.token_pieces import UNKNOWN_ID, TokenPieces, byte_letters, read
from arriero.testing.gguf_writer import ARRAY, STRING, llama_file, write_llama

# --- Progress --------------------------------------------------------------------------------


def state_line(value: Any, current: str = "text_model", stages: Any = ("text_model",)) -> bytes:
    payload = {"stages": list(stages), "current": current, "value": value}
    return b"cmd_child_to_router:state:" + json.dumps({"state": "loading", "payload": payload}).encode()


def test_progress_is_one_fraction_over_the_stages() -> None:
    state = LoadState()
    fractions = []
    for stage, value in (("a", 0.0), ("a", 0.5), ("a", 1.0), ("b", 0.5), ("b", 1.0)):
        state.take(state_line(value, stage, ("a", "b")))
        fractions.append(state.fraction)
    assert fractions == [0.0, 0.25, 0.5, 0.75, 1.0]
    # Lines that came at once, before anybody was told, are all told.
    assert list(state.untold) == fractions
    assert not state.is_ready
    state.take(b'cmd_child_to_router:state:{"state":"ready","payload":{}}')
    assert state.is_ready


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\xff\xfe",
        b"cmd_child_to_router:state:",
        b"cmd_child_to_router:state:[1]",
        b'cmd_child_to_router:state:{"state":"loading"}',
        b'cmd_child_to_router:state:{"state":"loading","payload":{"value":"x"}}',
        b'cmd_child_to_router:state:{"state":"loading","payload":{"value":true}}',
        b'cmd_child_to_router:other:{"state":"ready"}',
        state_line(7.0, stages=[])[:-4],
    ],
)
def test_lines_that_are_not_understood_are_passed_over(line: bytes) -> None:
    state = LoadState()
    state.take(state_line(0.5))
    state.take(line)
    assert (state.fraction, state.is_ready) == (0.5, False)


def test_progress_never_falls_and_stays_within_one() -> None:
    state = LoadState()
    for value in (0.5, 0.2, -3, 9.0):
        state.take(state_line(value))
    assert state.fraction == 1.0


# --- Ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "backend", "code"),
    [
        (EngineExit(None, 9, True), "cpu", ErrorCode.OUT_OF_MEMORY),
        (EngineExit(None, 9, False), "cpu", ErrorCode.WORKER_START_FAILED),
        (EngineExit(67, None, False), "cuda", ErrorCode.BACKEND_UNAVAILABLE),
        (EngineExit(66, None, False, ("0.1 E x: data is not within the file bounds",)), "cpu", ErrorCode.MODEL_CORRUPTED),
        (EngineExit(66, None, False, ("0.1 E x: failed to allocate buffer",)), "cpu", ErrorCode.INSUFFICIENT_RAM),
        (EngineExit(66, None, False, ("0.1 E x: failed to allocate buffer",)), "cuda", ErrorCode.INSUFFICIENT_VRAM),
        (EngineExit(66, None, False, ("0.1 E x: unknown model architecture",)), "cpu", ErrorCode.WORKER_START_FAILED),
    ],
)  # fmt: skip
def test_why_a_load_failed(end: EngineExit, backend: str, code: ErrorCode) -> None:
    with pytest.raises(ArrieroError) as caught:
        fail_for_exit(end, backend=backend)
    assert caught.value.code is code
    assert caught.value.details["log_tail"] == list(end.log_tail)


# --- Estimate ----------------------------------------------------------------------------------

TABLE_CPU = """\
0.00.028 I common_memory_breakdown_print: | memory breakdown [MiB] | total   free    self   model   context   compute    unaccounted |
0.00.028 I common_memory_breakdown_print: |   - Host               |                  354 =   277 +      48 +      29                |
0.00.028 I common_params_fit_impl: projected to use 354 MiB of host memory
"""
TABLE_CUDA = """\
0.01 I print: | memory breakdown [MiB]  | total   free     self   model   context   compute    unaccounted |
0.01 I print: |   - CUDA0 (RTX 4090)    | 24080 = 23000 + (7000 =  6000 +     800 +     200) +        1080 |
0.01 I print: |   - CUDA1 (RTX 4090)    | 24080 = 23000 + (1000 =   900 +      50 +      50) +        1080 |
0.01 I print: |   - Host                |                   301 =   250 +       0 +      51                |
0.01 I next
"""


@pytest.mark.parametrize(("text", "host_mb", "device_mb"), [(TABLE_CPU, 354, 0), (TABLE_CUDA, 301, 8000)])
def test_memory_table(text: str, host_mb: int, device_mb: int) -> None:
    table = MemoryTable()
    for line in ("| - Host | 5 = 5 |", *text.splitlines()):
        table.take(line)
    assert (table.host_mb, table.device_mb, table.is_complete) == (host_mb, device_mb, True)


# --- Parameters --------------------------------------------------------------------------------


def test_the_line_holds_no_default_that_would_hurt(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf")
    spec = EngineSpec(path, slots=3, context_tokens=512)
    line = json.loads(line_of(spec, read_header(path), Path("/r/e.sock"), threads=2))
    params = line["params"]
    assert (params["n_parallel"], params["n_ctx"], params["n_gpu_layers"]) == (3, 1536, 0)
    assert (params["ui"], params["cors_origins"], params["cache_ram_mib"]) == (False, "", 0)
    assert not line["gpu"]
    assert environment_of(spec)["CUDA_VISIBLE_DEVICES"] == "-1"
    gpu = EngineSpec(path, backend="cuda", device="cuda:1")
    line = json.loads(line_of(gpu, read_header(path), Path("/r/e.sock"), threads=2))
    assert line["gpu"]
    assert line["params"]["fit_params"] is False
    assert environment_of(gpu)["CUDA_VISIBLE_DEVICES"] == "1"


def test_a_socket_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "m.gguf")
    with pytest.raises(ArrieroError) as caught:
        line_of(EngineSpec(path), read_header(path), Path("/" + "x" * 120), threads=1)
    assert caught.value.code is ErrorCode.STATE_DIR_UNUSABLE


@pytest.mark.parametrize(
    "options",
    [{"token_s": 1}, {"load_mode": "magic"}, {"batch_tokens": "many"}, {"cache_ram_mib": -1}],
)
def test_unknown_and_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArrieroError) as caught:
        options_of(EngineSpec(Path("/m"), options=options))
    assert caught.value.code is ErrorCode.INVALID_REQUEST


# --- Streams -----------------------------------------------------------------------------------


def sse(*chunks: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)


def test_a_client_cannot_switch_our_fields() -> None:
    options = {"stream": False, "n_predict": 9, "id_slot": 1, "tools": [{"type": "function"}], "seed": 4}
    request = EngineRequest("r", messages=[{"role": "user"}], chat_options=options)
    path, raw = body_of(request)
    body = json.loads(raw)
    assert path == "/v1/chat/completions"
    assert body["stream"] is True
    assert "n_predict" not in body
    assert "id_slot" not in body
    assert "seed" not in body
    assert body["tools"] == options["tools"]
    assert "logprobs" not in body


def test_sampling_is_passed_on() -> None:
    sampling = Sampling(max_tokens=3, temperature=0.5, stop=("x",), logit_bias={"7": -1.5}, logprobs=0)
    body = json.loads(body_of(EngineRequest("r", prompt="p", sampling=sampling))[1])
    assert (body["n_predict"], body["temperature"], body["stop"]) == (3, 0.5, ["x"])
    assert (body["logit_bias"], body["n_probs"]) == ([[7, -1.5]], 1)
    assert json.loads(body_of(EngineRequest("r", prompt="p"))[1])["n_predict"] == -1


def test_any_cut_of_the_bytes_reads_the_same() -> None:
    raw = b": ping\n\n" + sse(
        {"content": "é", "tokens": [5], "tokens_predicted": 1},
        {"content": "\n\ndata: x", "tokens": [6], "tokens_predicted": 2},
        {"stop": True, "tokens_predicted": 2, "tokens_evaluated": 3, "stop_type": "limit"},
    )
    for size in (1, 2, 7, 64, len(raw)):
        reader = CompletionReader(EngineRequest("r", prompt="p"), TokenPieces())
        events = [e for start in range(0, len(raw), size) for e in reader.feed(raw[start : start + size])]
        assert events == [
            TextDelta("é", (5,)),
            TextDelta("\n\ndata: x", (6,)),
            StreamFinished("length", 3, 2),
        ]


def test_tokens_that_were_not_told_are_counted() -> None:
    reader = CompletionReader(EngineRequest("r", prompt="p"), TokenPieces())
    raw = sse(
        {"content": "é", "tokens": [5], "tokens_predicted": 2},
        {"stop": True, "tokens_predicted": 4, "stop_type": "limit"},
    )
    first, rest, end = reader.feed(raw)
    assert first == TextDelta("é", (UNKNOWN_ID, 5))
    assert rest == TextDelta("", (UNKNOWN_ID, UNKNOWN_ID))
    assert isinstance(end, StreamFinished)


def test_chat_with_reasoning_and_tools() -> None:
    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    reader = ChatReader(
        EngineRequest("r", messages=[{}], chat_options={"tools": [{}]}),
        TokenPieces(),
    )
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": '{"a": 1}'}}
    raw = sse(
        chunk({"role": "assistant", "content": None}),
        chunk({"reasoning_content": "hm"}),
        chunk({"content": "well"}),
        chunk({"tool_calls": [call]}),
        chunk({"tool_calls": [more]}),
        chunk({}, "tool_calls"),
        {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 6}},
    )
    assert list(reader.feed(raw + b"data: [DONE]\n\n")) == [
        ReasoningDelta("hm"),
        TextDelta("well"),
        ToolCallDelta(0, "c1", "add", ""),
        ToolCallDelta(0, None, None, '{"a": 1}'),
        StreamFinished("tool_calls", 9, 6),
    ]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"code": 400, "type": "exceed_context_size_error", "n_prompt_tokens": 9, "n_ctx": 8}, ErrorCode.CONTEXT_LENGTH_EXCEEDED),
        ({"code": 400, "message": "no"}, ErrorCode.INVALID_REQUEST),
        ({"code": 503, "message": "Loading model"}, ErrorCode.MODEL_LOADING),
        ({"code": 500, "message": "compute error"}, ErrorCode.TOKEN_STREAM_FAILED),
    ],
)  # fmt: skip
def test_an_error_in_the_stream_is_raised(error: dict[str, Any], code: ErrorCode) -> None:
    reader = CompletionReader(EngineRequest("r", prompt="p"), TokenPieces())
    with pytest.raises(ArrieroError) as caught:
        list(reader.feed(sse({"error": error})))
    assert caught.value.code is code


# --- Ids of tokens that end inside a character ---------------------------------------------------


def test_missing_ids_are_found_by_their_bytes(tmp_path: Path) -> None:
    file = llama_file()
    letters = byte_letters()
    tokens = list(next(value for key, _, value in file.keys if key.endswith("ggml.tokens"))[1])
    # " 🦙" is F0 9F A6 99 after a space; some of its pieces are tokens of their own.
    joined = ["".join(letters[byte] for byte in raw) for raw in (b" \xf0\x9f", b"\xa6\x99", b"\xf0\x9f")]
    file.set("tokenizer.ggml.tokens", ARRAY, (STRING, [*tokens, *joined]))
    header, pieces = read(file.write(tmp_path / "m.gguf"))
    count = header.facts.vocabulary_size
    assert pieces.missing_ids("é", 1, 0xA9) == (0xC3,)
    assert pieces.missing_ids("🦙", 3, 0x99) == (0xF0, 0x9F, 0xA6)
    assert pieces.missing_ids(" 🦙", 1, count - 2) == (count - 3,)
    assert pieces.missing_ids("🦙", 1, count - 2) == (count - 1,)
    # What cannot be: another count, a last token that is whole, lost bytes.
    assert pieces.missing_ids("🦙", 5, 0x99) == (UNKNOWN_ID,) * 5
    assert pieces.missing_ids("a", 1, 97) == (UNKNOWN_ID,)
    assert pieces.missing_ids("\ufffd", 1, 0x99) == (UNKNOWN_ID,)


def test_bytes_of_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    file = llama_file()
    tokens = ["<unk>", "▁the", *(f"<0x{value:02X}>" for value in range(256))]
    file.set("tokenizer.ggml.model", STRING, "llama")
    file.set("tokenizer.ggml.tokens", ARRAY, (STRING, tokens))
    _, pieces = read(file.write(tmp_path / "m.gguf"))
    assert pieces.missing_ids("é", 1, 0xA9 + 2) == (0xC3 + 2,)


def test_a_search_that_would_not_end_gives_up() -> None:
    pieces = TokenPieces({n: b"\x80" * (n + 1) for n in range(40)})
    assert pieces.missing_ids("é" * 200, 150, 0) == (UNKNOWN_ID,) * 150


def test_a_hostile_vocabulary_costs_no_memory(tmp_path: Path) -> None:
    letters = byte_letters()
    file = llama_file()
    # Each is the first half of a character, over and over: none is whole.
    tokens = [letters[0xC3] * (1 + number % 2000) for number in range(4_000)]
    file.set("tokenizer.ggml.tokens", ARRAY, (STRING, tokens))
    path = tmp_path / "m.gguf"
    path.write_bytes(file.header() + bytes(300_000))
    tracemalloc.start()
    try:
        read(path)
        assert tracemalloc.get_traced_memory()[1] < 1_500_000
    finally:
        tracemalloc.stop()
