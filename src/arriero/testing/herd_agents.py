"""The process of a herd: how do a thousand agents share one port, for next to no CPU?

The token tells which agent is meant.  Each answers what the orchestrator asks an agent as it holds
it: `GET /v1/events` (a snapshot, then a beat a second, spread over the second), `/v1/health`,
`/v1/capabilities`, `/v1/workers`, `/v1/models`.  Orders come as JSON lines on standard input, with an
answer each on standard output; the end of the input is the end of the herd.  See `testing.herd`.
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Final, cast

import msgspec
import uvloop

from arriero.contracts.errors import ArrieroError, ErrorCode, ErrorResponse
from arriero.contracts.events import AgentBeat, AgentSnapshot
from arriero.contracts.records import (
    Capabilities,
    DeviceRecord,
    Health,
    ModelList,
    ModelRecord,
    WorkerList,
    WorkerRecord,
)
from arriero.contracts.states import WorkerState
from arriero.contracts.version import API_VERSION, __version__
from arriero.runtime import sse

#: Beats go out in so many portions a second.
PORTIONS: Final = 100
BACKLOG: Final = 4096
#: The models that the herd has, a few of them on each node.
MODELS: Final = 20
MODELS_EACH: Final = 3
HEAD_BYTES_MAX: Final = 65_536
WORKER_PORT: Final = 23_001
#: Of the beat alone: what is free changes from second to second.
_JITTER_MB: Final = 64


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a herd is told."""

    #: "drop": end all connections.  "silence": `count` agents say nothing more.  "speak": all do.  "count".
    order: str
    count: int = 0


class Count(msgspec.Struct, frozen=True, kw_only=True):
    """What a herd answers."""

    #: Event streams that are held now, and beats that were ever sent.
    streams: int
    beats: int


class Agent:
    """One simulated agent: what it tells."""

    def __init__(self, number: int, name: str, workers_each: int) -> None:
        self.name = name
        self.is_silent = False
        self._number = number
        self._workers_each = workers_each

    @cached_property
    def capabilities(self) -> Capabilities:
        """A machine with two cards."""
        cards = [
            DeviceRecord(
                id=f"cuda:{card}", backend="cuda", name="NVIDIA GeForce RTX 4090", memory_mb=24_564,
                memory_free_mb=20_000 - self._number, driver="570.86.15",
            )
            for card in range(2)
        ]  # fmt: skip
        cpu = DeviceRecord(id="cpu", backend="cpu", name="CPU", memory_mb=64_000, memory_free_mb=48_000)
        return Capabilities(
            name=self.name,
            version=__version__,
            api_version=API_VERSION,
            backends=["cpu", "cuda"],
            devices=[cpu, *cards],
            engines={"llamacpp": "1", "fake": "1"},
            ram_mb=64_000,
            ram_free_mb=48_000,
            disk_free_mb=500_000,
            cpu_cores=16,
            os="linux",
            arch="x86_64",
        )

    @property
    def workers(self) -> list[WorkerRecord]:
        """Idle workers."""
        return [
            WorkerRecord(
                worker_id=f"w-{self._number:06x}{slot:06x}",
                node=self.name,
                url=f"http://127.0.0.1:{WORKER_PORT + slot}",
                model_ref=_model(self._number + slot).model_ref,
                backend="cuda",
                device=f"cuda:{slot % 2}",
                state=WorkerState.IDLE,
                slots_total=4,
                slots_available=4,
                pid=1000 + slot,
                started_unix=1_700_000_000.0 + self._number,
                last_activity_unix=1_700_000_000.0,
                context_tokens=8192,
                memory_mb=4000,
                load_fraction=1.0,
            )
            for slot in range(self._workers_each)
        ]

    @property
    def models(self) -> list[ModelRecord]:
        """Some of the herd's models."""
        return [_model(self._number + shift) for shift in range(MODELS_EACH)]

    def snapshot(self) -> AgentSnapshot:
        """Return the first event."""
        workers = self.workers
        return AgentSnapshot(
            capabilities=self.capabilities,
            workers=workers,
            worker_tokens={worker.worker_id: f"token-{worker.worker_id}" for worker in workers},
            downloads=[],
            models=self.models,
        )

    def beat(self, number: int) -> AgentBeat:
        """Return the event of a second."""
        free_mb = 48_000 - (number + self._number) % _JITTER_MB
        return AgentBeat(
            ram_free_mb=free_mb,
            disk_free_mb=500_000,
            unix=time.time(),
            device_free_mb={"cpu": free_mb, "cuda:0": 20_000 - number % _JITTER_MB, "cuda:1": 20_000},
        )


def _model(number: int) -> ModelRecord:
    number %= MODELS
    return ModelRecord(
        model_id=f"m-{number:012x}",
        model_ref=f"hf:herd/model-{number}:Q4_K_M",
        provider="hf",
        files=[f"model-{number}-Q4_K_M.gguf"],
        size_bytes=4_000_000_000,
        sha256=f"{number:064x}",
        added_unix=1_700_000_000.0,
        architecture="llama",
        quantisation="Q4_K_M",
        context_length=8192,
        block_count=32,
        parameters=7_000_000_000,
    )


