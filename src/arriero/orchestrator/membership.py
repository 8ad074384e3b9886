"""Which nodes are held, and who begins and ends that?  (`Membership`)"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.events import NodeStep
from arriero.contracts.requests import NodeUpdateBody
from arriero.fabrics.base import Fabric
from arriero.orchestrator.links import NodeLink, Revive
from arriero.orchestrator.machines.machines import Machines
from arriero.orchestrator.nodes import Node, NodeRegistry
from arriero.orchestrator.reach import Line, Reach, SshReach, address_of
from arriero.orchestrator.store.nodes import NodeEntry, NodeStore
from arriero.runtime import logs
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy
from arriero.runtime.http import Http

#: What machines told last is written down so often, and at the end.
KEEP_EVERY_S: Final = 60.0


class Membership:
    """Holds a link to each registered machine and to this one; what changes is on disk first."""

    def __init__(
        self,
        registry: NodeRegistry,
        store: NodeStore,
        fabric: Fabric,
        http: Http,
        group: asyncio.TaskGroup,
        clock: Clock,
        entropy: Entropy,
        *,
        node_timeout_s: float,
        connect_timeout_s: float,
        machines: Machines,
        stop: asyncio.Event,
    ) -> None:
        self._registry = registry
        self._store = store
        self._fabric = fabric
        self._http = http
        self._group = group
        self._clock = clock
        self._entropy = entropy
        self._node_timeout_s = node_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._machines = machines
        self._stop = stop
        self._log = logs.get("arriero.nodes")
        self._tasks: dict[str, asyncio.Task[None]] = {}
        #: One change of what is kept at a time: none is written over another.
        self._changing = asyncio.Lock()

    async def begin(self, local: Reach) -> None:
        """Hold this machine's agent, whenever there is one, and all machines that are registered."""
        for entry in await self._store.entries():
            if entry.is_remote:
                self._registry.add(entry)
                self.hold(entry)
            else:
                self._registry.local_entries[entry.name] = entry
        self._group.create_task(self.link(local).run(), name="link-local")
        self._group.create_task(self._keep_seen_forever(), name="keep-seen")

    async def _keep_seen_forever(self) -> None:
        while True:
            await self._clock.sleep_s(KEEP_EVERY_S)
            await self.keep_seen()

    async def keep_seen(self) -> None:
        """Write down what the machines told last: the next orchestrator begins with it."""
        async with self._changing:
            seen: list[NodeEntry] = []
            for node in self._registry.nodes():
                if node.entry.is_remote and node.last_connected_unix > node.entry.last_connected_unix:
                    node.entry = msgspec.structs.replace(
                        node.entry,
                        capabilities=node.capabilities,
                        last_connected_unix=node.last_connected_unix,
                    )
                    seen.append(node.entry)
            try:
                await self._store.save_all(seen)
            except ArrieroError as error:
                # A full disk takes no machine away.
                self._log.warning(
                    "not written down what machines told", code=str(error.code), why=error.message
                )

    def link(self, reach: Reach, *, name: str | None = None, revive: Revive | None = None) -> NodeLink:
        """Return a link over any reach; the caller runs it."""
        return NodeLink(
            self._registry,
            reach,
            self._clock,
            self._entropy,
            attention=self._http.attention,
            node_timeout_s=self._node_timeout_s,
            connect_timeout_s=self._connect_timeout_s,
            name=name,
            revive=revive,
        )

    def hold(self, entry: NodeEntry) -> None:
        """Begin to hold a registered machine."""
        reach = SshReach(entry, self._fabric, self._http, self._store, self._clock)
        link = self.link(reach, name=entry.name, revive=self._reviving(entry))
        self._tasks[entry.name] = self._group.create_task(link.run(), name=f"link-{entry.name}")

    def _reviving(self, entry: NodeEntry) -> Revive:
        async def revive(line: Line) -> None:
            if self._stop.is_set():
                # It may be we who have ended it.
                return
            self._log.warning("its agent does not come back by itself", node=entry.name)
            await self._machines.start(line.connection, entry.install_path, entry.name, unheard)

        return revive

    async def let_go(self, name: str) -> None:
        """End the link to a registered machine, and its connection; safe to call twice."""
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    @contextlib.asynccontextmanager
    async def without_link(self, name: str, what: str) -> AsyncIterator[None]:
        """Let go of a machine meanwhile; `what` is done to it.

        Whatever comes of it, also if it is interrupted: a machine that is still registered is held again.
        """
        try:
            await self.let_go(name)
            gone = ArrieroError(ErrorCode.NODE_UNREACHABLE, f"{name} is {what}", node=name)
            self._registry.unreachable(self._registry.node(name), gone)
            yield
        finally:
            node = self._registry.find(name)
            if node is not None and name not in self._tasks:
                self.hold(node.entry)

    async def register(self, entry: NodeEntry) -> Node:
        """Keep a machine and begin to hold it."""
        await self._store.save(entry)
        node = self._registry.add(entry)
        self.hold(entry)
        return node

    async def forget(self, name: str) -> None:
        """Keep nothing of a machine.  Raises NODE_NOT_FOUND."""
        async with self._changing:
            # Not before: a change that is under way holds it again at its end.
            await self.let_go(name)
            await self._store.forget(name)
            self._registry.removed(name)

    def remote(self, name: str) -> NodeEntry:
        """Return a registered machine's entry.  Raises NODE_NOT_FOUND; INVALID_REQUEST for this machine."""
        entry = self._registry.node(name).entry
        if not entry.is_remote:
            fail(
                ErrorCode.INVALID_REQUEST,
                f"{name} is this machine: its agent is started and ended by `arriero up` and `arriero down`",
                node=name,
            )
        return entry

    async def update(self, name: str, body: NodeUpdateBody) -> Node:
        """Change what is kept of a machine; one whose address changed is connected anew.

        Raises NODE_NOT_FOUND, INVALID_REQUEST; then nothing is changed.
        """
        async with self._changing:
            return await self._update(name, body)

    async def _update(self, name: str, body: NodeUpdateBody) -> Node:
        before = self._registry.node(name).entry
        changes: dict[str, object] = {}
        if body.labels:
            merged = {**before.labels, **body.labels}
            changes["labels"] = {key: value for key, value in merged.items() if value}
        if body.mac is not None:
            changes["mac"] = body.mac.lower().replace("-", ":")
        where = {"ssh": body.ssh, "key_path": body.key_path, "host_key": body.accept_host_key}
        moved = {key: value for key, value in where.items() if value is not None}
        if moved:
            self.remote(name)
        after = msgspec.structs.replace(before, **changes, **moved)
        if after.is_remote:
            address_of(after)
        await self._store.save(after)
        if moved and after != before:
            async with self.without_link(name, "connected anew"):
                return self._registry.changed_entry(after)
        return self._registry.changed_entry(after)

    async def wish_drained(self, name: str, *, is_drained: bool) -> Node:
        """Give a node no new work, or give it work again.  Raises NODE_NOT_FOUND."""
        async with self._changing:
            entry = msgspec.structs.replace(self._registry.node(name).entry, is_drained=is_drained)
            await self._store.save(entry)
            return self._registry.changed_entry(entry)


def unheard(_: NodeStep) -> None:
    """Tell nobody."""
