"""Does the sync client bring home every way a request can go, with the code chosen for it, in time?"""

import socket
import threading

import pytest
from tests.support.scripted_http import Connection, Request, ScriptedServer, free_port

from arriero.client.api import Agent, Orchestrator, Worker, inference_frames, loading_frames, task_events
from arriero.client.connection import FailureCodes, Limits
from arriero.client.stream import SSE_CODES, TOKEN_CODES, EventStream
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import DoneFrame, TaskEnd, TaskFailed, TaskToken, TokenFrame
from arriero.contracts.requests import InferenceBody, TaskBody

CODES = FailureCodes(
    ErrorCode.HEALTH_CHECK_ERROR, ErrorCode.TOKEN_STREAM_TIMEOUT, ErrorCode.TOKEN_STREAM_FAILED
)


def test_typed_call_sends_the_token_and_decodes_the_answer() -> None:
    def script(request: Request, connection: Connection) -> None:
        connection.answer(200, {"status": "alive", "version": "1", "api_version": 1, "name": "box"})

    with ScriptedServer(script) as server:
        assert Agent(server.url, "secret").health().name == "box"
        [request] = server.requests
    assert (request.method, request.path) == ("GET", "/v1/health")
    assert request.headers["authorization"] == "Bearer secret"


def test_an_error_envelope_becomes_its_code_with_details() -> None:
    body = {"error": {"code": "NO_WORKERS", "message": "none of yours", "details": {"node": "box"}}}

    with ScriptedServer(lambda _, connection: connection.answer(404, body)) as server:
        with pytest.raises(ArrieroError) as caught:
            Orchestrator(server.url).workers()
        assert caught.value.code is ErrorCode.NO_WORKERS
        assert caught.value.details == {"node": "box", "status": 404}
        with pytest.raises(ArrieroError) as caught:
            Orchestrator(server.url, codes=CODES).workers()
    assert caught.value.code is ErrorCode.TOKEN_STREAM_FAILED
    assert caught.value.details["status"] == 404
    assert caught.value.details["answered_code"] == "NO_WORKERS"


@pytest.mark.parametrize("body", [b"<html>", b"{}", b""])
def test_an_error_that_is_not_ours_tells_its_status(body: bytes) -> None:
    with ScriptedServer(lambda _, connection: connection.answer(500, body)) as server:
        with pytest.raises(ArrieroError, match="status 500") as caught:
            Orchestrator(server.url).nodes()
    assert caught.value.code is ErrorCode.INTERNAL_ERROR


def test_an_answer_of_another_shape_is_a_version_mismatch() -> None:
    with ScriptedServer(lambda _, connection: connection.answer(200, {"workers": 7})) as server:
        with pytest.raises(ArrieroError) as caught:
            Orchestrator(server.url).workers()
    assert caught.value.code is ErrorCode.VERSION_MISMATCH


def test_refused_is_the_code_chosen_for_unreachable() -> None:
    with free_port() as port:
        client = Worker(f"http://127.0.0.1:{port}", codes=CODES, limits=Limits(attempts=3))
        with pytest.raises(ArrieroError, match="connection refused") as caught:
            client.health()
    assert caught.value.code is ErrorCode.HEALTH_CHECK_ERROR


def test_an_unknown_host_is_unreachable() -> None:
    with pytest.raises(ArrieroError, match="host is not known") as caught:
        Worker("http://no-such-host.invalid:1", codes=CODES).health()
    assert caught.value.code is ErrorCode.HEALTH_CHECK_ERROR


@pytest.mark.parametrize("url", ["ftp://x", "nonsense", "http://", "http://x:99999"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ArrieroError) as caught:
        Worker(url)
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_a_reset_before_the_answer_is_unreachable() -> None:
    def script(_: Request, connection: Connection) -> None:
        linger_off = b"\x01\0\0\0\0\0\0\0"
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_off)

    with ScriptedServer(script) as server, pytest.raises(ArrieroError) as caught:
        Worker(server.url, codes=CODES).health()
    assert caught.value.code is ErrorCode.HEALTH_CHECK_ERROR