class Herd:
    """All agents, the streams that are held of them, and when each beats."""

    def __init__(self, agents: dict[str, Agent]) -> None:
        #: By "Bearer TOKEN".
        self.agents = {f"Bearer {token}".encode(): agent for token, agent in agents.items()}
        self.connections: set[Connection] = set()
        self._portions: list[dict[Connection, None]] = [{} for _ in range(PORTIONS)]
        self._beats = 0

    def hold(self, connection: "Connection", agent: Agent) -> None:
        """Let an agent beat on a connection."""
        self._portions[agent_portion(agent)][connection] = None

    def forget(self, connection: "Connection") -> None:
        """Know that a connection is gone."""
        self.connections.discard(connection)
        if connection.agent is not None:
            self._portions[agent_portion(connection.agent)].pop(connection, None)

    def count(self) -> Count:
        """Return how many streams there are."""
        return Count(streams=sum(map(len, self._portions)), beats=self._beats)

    def obey(self, order: Order) -> Count:
        """Do what the owner says."""
        if order.order == "drop":
            for connection in list(self.connections):
                connection.drop()
        elif order.order in ("silence", "speak"):
            for number, agent in enumerate(self.agents.values()):
                agent.is_silent = order.order == "silence" and number < order.count
        return self.count()

    async def beat(self) -> None:
        """Beat for all of them, for ever."""
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            for portion in self._portions:
                for connection in portion:
                    self._beats += connection.beat()
                due_s += 1 / PORTIONS
                await asyncio.sleep(due_s - loop.time())


def agent_portion(agent: Agent) -> int:
    """Return in which part of the second an agent beats."""
    return agent._number % PORTIONS


class Connection(asyncio.Protocol):
    """One connection of a client; its requests follow each other."""

    def __init__(self, herd: Herd) -> None:
        #: Whose events go over it.
        self.agent: Agent | None = None
        self._herd = herd
        self._number = 0
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        # uvloop's own are none of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._herd.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._herd.forget(self)

    def data_received(self, data: bytes) -> None:
        """Answer the requests that are whole."""
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            lines = self._received[:end].split(b"\r\n")
            headers = dict(_header(line) for line in lines[1:])
            rest = self._received[end + 4 :]
            length = int(headers.get(b"content-length", b"0"))
            if len(rest) < length:
                return
            self._received = rest[length:]
            self._answer(lines[0].split(b" ")[1], headers)
        if len(self._received) > HEAD_BYTES_MAX:
            self.drop()

    def beat(self) -> int:
        """Send the beat of a second, if the agent does; return how many were sent."""
        assert self.agent is not None
        if self.agent.is_silent:
            return 0
        self._send(self.agent.beat(self._number))
        return 1

    def drop(self) -> None:
        """End it at once, as a link that breaks."""
        if self._transport is not None:
            self._transport.abort()

    def _answer(self, path: bytes, headers: dict[bytes, bytes]) -> None:
        assert self._transport is not None
        agent = self._herd.agents.get(headers.get(b"authorization", b""))
        if agent is None:
            self._json(401, ErrorResponse(ArrieroError(ErrorCode.INVALID_API_KEY).body()))
        elif agent.is_silent:
            pass  # As a machine that hangs.
        elif path == b"/v1/events":
            self._transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                b"cache-control: no-store\r\ntransfer-encoding: chunked\r\n\r\n"
            )
            self.agent = agent
            self._send(agent.snapshot())
            self._herd.hold(self, agent)
        else:
            answer = _look_up(agent, path)
            self._json(404 if isinstance(answer, ErrorResponse) else 200, answer)

    def _send(self, event: AgentSnapshot | AgentBeat) -> None:
        assert self._transport is not None
        self._number += 1
        frame = sse.encode(msgspec.json.encode(event), self._number)
        self._transport.write(b"%x\r\n%s\r\n" % (len(frame), frame))

    def _json(self, status: int, answer: object) -> None:
        assert self._transport is not None
        body = msgspec.json.encode(answer)
        head = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self._transport.write(head % (status, len(body)) + body)


def _look_up(agent: Agent, path: bytes) -> object:
    if path == b"/v1/health":
        return Health(
            status="alive", version=__version__, api_version=API_VERSION, name=agent.name, pid=os.getpid()
        )
    if path == b"/v1/capabilities":
        return agent.capabilities
    if path == b"/v1/workers":
        return WorkerList(agent.workers)
    if path == b"/v1/models":
        return ModelList(agent.models)
    return ErrorResponse(ArrieroError(ErrorCode.NOT_FOUND, f"no route {path!r}").body())


def _header(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name.lower(), value.strip()


async def run(names_and_tokens: Sequence[tuple[str, str]], workers_each: int) -> None:
    """Serve until the standard input ends; the first line of output is the port."""
    herd = Herd(
        {token: Agent(number, name, workers_each) for number, (name, token) in enumerate(names_and_tokens)}
    )
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as sock:
        server = await loop.create_server(lambda: Connection(herd), sock=sock, backlog=BACKLOG)
        _say(sock.getsockname()[1])
        async with asyncio.TaskGroup() as group:
            beats = group.create_task(herd.beat(), name="beats")
            while line := await orders.readline():
                _say(herd.obey(msgspec.json.decode(line, type=Order)))
            beats.cancel()
        server.close()
        herd.obey(Order(order="drop"))


def _say(answer: object) -> None:
    sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    given = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=list[tuple[str, str]])
    uvloop.run(run(given, int(sys.argv[2])))
