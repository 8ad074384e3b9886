"""How is an agent found, held, and found again?

The local agent is found by its run file; a new one with the same state folder takes its place.
Its event stream is held open: as long as beats come the node is there.
"""

import asyncio
from typing import Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import AgentEvent, AgentSnapshot
from arriero.contracts.records import RunRecord
from arriero.contracts.version import API_VERSION
from arriero.domain import backoff
from arriero.orchestrator.nodes import Node, NodeRegistry
from arriero.orchestrator.upstream import Address
from arriero.runtime import logs
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy
from arriero.runtime.http import Http
from arriero.runtime.state_dir import StateDir

LOOK_EVERY_S: Final = 0.1
RETRY_S_MAX: Final = 2.0
_EVENTS: Final = msgspec.json.Decoder(AgentEvent)


class AgentLink:
    """Holds the local agent's events; `run` never ends by itself."""

    def __init__(
        self,
        registry: NodeRegistry,
        state_dir: StateDir,
        http: Http,
        clock: Clock,
        entropy: Entropy,
        *,
        node_timeout_s: float,
    ) -> None:
        self._registry = registry
        self._state_dir = state_dir
        self._http = http
        self._clock = clock
        self._entropy = entropy
        self._node_timeout_s = node_timeout_s
        self._log = logs.get("arriero.nodes")
        self._node: Node | None = None
        self._last_heard_s = 0.0

    async def run(self) -> None:
        """Find the agent and hold it, again and again."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hold_forever(), name="agent-link")
            group.create_task(self._watch_silence(), name="agent-silence")

    async def _hold_forever(self) -> None:
        attempt = 0
        told = ""
        while True:
            record = self._state_dir.running("agent")
            if record is None:
                attempt = 0
                await self._clock.sleep_s(LOOK_EVERY_S)
                continue
            started_s = self._clock.monotonic_s()
            try:
                await self._hold(record)
                why = "the stream ended"
            except ArrieroError as error:
                why = error.message
            if self._last_heard_s >= started_s:
                attempt = 0
            attempt += 1
            if why != told:
                self._log.warning("agent not held", why=why, pid=record.pid)
                told = why
            delay_s = backoff.delay_s(attempt, self._entropy.chance(), cap_s=RETRY_S_MAX)
            await self._clock.sleep_s(max(delay_s, 0.02))

    async def _hold(self, record: RunRecord) -> None:
        """Read one agent's events to their end.  Raises NODE_UNREACHABLE, VERSION_MISMATCH…"""
        peer = self._http.peer(record.url, record.token)
        node: Node | None = None
        events = peer.events("/v1/events", silence_s=self._node_timeout_s)
        try:
            async for event in events:
                if event.comment is None and event.data:
                    node = self._take(event.data, node, record)
                self._last_heard_s = self._clock.monotonic_s()
        finally:
            await events.aclose()

    def _take(self, data: str, node: Node | None, record: RunRecord) -> Node:
        try:
            event = _EVENTS.decode(data)
        except msgspec.DecodeError as error:
            raise ArrieroError(
                ErrorCode.VERSION_MISMATCH, f"the agent sent an event that is none of ours: {error}"
            ) from error
        if isinstance(event, AgentSnapshot):
            if event.capabilities.api_version != API_VERSION:
                raise ArrieroError(
                    ErrorCode.VERSION_MISMATCH,
                    f"the agent speaks version {event.capabilities.api_version}, we speak {API_VERSION}",
                )
            peer = self._http.peer(record.url, record.token)
            node = self._registry.joined(event, peer, Address.of(record.url, record.token))
            if self._node is not None and self._node is not node:
                self._registry.unreachable(self._node, f"its agent is called {node.name} now")
            self._node = node
        elif node is None:
            raise ArrieroError(ErrorCode.VERSION_MISMATCH, "the agent's events did not begin with a snapshot")
        else:
            self._registry.heard(node, event)
        return node

    async def _watch_silence(self) -> None:
        while True:
            silence_s = self._clock.monotonic_s() - self._last_heard_s
            if self._node is not None and silence_s >= self._node_timeout_s:
                self._registry.unreachable(self._node, f"silent for {self._node_timeout_s:g} s")
            due_s = self._node_timeout_s - silence_s
            await self._clock.sleep_s(due_s if due_s > 0 else min(0.5, self._node_timeout_s))
