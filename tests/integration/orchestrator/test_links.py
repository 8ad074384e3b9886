"""What fails on the way to one node is that node's, and nobody else's."""

import asyncio
import contextlib
from typing import NoReturn

from arriero.contracts.errors import ErrorCode
from arriero.contracts.records import Capabilities, RunRecord
from arriero.contracts.states import NodeState
from arriero.orchestrator.feed import Feed
from arriero.orchestrator.links import NodeLink
from arriero.orchestrator.nodes import Node, NodeRegistry
from arriero.orchestrator.reach import Line
from arriero.orchestrator.store.nodes import NodeEntry
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SystemEntropy

WAIT_S = 10.0


class BrokenReach:
    """A way to a node that has a defect of ours."""

    drops = 0

    async def line(self) -> NoReturn:
        """Fail."""
        raise ValueError("nobody thought of this")

    async def agent(self, line: Line) -> RunRecord:
        """Never be asked."""
        raise AssertionError

    async def drop(self, above: int = 0) -> None:
        """Take note."""
        self.drops += 1


def registered(registry: NodeRegistry, name: str) -> Node:
    has = Capabilities(
        name=name, version="0.1.0", api_version=1, backends=["cpu"], devices=[], engines={},
        ram_mb=8000, ram_free_mb=4000, disk_free_mb=9000, cpu_cores=2, os="linux", arch="x86_64",
    )  # fmt: skip
    return registry.add(NodeEntry(name=name, ssh="u@h", install_path="arr", capabilities=has))


async def test_a_defect_on_the_way_to_one_node_ends_nothing_else() -> None:
    clock = SystemClock()
    registry = NodeRegistry(clock, Feed())
    node = registered(registry, "far")
    reach = BrokenReach()
    link = NodeLink(registry, reach, clock, SystemEntropy(), node_timeout_s=60, name="far")
    task = asyncio.create_task(link.run())
    try:
        async with asyncio.timeout(WAIT_S):
            while node.state is not NodeState.UNREACHABLE:
                assert not task.done(), "its link has ended"
                await registry.changed.wait()
        assert node.error is not None and node.error.code == ErrorCode.INTERNAL_ERROR
        assert reach.drops, "the next line is a new one"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
