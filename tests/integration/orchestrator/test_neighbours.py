"""The ways between machines last as long as both ends of them, and what leads to an agent is no key to it."""

import asyncio
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

from arriero.contracts.events import AgentSnapshot
from arriero.contracts.records import Capabilities, RunRecord
from arriero.fabrics.base import LocalEnd
from arriero.fabrics.local import LocalConnection
from arriero.orchestrator.feed import Feed
from arriero.orchestrator.neighbours import Neighbours
from arriero.orchestrator.nodes import Node, NodeRegistry
from arriero.orchestrator.reach import Line
from arriero.orchestrator.store.nodes import NodeEntry
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SystemEntropy
from arriero.runtime.http import Http

WAIT_S = 120.0
MODEL = "hf:org/tiny:Q8_0"


class Counted(LocalConnection):
    """One that knows which of its ports lead elsewhere."""

    def __init__(self) -> None:
        super().__init__(SystemEntropy(), Path())
        self.exposed: set[LocalEnd] = set()

    async def expose(self, end: LocalEnd) -> int:
        """Take note."""
        self.exposed.add(end)
        return 9

    async def unexpose(self, end: LocalEnd) -> None:
        """Take note."""
        self.exposed.discard(end)


class Hasty(SystemClock):
    """One for which no time has to pass."""

    async def sleep_s(self, seconds: float) -> None:
        """Let others go on."""
        await asyncio.sleep(0)


class Joined:
    """A node that is held."""

    def __init__(self, registry: NodeRegistry, http: Http, name: str) -> None:
        self._registry = registry
        self._has = Capabilities(
            name=name, version="0.1.0", api_version=1, backends=["cpu"], devices=[], engines={},
            ram_mb=8000, ram_free_mb=4000, disk_free_mb=9000, cpu_cores=2, os="linux", arch="x86_64",
        )  # fmt: skip
        registry.add(NodeEntry(name=name, ssh="u@h", install_path="arr", capabilities=self._has))
        self.connection = Counted()
        self.line = Line(self.connection, http, holder_id="o-1", lease=1)

    async def answers(self, port: int) -> Node:
        """Have its agent listen on a port."""
        agent = RunRecord(
            pid=1, url=f"http://127.0.0.1:{port}", version="0.1.0", started=0.0, token="commands"
        )
        await self.line.open(agent.url)
        snapshot = AgentSnapshot(capabilities=self._has, workers=[], downloads=[], worker_tokens={})
        return self._registry.joined(snapshot, self.line, agent, name=self._has.name)


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for a condition; the test's own limit ends it."""
    while not is_so():  # noqa: ASYNC110 - Nobody tells of it.
        await asyncio.sleep(0)


def end_closing() -> None:
    """Let the orchestrator end."""
    for task in asyncio.all_tasks():
        if task.get_name() == "close-ways":
            task.cancel()


async def test_a_thousand_machines_that_come_and_go_leave_no_way_behind() -> None:
    registry = NodeRegistry(SystemClock(), Feed())
    lines: list[weakref.ref[Line]] = []
    async with Http() as http, asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        neighbours = Neighbours(registry, group, Hasty())
        here = Joined(registry, http, "here")
        node = await here.answers(9200)
        for number in range(1000):
            other = Joined(registry, http, f"n-{number}")
            theirs = await other.answers(10_000 + number)
            (source,) = await neighbours.sources_for(node, MODEL)
            assert (source.node, source.url) == (theirs.name, "http://127.0.0.1:9")
            assert source.token not in ("", "commands")
            (source,) = await neighbours.sources_for(theirs, MODEL)
            assert source.node == "here"
            lines.append(weakref.ref(other.line))
            if number % 2:
                registry.removed(theirs.name)
            await other.line.aclose()
            if not number % 2:
                registry.removed(theirs.name)
            del other, theirs
        await until(lambda: not here.connection.exposed)
        await until(lambda: gc.collect() >= 0 and not any(line() for line in lines))
        end_closing()


async def test_an_agent_that_starts_anew_is_not_reached_by_its_old_port() -> None:
    registry = NodeRegistry(SystemClock(), Feed())
    async with Http() as http, asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        neighbours = Neighbours(registry, group, Hasty())
        here, far = Joined(registry, http, "here"), Joined(registry, http, "far")
        node, other = await here.answers(9200), await far.answers(9201)
        await neighbours.sources_for(node, MODEL)
        before = set(here.connection.exposed)
        assert len(before) == 1 and other.agent is not None
        await far.line.shut(other.agent.url)
        await far.answers(9202)
        # Nobody asks for anything: it is closed all the same.
        await until(lambda: not here.connection.exposed)
        await neighbours.sources_for(node, MODEL)
        assert len(here.connection.exposed) == 1 and here.connection.exposed != before
        end_closing()