def test_a_server_that_says_nothing_is_a_timeout() -> None:
    with ScriptedServer(lambda _, connection: connection.wait_stopping()) as server:
        with pytest.raises(ArrieroError) as caught:
            Worker(server.url, codes=CODES).health(timeout_s=0.2)
    assert caught.value.code is ErrorCode.TOKEN_STREAM_TIMEOUT
    assert caught.value.details["timeout_s"] == 0.2


def test_a_head_in_single_bytes_cannot_stretch_the_limit() -> None:
    def script(_: Request, connection: Connection) -> None:
        while not connection.stopping.wait(0.05):
            connection.send(b"H")

    with ScriptedServer(script) as server, pytest.raises(ArrieroError) as caught:
        Worker(server.url, codes=CODES).health(timeout_s=0.3)
    assert caught.value.code is ErrorCode.TOKEN_STREAM_TIMEOUT


def test_no_http_is_unreachable() -> None:
    with ScriptedServer(lambda _, connection: connection.send(b"SSH-2.0-OpenSSH\r\n\r\n")) as server:
        with pytest.raises(ArrieroError, match="no proper HTTP") as caught:
            Worker(server.url, codes=CODES).health()
    assert caught.value.code is ErrorCode.HEALTH_CHECK_ERROR


def test_ipv6_loopback() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        port = listener.getsockname()[1]

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(65536)
                Connection(sock, threading.Event()).answer(200, {"workers": []})

        thread = threading.Thread(target=serve)
        thread.start()
        assert Orchestrator(f"http://[::1]:{port}").workers() == []
        thread.join(60)


def test_frames_of_a_token_stream() -> None:
    def script(_: Request, connection: Connection) -> None:
        connection.begin_stream()
        connection.event({"started": True, "request_id": "r1"})
        connection.chunk(b": still here\n\n")
        connection.event({"queued": True, "position": 2})
        connection.event({"prompt_processed": 1, "prompt_total": 3})
        connection.event({"token": "ä", "id": 5, "index": 0})
        done = {"total_tokens": 1, "duration_ms": 3, "finish_reason": "stop", "prompt_tokens": 3}
        connection.event({"done": True, **done})
        connection.event("[DONE]")
        connection.end_stream()

    with ScriptedServer(script) as server:
        with Worker(server.url).infer_stream(InferenceBody(prompt="hi"), request_id="r1") as stream:
            frames = list(inference_frames(stream))
        assert stream.is_done
        [request] = server.requests
    assert request.json == {"prompt": "hi"}
    assert request.headers["x-request-id"] == "r1"
    assert [type(frame).__name__ for frame in frames] == [
        "StartedFrame", "QueuedFrame", "PromptFrame", "TokenFrame", "DoneFrame",
    ]  # fmt: skip
    assert isinstance(frames[3], TokenFrame) and frames[3].token == "ä"
    assert isinstance(frames[4], DoneFrame) and frames[4].finish_reason == "stop"


def test_an_error_event_of_a_worker_is_raised_with_its_own_code() -> None:
    def script(_: Request, connection: Connection) -> None:
        connection.begin_stream()
        connection.event({"token": "a", "id": 5, "index": 0})
        connection.event({"error": {"code": "OUT_OF_MEMORY", "message": "killed"}}, event="error")
        connection.end_stream()

    with ScriptedServer(script) as server:
        with Worker(server.url).infer_stream(InferenceBody(prompt="hi")) as stream:
            frames = inference_frames(stream)
            next(frames)
            with pytest.raises(ArrieroError, match="killed") as caught:
                next(frames)
    assert caught.value.code is ErrorCode.OUT_OF_MEMORY


@pytest.mark.parametrize("ends_properly", [True, False])
def test_a_stream_that_ends_without_done_broke(ends_properly: bool) -> None:
    def script(_: Request, connection: Connection) -> None:
        connection.begin_stream()
        connection.event({"token": "a", "id": 5, "index": 0})
        if ends_properly:
            connection.end_stream()

    with ScriptedServer(script) as server:
        with Worker(server.url).infer_stream(InferenceBody(prompt="hi")) as stream:
            with pytest.raises(ArrieroError) as caught:
                list(inference_frames(stream))
    assert caught.value.code is ErrorCode.TOKEN_STREAM_ERROR


