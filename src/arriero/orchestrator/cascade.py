"""What becomes of agents and workers when their orchestrator leaves?

The order is the orchestrator's: it takes no more requests, what runs comes to its end, and then it
calls these.  All nodes at the same time, so that one that does not answer costs the others nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import ShutdownBody
from arriero.contracts.states import NodeState
from arriero.orchestrator.membership import Membership
from arriero.orchestrator.nodes import NodeRegistry
from arriero.runtime import logs
from arriero.runtime.clock import Clock
from arriero.runtime.http import Peer

AT_ONCE_MAX: Final = 64
ASK_TIMEOUT_S: Final = 5.0
#: Beyond a node's own grace time, for what is killed after it to be gone.
EXTRA_S: Final = 15.0
_LOOK_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Leaving:
    """What goes when the orchestrator goes; by default nothing does."""

    #: This machine's agent.
    takes_agent: bool = False
    #: The agents of all nodes.
    cascades: bool = False
    #: All workers that it started, wherever they are.
    takes_workers: bool = False


async def leave(
    leaving: Leaving,
    registry: NodeRegistry,
    membership: Membership,
    *,
    grace_s: float,
    clock: Clock,
) -> None:
    """End what goes along on other machines, let go of the rest; nothing is asked of us any more by now.

    This machine's agent is ended by a signal, by whoever has its process.
    """
    ending: dict[str, Peer] = {}
    staying: dict[str, Peer] = {}
    for node in registry.nodes():
        if node.state not in (NodeState.READY, NodeState.DRAINING):
            continue
        try:
            peers = ending if leaving.cascades and node.entry.is_remote else staying
            peers[node.name] = node.peer
        except ArrieroError as error:
            # The way to it has gone this very moment.
            logs.get("arriero.cascade").warning("node not asked", node=node.name, why=error.message)
    release_s = grace_s + EXTRA_S if leaving.takes_workers else ASK_TIMEOUT_S
    async with asyncio.TaskGroup() as group:
        group.create_task(release_nodes(staying, timeout_s=release_s), name="release-nodes")
        ends = end_agents(ending, grace_s=grace_s, clock=clock, on_ended=membership.let_go)
        group.create_task(ends, name="end-agents")


async def end_agents(
    agents: Mapping[str, Peer],
    *,
    grace_s: float,
    clock: Clock,
    on_ended: Callable[[str], Awaitable[None]] | None = None,
) -> dict[str, ArrieroError]:
    """End agents, by their node's name, with their workers, and wait until they are gone.

    An agent ends its workers as SIGTERM makes it do, within its own grace time; `grace_s` is how long
    we wait for that.  `on_ended` hears of each at once, also of those that did not: nobody may take one
    for an agent that crashed.  Returns why those have not ended that have not; the log tells it too.
    """

    async def end(name: str, peer: Peer) -> None:
        try:
            await peer.call("POST", "/v1/admin/shutdown", body=ShutdownBody(), timeout_s=ASK_TIMEOUT_S)
            async with asyncio.timeout(grace_s + EXTRA_S):
                while await _answers(peer):
                    await clock.sleep_s(_LOOK_S)
        except TimeoutError as error:
            raise ArrieroError(
                ErrorCode.REQUEST_TIMEOUT, f"its agent has not ended within {grace_s + EXTRA_S:g} s"
            ) from error
        finally:
            if on_ended is not None:
                await on_ended(name)

    return await _of_all(agents, end, "agent not ended")


async def release_nodes(nodes: Mapping[str, Peer], *, timeout_s: float) -> dict[str, ArrieroError]:
    """Let go of nodes whose agents stay; workers that were bound to us are gone when this returns.

    Returns why those could not be let go of that could not: their agents end such workers themselves,
    when they have not heard of us for some seconds.
    """

    async def release(_: str, peer: Peer) -> None:
        await peer.call("POST", "/v1/admin/release", timeout_s=timeout_s)

    return await _of_all(nodes, release, "node not released")


async def _answers(peer: Peer) -> bool:
    try:
        await peer.call("GET", "/v1/health", timeout_s=ASK_TIMEOUT_S)
    except ArrieroError as error:
        # One that does not know our token is another one, at the port of the one that is gone.
        return error.code not in (ErrorCode.NODE_UNREACHABLE, ErrorCode.INVALID_API_KEY)
    return True


async def _of_all(
    peers: Mapping[str, Peer], do: Callable[[str, Peer], Awaitable[None]], event: str
) -> dict[str, ArrieroError]:
    failures: dict[str, ArrieroError] = {}
    places = asyncio.Semaphore(AT_ONCE_MAX)

    async def one(name: str, peer: Peer) -> None:
        async with places:
            try:
                await do(name, peer)
            except ArrieroError as error:
                failures[name] = error
                logs.get("arriero.cascade").warning(event, node=name, code=str(error.code), why=error.message)

    async with asyncio.TaskGroup() as group:
        for name, peer in peers.items():
            group.create_task(one(name, peer), name=f"cascade-{name}")
    return failures
