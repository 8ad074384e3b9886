"""One request to one server, byte by byte: what is kept, held back, bounded and given up."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.orchestrator.courier import Counters, Courier, EventCutter, splice_events
from arriero.orchestrator.exchange import Outlet
from arriero.orchestrator.upstream import (
    UNREAD_BYTES_MAX,
    Address,
    Connection,
    Lost,
    Silent,
    Upstreams,
    request_bytes,
)
from arriero.runtime.asgi import Message
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SeededEntropy

Speak = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def piece(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


@asynccontextmanager
async def server(speak: Speak) -> AsyncIterator[Address]:
    """A server that says exactly what a test wants."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await speak(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    running = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = running.sockets[0].getsockname()
    try:
        yield Address(host, port, "secret")
    finally:
        running.close()
        await running.wait_closed()


class Client:
    """Keeps what was sent to it; may read slowly."""

    def __init__(self) -> None:
        self.text = b""
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.outlet = Outlet(self.send, "/v1/completions")

    async def send(self, message: Message) -> None:
        await self.may_read.wait()
        self.text += message.get("body", b"")


def upstreams() -> Upstreams:
    return Upstreams(SystemClock(), SeededEntropy(1), connect_timeout_s=2)


async def ask(courier: Courier, address: Address) -> Connection:
    connection, _ = await courier.bring(address, "POST", "/x", headers=[], body=b"{}")
    return connection


async def splice(connection: Connection, client: Client, stall_s: float = 5.0) -> None:
    await splice_events(connection, client.outlet, stall_s=stall_s, counters=Counters(), is_retryable=True)


@given(
    events=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1), max_size=6),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_pieces_make_whole_events_and_nothing_else(events: list[str], cuts: list[int]) -> None:
    whole = b"".join(b"data: %s\n\n" % event.encode() for event in events)
    places = sorted({min(cut, len(whole)) for cut in cuts} | {0, len(whole)})
    cutter = EventCutter()
    found = b""
    for start, end in pairwise(places):
        out = cutter.cut(whole[start:end])
        assert out == b"" or out.endswith(b"\n\n")
        found += out
    assert found == whole
    cutter.check_end()


async def test_a_stream_that_ends_within_an_event_is_lost_and_no_half_goes_out() -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(HEAD + piece(b"data: 1\n\nda") + piece(b"ta: 2\n\ndata: ha") + b"0\r\n\r\n")
        await writer.drain()

    async with server(speak) as address:
        client = Client()
        connection = await ask(Courier(upstreams()), address)
        with pytest.raises(Lost):
            await splice(connection, client)
        connection.abort()
    assert client.text == b"data: 1\n\ndata: 2\n\n"


async def test_silence_is_filled_with_beats_and_then_given_up() -> None:
    done = asyncio.Event()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + piece(b"data: 1\n\n"))
        await done.wait()

    async with server(speak) as address:
        client = Client()
        connection = await ask(Courier(upstreams()), address)
        with pytest.raises(Silent):
            await splice(connection, client, stall_s=0.1)
        connection.beat(0.02)
        assert await connection.read(stall_s=60) is None, "a beat was due"
        connection.abort()
        done.set()


async def test_a_client_that_does_not_read_stops_the_worker_within_bounds() -> None:
    sent = 0
    blocked = asyncio.Event()

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(HEAD)
        chunk = piece(b"data: %s\n\n" % (b"x" * 65_000))
        for _ in range(400):
            writer.write(chunk)
            sent += len(chunk)
            try:
                async with asyncio.timeout(0.5):
                    await writer.drain()
            except TimeoutError:
                blocked.set()
                await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async with server(speak) as address:
        client = Client()
        client.may_read.clear()
        connection = await ask(Courier(upstreams()), address)
        async with asyncio.TaskGroup() as group:
            group.create_task(splice(connection, client), name="splice")
            async with asyncio.timeout(60):
                await blocked.wait()
            in_sockets = 8 * 1024 * 1024
            assert sent < in_sockets + 2 * UNREAD_BYTES_MAX, "what nobody reads piles up"
            client.may_read.set()
        connection.abort()
    assert len(client.text) == 400 * (65_000 + 8)


async def test_a_kept_connection_is_used_again_and_a_dead_one_replaced() -> None:
    connections = 0
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        # Each connection answers twice; what comes then is read and never answered.
        for _ in range(2):
            await reader.readuntil(b"{}")
            writer.write(answer)
        await reader.readuntil(b"{}")

    async with server(speak) as address:
        pool = upstreams()
        courier = Courier(pool)
        for _ in range(5):
            connection = await ask(courier, address)
            assert await connection.read_all(100) == b"ok"
            connection.release()
        assert connections == 3
        pool.close()


@pytest.mark.parametrize(
    ("said", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", 200, b"until the end"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\ncontent-length: 1\r\n\r\nx", 201, b"x"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
    ],
)
async def test_answers_without_a_length(said: bytes, status: int, body: bytes) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(said)
        await writer.drain()

    async with server(speak) as address:
        courier = Courier(upstreams())
        connection, head = await courier.bring(address, "POST", "/x", headers=[], body=b"{}")
        assert (head.status, await connection.read_all(100)) == (status, body)
        connection.abort()


@pytest.mark.parametrize(
    "said", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: %s\r\n\r\n" % (b"y" * 70_000)]
)
async def test_what_is_no_answer_is_lost(said: bytes) -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"{}")
        writer.write(said)
        await writer.drain()

    async with server(speak) as address:
        with pytest.raises(Lost) as lost:
            await ask(Courier(upstreams()), address)
    assert not lost.value.is_unreachable


async def test_nobody_there_is_told_after_three_attempts() -> None:
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pass

    async with server(speak) as address:
        pass
    with pytest.raises(Lost) as lost:
        await ask(Courier(upstreams()), address)
    assert lost.value.is_unreachable


def test_a_request_is_built_anew_and_cannot_be_split() -> None:
    address = Address("127.0.0.1", 80, "secret")
    request = request_bytes("POST", "/x", address, [("x-request-id", "7")], b"{}")
    assert request.endswith(b"x-request-id: 7\r\n\r\n{}")
    assert "secret" not in repr(address)
    for headers, target in (([("a", "b\r\nc: d")], "/x"), ([], "/x\r\ny")):
        with pytest.raises(ValueError, match="line break"):
            request_bytes("GET", target, address, headers, b"")
