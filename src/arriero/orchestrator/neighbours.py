"""How does one machine fetch a model from another, when neither can reach the other?

Through us: a loopback port on the one leads, inside its SSH connection, to an end here that leads,
inside the other's, to the other's agent.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Final

from arriero.contracts.errors import ArrieroError
from arriero.contracts.peers import reading_token
from arriero.contracts.requests import PeerSource
from arriero.contracts.states import NodeState
from arriero.fabrics.base import LocalEnd
from arriero.orchestrator.nodes import Node, NodeRegistry
from arriero.orchestrator.reach import Line
from arriero.runtime import logs
from arriero.runtime.clock import Clock

#: A node asks no more others than this for a model.
SOURCES_MAX: Final = 8
#: After a change in the pool the ways are looked through, at most this often.
LOOK_EVERY_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class _Way:
    """A port on the machine of who fetches, that leads to the agent of who gives."""

    line: Line
    giver: Line
    end: LocalEnd


class Neighbours:
    """Opens the ways between nodes, and closes those of which an end holds no more."""

    def __init__(self, registry: NodeRegistry, group: asyncio.TaskGroup, clock: Clock) -> None:
        self._registry = registry
        self._group = group
        self._clock = clock
        self._log = logs.get("arriero.nodes")
        #: By who fetches and who gives.
        self._ways: dict[tuple[str, str], _Way] = {}
        self._closing: asyncio.Task[None] | None = None

    async def sources_for(self, node: Node, model_ref: str) -> list[PeerSource]:
        """Return the other nodes as `node` reaches them, those that have the model first.

        The others may have the same content under another reference.  One that cannot be reached from
        there is left out: the model then comes from elsewhere.
        """
        found: list[PeerSource] = []
        others = [
            other
            for other in self._registry.nodes()
            if other is not node and other.state in (NodeState.READY, NodeState.DRAINING)
        ]
        for other in sorted(others, key=lambda other: model_ref not in other.models)[:SOURCES_MAX]:
            try:
                source = await self._source(node, other)
            except ArrieroError as error:
                self._log.warning("no way between", node=node.name, other=other.name, why=error.message)
                continue
            if source is not None:
                found.append(source)
        return found

    async def _source(self, node: Node, other: Node) -> PeerSource | None:
        line, giver, agent = node.line, other.line, other.agent
        if line is None or giver is None or agent is None:
            return None
        end = giver.end(agent.url)
        if end is None:
            return None
        key, way = (node.name, other.name), _Way(line, giver, end)
        before = self._ways.get(key)
        self._ways[key] = way
        if before is not None and before != way:
            await self._close(before)
        if self._closing is None:
            self._closing = self._group.create_task(self._close_forever(), name="close-ways")
        port = await line.connection.expose(end)
        if not self._holds(key, way):
            # Its end went while it was opened: nobody else closes it then.
            await self._close(way)
            return None
        # What holds this reads models there, and commands nothing.
        token = reading_token(agent.token)
        return PeerSource(url=f"http://127.0.0.1:{port}", token=token, node=other.name)

    async def _close_forever(self) -> None:
        while True:
            if not await self._closed_some():
                await self._registry.changed.wait()
                await self._clock.sleep_s(LOOK_EVERY_S)

    async def _closed_some(self) -> bool:
        over = {key: way for key, way in self._ways.items() if not self._holds(key, way)}
        for key in over:
            del self._ways[key]
        async with asyncio.TaskGroup() as group:
            for way in over.values():
                group.create_task(self._close(way), name="close-way")
        return bool(over)

    def _holds(self, key: tuple[str, str], way: _Way) -> bool:
        """Return whether both of its ends are those that the nodes have now."""
        node, other = (self._registry.find(name) for name in key)
        if node is None or node.line is not way.line or way.line.is_gone:
            return False
        if other is None or other.line is not way.giver or way.giver.is_gone or other.agent is None:
            return False
        return way.giver.end(other.agent.url) == way.end

    async def _close(self, way: _Way) -> None:
        if not way.line.is_gone:
            with contextlib.suppress(ArrieroError):
                await way.line.connection.unexpose(way.end)
