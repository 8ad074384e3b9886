"""How does one machine fetch a model from another, when neither can reach the other?

Through us: a loopback port on the one leads, inside its SSH connection, to an end here that leads,
inside the other's, to the other's agent.
"""

from typing import Final

from arriero.contracts.errors import ArrieroError
from arriero.contracts.requests import PeerSource
from arriero.contracts.states import NodeState
from arriero.fabrics.base import LocalEnd
from arriero.orchestrator.nodes import Node, NodeRegistry
from arriero.orchestrator.reach import Line
from arriero.runtime import logs

#: A node asks no more others than this for a model.
SOURCES_MAX: Final = 8


class Neighbours:
    """Opens the ways between nodes, and keeps them for as long as both ends hold."""

    def __init__(self, registry: NodeRegistry) -> None:
        self._registry = registry
        self._log = logs.get("arriero.nodes")
        #: By who fetches and who gives.
        self._ways: dict[tuple[str, str], tuple[Line, LocalEnd]] = {}

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
        key = (node.name, other.name)
        before = self._ways.get(key)
        if before is not None and before != (line, end) and not before[0].is_gone:
            await before[0].connection.unexpose(before[1])
        port = await line.connection.expose(end)
        self._ways[key] = (line, end)
        return PeerSource(url=f"http://127.0.0.1:{port}", token=agent.token, node=other.name)
