"""A real server on loopback: who is let in, what a stream does when its client goes."""

import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.runtime.asgi import Guard, Receive, Scope, Send, SseResponse
from arriero.runtime.http import Http
from arriero.runtime.serve import bind, serve, url_of
from arriero.runtime.sse import encode
from arriero.runtime.tasks import start_ready

TOKEN = "t0ken"


class App:
    """Echoes a body's size; `/stream` counts until its client is gone; `/broken` fails mid-stream."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/stream":
            await SseResponse(self.count(None), beat_s=0.05)(scope, receive, send)
        elif scope["path"] == "/broken":
            await SseResponse(self.count(2))(scope, receive, send)
        else:
            size, more = 0, True
            while more:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": str(size).encode()})

    async def count(self, fail_at: int | None) -> AsyncGenerator[bytes, None]:
        try:
            for number in range(3):
                if number == fail_at:
                    raise ArrieroError(ErrorCode.WORKER_LOST, "gone", worker_id="w-1")
                yield encode(b"%d" % number, number)
            await asyncio.Event().wait()
        finally:
            self.closed.set()


@pytest.fixture
async def served() -> AsyncIterator[tuple[App, str]]:
    app, stop, sock = App(), asyncio.Event(), bind("127.0.0.1", 0)

    async def run(announce: Any) -> None:
        async def on_started() -> None:
            announce(url_of(sock))

        await serve(
            Guard(app, token=TOKEN, body_bytes_max=1000), sock, stop=stop, on_started=on_started, grace_s=1
        )

    async with asyncio.TaskGroup() as group:
        url = await start_ready(group, run, name="server")
        yield app, url
        stop.set()


def ask(
    url: str, *, path: str = "/", body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, Any, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    with contextlib.closing(connection):
        sent = {"Authorization": f"Bearer {TOKEN}"} if headers is None else headers
        connection.request("POST", path, body, sent)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.headers


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "MISSING_API_KEY"),
        ({"Authorization": "Basic abc"}, 401, "MISSING_API_KEY"),
        ({"Authorization": "Bearer wrong"}, 401, "INVALID_API_KEY"),
        ({"Authorization": f"Bearer {TOKEN}", "Host": "evil.example"}, 403, "FORBIDDEN"),
        ({"Authorization": f"Bearer {TOKEN}", "Origin": "http://evil.example"}, 403, "FORBIDDEN"),
        ({"Authorization": f"Bearer {TOKEN}", "Origin": "null"}, 403, "FORBIDDEN"),
    ],
)
async def test_who_is_refused(
    served: tuple[App, str], headers: dict[str, str], status: int, code: str
) -> None:
    got, body, _ = await asyncio.to_thread(ask, served[1], headers=headers)
    assert (got, body["error"]["code"]) == (status, code)


async def test_a_request_id_is_kept_when_well_formed_and_replaced_otherwise(served: tuple[App, str]) -> None:
    auth = {"Authorization": f"Bearer {TOKEN}"}
    _, _, kept = await asyncio.to_thread(ask, served[1], headers={**auth, "X-Request-Id": "my-id.1"})
    _, _, replaced = await asyncio.to_thread(
        ask, served[1], headers={**auth, "X-Request-Id": "no spaces allowed"}
    )
    assert kept["x-request-id"] == "my-id.1"
    assert replaced["x-request-id"].startswith("req-")


async def test_a_body_at_the_limit_passes_and_one_over_it_is_told_so(served: tuple[App, str]) -> None:
    assert (await asyncio.to_thread(ask, served[1], body=b"x" * 1000))[1] == 1000
    status, body, _ = await asyncio.to_thread(ask, served[1], body=b"x" * 5_000_000)
    assert (status, body["error"]["code"]) == (413, "REQUEST_TOO_LARGE")
    assert body["error"]["details"]["limit_bytes"] == 1000


async def test_a_chunked_body_over_the_limit_is_refused_too(served: tuple[App, str]) -> None:
    def chunked() -> bytes:
        host = served[1].removeprefix("http://")
        with socket.create_connection((host.split(":")[0], int(host.split(":")[1])), timeout=60) as sock:
            head = f"POST / HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\nTransfer-Encoding: chunked\r\n\r\n"
            sock.sendall(
                head.encode() + b"200\r\n" + b"x" * 512 + b"\r\n" + b"200\r\n" + b"x" * 512 + b"\r\n0\r\n\r\n"
            )
            return sock.recv(4096)

    assert b" 413 " in (await asyncio.to_thread(chunked)).split(b"\r\n")[0]


async def test_a_stream_beats_in_silence_and_stops_computing_when_its_client_goes(
    served: tuple[App, str],
) -> None:
    async with Http() as http:
        events = http.peer(served[1], TOKEN).events("/stream")
        seen = [await anext(events) for _ in range(4)]
        assert [event.data for event in seen[:3]] == ["0", "1", "2"]
        assert seen[3].comment == "beat"
        assert not served[0].closed.is_set()
        await events.aclose()
        await asyncio.wait_for(served[0].closed.wait(), 60)


async def test_a_stream_that_fails_ends_with_the_error_and_its_envelope(served: tuple[App, str]) -> None:
    async with Http() as http:
        seen = [event async for event in http.peer(served[1], TOKEN).events("/broken")]
    assert [event.data for event in seen[:2]] == ["0", "1"]
    assert seen[2].event == "error"
    assert json.loads(seen[2].data)["error"]["code"] == "WORKER_LOST"
    assert len(seen) == 3


async def test_a_taken_port_is_told_and_the_next_one_found() -> None:
    taken = bind("127.0.0.1", 0)
    port = taken.getsockname()[1]
    with contextlib.closing(taken):
        with pytest.raises(ArrieroError) as refused:
            bind("127.0.0.1", port)
        assert (refused.value.code, refused.value.details["port"]) == (ErrorCode.PORT_IN_USE, port)
        with contextlib.closing(bind("127.0.0.1", port, tries=50)) as other:
            assert other.getsockname()[1] > port