def test_a_stream_that_falls_silent_or_is_out_of_time_is_a_timeout() -> None:
    def script(request: Request, connection: Connection) -> None:
        connection.begin_stream()
        connection.event({"token": "a", "id": 5, "index": 0})
        if request.path == "/busy":
            while not connection.stopping.wait(0.05):
                connection.chunk(b": beat\n\n")
        connection.wait_stopping()

    with ScriptedServer(script) as server:
        worker = Worker(server.url)
        with worker.stream("GET", "/mute", codes=TOKEN_CODES, silence_s=2.0) as stream:
            with pytest.raises(ArrieroError) as caught:
                list(stream)
        assert caught.value.code is ErrorCode.TOKEN_STREAM_TIMEOUT
        with worker.stream("GET", "/busy", codes=TOKEN_CODES, total_s=0.3) as stream:
            with pytest.raises(ArrieroError) as caught:
                list(stream)
    assert caught.value.code is ErrorCode.TOKEN_STREAM_TIMEOUT
    assert caught.value.details["timeout_s"] == 0.3


def test_status_and_content_type_of_a_stream_are_checked() -> None:
    def script(request: Request, connection: Connection) -> None:
        connection.answer(500 if request.path == "/status" else 200, b"{}")

    with ScriptedServer(script) as server:
        for path in ("/status", "/type"):
            with pytest.raises(ArrieroError) as caught:
                Worker(server.url).stream("GET", path, codes=SSE_CODES)
            assert caught.value.code is ErrorCode.SSE_CONNECTION_FAILED, path


def test_closing_from_another_thread_ends_the_iteration_and_the_connection() -> None:
    client_is_gone = threading.Event()

    def script(_: Request, connection: Connection) -> None:
        connection.begin_stream()
        connection.event(
            {"stage": "loading", "fraction": 0, "layers_loaded": 0, "layers_total": 1, "memory_mb": 1}
        )
        if connection.wait_closed():
            client_is_gone.set()

    seen: list[object] = []

    def read(stream: EventStream) -> None:
        seen.extend(loading_frames(stream))

    with ScriptedServer(script) as server:
        with Worker(server.url).progress() as stream:
            thread = threading.Thread(target=read, args=(stream,))
            thread.start()
            stream.close()
            thread.join(60)
            assert not thread.is_alive()
        assert client_is_gone.wait(60)
    assert stream.is_closed and not stream.is_done


def test_task_events_and_deadline() -> None:
    def script(_: Request, connection: Connection) -> None:
        connection.begin_stream()
        connection.event({"type": "accepted", "actor": "orchestrator", "message": "ok", "task_id": "t-1"})
        connection.event({"type": "token", "token": "a", "id": 5, "index": 0})
        connection.event({"type": "end", "finish_reason": "stop"})
        connection.event("[DONE]")
        connection.end_stream()

    with ScriptedServer(script) as server:
        body = TaskBody(model="demo", messages=[{"role": "user", "content": "hi"}], max_tokens=5)
        with Orchestrator(server.url).run_task(body, remaining_ms=1500.4) as stream:
            events = list(task_events(stream))
        [request] = server.requests
    assert request.headers["x-request-deadline"] == "1500"
    assert request.headers["accept"] == "text/event-stream"
    assert request.json == {
        "model": "demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5,
    }  # fmt: skip
    assert isinstance(events[1], TaskToken) and isinstance(events[2], TaskEnd)


def test_a_failed_task_is_an_event_with_its_error() -> None:
    def script(_: Request, connection: Connection) -> None:
        connection.begin_stream()
        connection.event({"error": {"code": "WORKER_LOST", "message": "gone"}}, event="error")
        connection.end_stream()

    with ScriptedServer(script) as server:
        with Orchestrator(server.url).run_task(TaskBody(model="demo", prompt="x")) as stream:
            event = next(task_events(stream))
    assert isinstance(event, TaskFailed) and event.error.code == "WORKER_LOST"
