"""A machine that was away for long: what is known of it in the first moment of its return?"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode, ErrorResponse, fail
from arriero.contracts.events import AgentBeat, AgentSnapshot
from arriero.contracts.records import Capabilities, RunRecord
from arriero.contracts.states import NodeState
from arriero.contracts.version import API_VERSION, __version__
from arriero.fabrics.local import LocalConnection
from arriero.orchestrator.feed import Feed
from arriero.orchestrator.links import LASTING_RETRY_S, NodeLink
from arriero.orchestrator.nodes import NodeRegistry
from arriero.orchestrator.reach import Line
from arriero.orchestrator.store.nodes import NodeEntry
from arriero.runtime import sse
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SystemEntropy
from arriero.runtime.http import Http

WAIT_S = 30.0
NODE_TIMEOUT_S = 3.0
HAS = Capabilities(
    name="far", version=__version__, api_version=API_VERSION, backends=["cpu"], devices=[], engines={},
    ram_mb=8000, ram_free_mb=4000, disk_free_mb=9000, cpu_cores=2, os="linux", arch="x86_64",
)  # fmt: skip


@asynccontextmanager
async def agent(beats: list[float]) -> AsyncIterator[str]:
    """Serve an agent that tells all it has to, and never answers anything else; `beats` it sent."""
    snapshot = AgentSnapshot(capabilities=HAS, workers=[], downloads=[], worker_tokens={})
    beat = AgentBeat(ram_free_mb=4000, disk_free_mb=9000, unix=0.0)
    answers = set[asyncio.Task[None]]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        answers.add(task)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"GET /v1/events "):
                await asyncio.Event().wait()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
            writer.write(sse.encode(msgspec.json.encode(snapshot), 1))
            while True:
                await writer.drain()
                await asyncio.sleep(NODE_TIMEOUT_S / 6)
                writer.write(sse.encode(msgspec.json.encode(beat), 2))
                beats.append(asyncio.get_running_loop().time())
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in answers:
            task.cancel()
        if answers:
            await asyncio.wait(answers)


class Hasty(SystemClock):
    """What lasts is tried again in a moment."""

    async def sleep_s(self, seconds: float) -> None:
        """Sleep, but not for that long."""
        await super().sleep_s(seconds / 100 if seconds == LASTING_RETRY_S else seconds)


class Way:
    """A line that holds, to an agent that is not there until it `is_there`; `others` are asked before it."""

    def __init__(self, url: str, line: Line, *others: str) -> None:
        self._urls = [*others, url]
        self._line = line
        self.is_there = bool(others)
        self.drops = 0

    async def line(self) -> Line:
        """Return it."""
        return self._line

    async def agent(self, line: Line) -> RunRecord:
        """Return how it is talked to."""
        if not self.is_there:
            fail(ErrorCode.NOT_RUNNING, "not yet")
        url = self._urls.pop(0) if len(self._urls) > 1 else self._urls[0]
        return RunRecord(pid=1, url=url, version=__version__, started=0.0)

    async def drop(self, above: int = 0) -> None:
        """Keep the line, and take note."""
        self.drops += 1


async def test_a_machine_that_is_back_is_not_missed_for_the_time_before(tmp_path: Path) -> None:
    clock, registry, beats = SystemClock(), NodeRegistry(SystemClock(), Feed()), list[float]()
    node = registry.add(NodeEntry(name="far", ssh="u@h", install_path="arr", capabilities=HAS))
    async with Http() as http, agent(beats) as url:
        way = Way(url, Line(LocalConnection(SystemEntropy(), tmp_path), http, holder_id="o", lease=1))
        link = NodeLink(
            registry, way, clock, SystemEntropy(), attention=http.attention,
            node_timeout_s=NODE_TIMEOUT_S, connect_timeout_s=0.1, name="far",
        )  # fmt: skip
        states: list[NodeState] = []
        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
            task = group.create_task(link.run())
            while node.state is not NodeState.UNREACHABLE:
                await registry.changed.wait()
            way.is_there = True
            # It tells of itself from the first moment on, and is asked how far away it is.
            while len(beats) < 4:
                if not states or states[-1] is not node.state:
                    states.append(node.state)
                await asyncio.sleep(0.01)
            task.cancel()
    assert [state for state in states if state is not NodeState.JOINING] == [
        NodeState.UNREACHABLE,
        NodeState.READY,
    ]


DEFECT = msgspec.json.encode(ErrorResponse(error=ArrieroError(ErrorCode.INTERNAL_ERROR).body()))


@pytest.mark.parametrize(("status", "content"), [(404, b"<h1>Not here</h1>"), (500, DEFECT)])
async def test_whoever_else_answers_at_its_port_costs_no_line(
    tmp_path: Path, status: int, content: bytes
) -> None:
    clock, registry = Hasty(), NodeRegistry(SystemClock(), Feed())
    node = registry.add(NodeEntry(name="far", ssh="u@h", install_path="arr", capabilities=HAS))

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d No\r\ncontent-length: %d\r\n\r\n%b" % (status, len(content), content))
        await writer.drain()
        writer.close()

    stranger = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = stranger.sockets[0].getsockname()[1]
    async with Http() as http, agent([]) as url, stranger:
        line = Line(LocalConnection(SystemEntropy(), tmp_path), http, holder_id="o", lease=1)
        # After a restart of its machine another program may have the port that it had.
        way = Way(url, line, f"http://127.0.0.1:{port}")
        link = NodeLink(
            registry, way, clock, SystemEntropy(), attention=http.attention,
            node_timeout_s=NODE_TIMEOUT_S, connect_timeout_s=NODE_TIMEOUT_S, name="far",
        )  # fmt: skip
        async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
            task = group.create_task(link.run())
            while node.state is not NodeState.READY:
                await registry.changed.wait()
            assert way.drops == 0, "every stream of its workers went with the line"
            task.cancel()
