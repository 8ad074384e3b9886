"""What does the orchestrator know of its nodes and their workers?  (`NodeRegistry`)

What lives comes from the agents' event streams and is rebuilt from their snapshots; which machines
there are besides this one is kept on disk (`store.nodes`).
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorBody, ErrorCode, fail
from arriero.contracts.events import (
    AgentBeat,
    AgentEvent,
    AgentSnapshot,
    DownloadChanged,
    ModelsChanged,
    NodeChanged,
    PoolEvent,
    PoolWorkerChanged,
    WorkerChanged,
)
from arriero.contracts.records import (
    Capabilities,
    DownloadRecord,
    ModelRecord,
    NodeRecord,
    RunRecord,
    WorkerExit,
    WorkerRecord,
)
from arriero.contracts.states import NodeState, WorkerState
from arriero.domain.download_states import DOWNLOADS
from arriero.domain.node_names import free_name
from arriero.domain.node_states import NODES
from arriero.domain.worker_states import READY, WORKERS
from arriero.domain.workers import WorkerRegistry
from arriero.orchestrator import reach
from arriero.orchestrator.feed import Feed
from arriero.orchestrator.reach import Line
from arriero.orchestrator.store.nodes import NodeEntry
from arriero.orchestrator.upstream import Address
from arriero.orchestrator.views import PoolViews
from arriero.runtime import logs
from arriero.runtime.clock import Clock
from arriero.runtime.http import Peer
from arriero.runtime.tasks import Changed

#: So many workers that ended are remembered, so that a look-up still tells how.
ENDED_MAX: Final = 100
#: So many downloads of a node are remembered, those that run in any case.
DOWNLOADS_MAX: Final = 200


@dataclass(slots=True)
class Node:
    """One machine, as its agent tells."""

    name: str
    entry: NodeEntry
    #: As its agent told last, perhaps before our own start.
    capabilities: Capabilities
    state: NodeState = NodeState.JOINING
    #: The way to it; None while there is none.
    line: Line | None = None
    agent: RunRecord | None = None
    last_connected_unix: float = 0.0
    #: Why it does not answer, while it does not.
    error: ErrorBody | None = None
    latency_ms: float = 0.0
    #: Names of the nodes that are the same machine.
    same_machine_as: list[str] = field(default_factory=list)
    #: It takes no new work for as long as something is done to it.
    is_paused: bool = False
    downloads: dict[str, DownloadRecord] = field(default_factory=dict)
    #: Its catalog, by reference.
    models: dict[str, ModelRecord] = field(default_factory=dict)

    @property
    def peer(self) -> Peer:
        """Its agent, called by JSON.  Raises NODE_UNREACHABLE."""
        line, agent = self._held()
        return line.peer(agent.url, agent.token)

    @property
    def address(self) -> Address:
        """Its agent, for what is relayed byte by byte.  Raises NODE_UNREACHABLE."""
        line, agent = self._held()
        return line.address(agent.url, agent.token)

    def _held(self) -> tuple[Line, RunRecord]:
        if self.line is None or self.agent is None:
            fail(ErrorCode.NODE_UNREACHABLE, f"node {self.name} is {self.state}", node=self.name)
        return self.line, self.agent

    def record(self) -> NodeRecord:
        """Return what the lists show."""
        has, entry = self.capabilities, self.entry
        address = reach.address_of(entry) if entry.is_remote else None
        return NodeRecord(
            name=self.name,
            status=self.state,
            version=has.version,
            backends=has.backends,
            devices=has.devices,
            ram_mb=has.ram_mb,
            ram_free_mb=has.ram_free_mb,
            disk_free_mb=has.disk_free_mb,
            labels=entry.labels,
            last_connected_unix=self.last_connected_unix,
            is_remote=entry.is_remote,
            ssh=entry.ssh,
            user=(address.user if address is not None else None) or "",
            host=address.host if address is not None else "",
            port=address.port if address is not None else None,
            key_path=entry.key_path,
            host_key=entry.host_key,
            install_path=entry.install_path,
            mac=entry.mac,
            engines=has.engines,
            os=has.os,
            arch=has.arch,
            cpu_cores=has.cpu_cores,
            is_drained=entry.is_drained,
            lease=self.line.lease if self.line is not None else 0,
            error=self.error,
            advice=[*has.advice, *self._advice()],
            latency_ms=self.latency_ms,
            models=len(self.models),
            machine_id=has.machine_id,
            same_machine_as=self.same_machine_as,
        )

    def _advice(self) -> list[str]:
        found = []
        own = self.capabilities.name
        # A registered machine is called what it was added as, whatever its agent says.
        if not self.entry.is_remote and own != self.name:
            found.append(
                f"this machine's agent is called {own}, and so is a machine that was added: it goes by "
                f"{self.name} until the setting node_name gives it a name of its own and it is restarted"
            )
        if self.same_machine_as:
            found.append(shared_memory(self.same_machine_as))
        return found


def shared_memory(others: Sequence[str]) -> str:
    """Return what a person should know of nodes that are one machine."""
    return f"this is the same machine as {', '.join(others)}: its memory is shared"


class NodeRegistry:
    """Nodes, their workers and the workers' tokens; `changed` wakes whoever waits for any of it."""

    def __init__(self, clock: Clock, feed: Feed, *, wake_cost_s: float = 60.0) -> None:
        self._clock = clock
        self._feed = feed
        self._log = logs.get("arriero.nodes")
        self._nodes: dict[str, Node] = {}
        self._tokens: dict[str, str] = {}
        self._ended: OrderedDict[str, WorkerRecord] = OrderedDict()
        self.workers = WorkerRegistry()
        #: The same as choices see it.
        self.views = PoolViews(clock, wake_cost_s=wake_cost_s)
        self.changed = Changed()
        #: What a person changed of this machine itself, by the name of its agent.
        self.local_entries: dict[str, NodeEntry] = {}
        #: Address that workers' proxy routes are shown under; set once the port is known.
        self.public_url = ""

    # --- Reading -------------------------------------------------------------------------

    def nodes(self) -> list[Node]:
        """Return all nodes by name."""
        return sorted(self._nodes.values(), key=lambda node: node.name)

    def find(self, name: str) -> Node | None:
        """Return a node, or None."""
        return self._nodes.get(name)

    def node(self, name: str) -> Node:
        """Return a node.  Raises NODE_NOT_FOUND."""
        node = self._nodes.get(name)
        if node is None:
            fail(ErrorCode.NODE_NOT_FOUND, f"no node is called {name!r}", node=name)
        return node

    def reachable(self, name: str) -> Node:
        """Return a node that answers.  Raises NODE_NOT_FOUND, NODE_UNREACHABLE."""
        node = self.node(name)
        if node.state not in (NodeState.READY, NodeState.DRAINING):
            why = f": {node.error.message}" if node.error is not None else ""
            fail(ErrorCode.NODE_UNREACHABLE, f"node {name} is {node.state}{why}", node=name)
        return node

    def is_ready(self) -> bool:
        """Return whether any node takes work."""
        return any(node.state is NodeState.READY for node in self._nodes.values())

    def worker(self, worker_id: str) -> WorkerRecord:
        """Return a worker, also one that ended lately.  Raises WORKER_NOT_FOUND."""
        return self._ended.get(worker_id) or self.workers.get(worker_id)

    def ended(self) -> list[WorkerRecord]:
        """Return the workers that ended lately, the last one last."""
        return list(self._ended.values())

    def address(self, worker: WorkerRecord) -> Address:
        """Return where a live worker listens and what it demands.  Raises WORKER_NOT_FOUND."""
        record = self.workers.get(worker.worker_id)
        token = self._tokens.get(worker.worker_id)
        if token is None or not record.url:
            fail(
                ErrorCode.NO_READY_WORKERS,
                f"worker {record.worker_id} is {record.state}: its server does not answer yet",
                worker_id=record.worker_id,
                state=str(record.state),
            )
        node = self._nodes.get(record.node)
        if node is None or node.line is None:
            fail(ErrorCode.NODE_UNREACHABLE, f"node {record.node} does not answer", node=record.node)
        return node.line.address(record.url, token)

    def public(self, record: WorkerRecord) -> WorkerRecord:
        """Return a record as our answers show it: its address leads through us."""
        return msgspec.structs.replace(
            record, url=f"{self.public_url}/v1/workers/{record.worker_id}/proxy", data_address=None
        )

    def downloads(self) -> list[tuple[Node, DownloadRecord]]:
        """Return all downloads with their nodes, the newest first."""
        found = [(node, download) for node in self.nodes() for download in node.downloads.values()]
        return sorted(found, key=lambda pair: -pair[1].started_unix)

    # --- What the agents tell ------------------------------------------------------------

    def add(self, entry: NodeEntry) -> Node:
        """Take a machine that is known, whose agent has told nothing yet since our start."""
        assert entry.capabilities is not None, "a machine is known after its agent has told of it"
        node = Node(entry.name, entry, entry.capabilities, last_connected_unix=entry.last_connected_unix)
        self._nodes[entry.name] = node
        self._tell(NodeChanged(node=node.record()))
        return node

    def unfit(self, has: Capabilities) -> Node:
        """Take this machine, whose agent cannot be worked with: it is listed, and tells why."""
        node = self._local(has)
        node.capabilities = has
        self._tell(NodeChanged(node=node.record()))
        return node

    def _local(self, has: Capabilities) -> Node:
        """Return this machine, under a name that is no registered machine's."""
        for node in self._nodes.values():
            if not node.entry.is_remote and node.capabilities.name == has.name:
                return node
        name = free_name(has.name, self._nodes)
        if name != has.name:
            self._log.warning("a registered machine has this machine's name", agent=has.name, node=name)
        entry = self.local_entries.get(name) or NodeEntry(name=name, is_remote=False)
        self._nodes[name] = node = Node(name, entry, has)
        return node

    def changed_entry(self, entry: NodeEntry) -> Node:
        """Take what a person changed of a machine.  Raises NODE_NOT_FOUND."""
        node = self.node(entry.name)
        node.entry = entry
        self._follow_wish(node)
        self._tell(NodeChanged(node=node.record()))
        return node

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[Node]:
        """Give a node no new work meanwhile; what a person wishes stays as it is, also if we die.

        Raises NODE_NOT_FOUND.
        """
        node = self.node(name)
        node.is_paused = True
        self._follow_wish(node)
        try:
            yield node
        finally:
            node.is_paused = False
            self._follow_wish(node)

    def removed(self, name: str) -> None:
        """Forget a machine, and end what we knew of its workers.  Raises NODE_NOT_FOUND."""
        node = self.node(name)
        for record in self.workers.select(node=name):
            self._end_unseen(record)
        self._step(node, NodeState.REMOVED)
        del self._nodes[name]
        self._match_machines(node.capabilities.machine_id)

    def joined(
        self, snapshot: AgentSnapshot, line: Line, agent: RunRecord, *, name: str | None = None
    ) -> Node:
        """Take an agent's snapshot: its node is ready, and has these workers and no others.

        `name`: what a registered machine is called, whatever its agent says; None: it is this machine.
        Raises NODE_NOT_FOUND.
        """
        if name is None:
            node = self._local(snapshot.capabilities)
            name = node.name
        else:
            node = self.node(name)
        if node.state is NodeState.UNREACHABLE:
            self._step(node, NodeState.JOINING)
        node.line = line
        node.agent = agent
        node.error = None
        machine_ids = {node.capabilities.machine_id, snapshot.capabilities.machine_id}
        node.capabilities = snapshot.capabilities
        for machine_id in machine_ids:
            self._match_machines(machine_id)
        node.last_connected_unix = self._clock.wall_s()
        before, node.downloads = (
            node.downloads,
            {download.download_id: _on(name, download) for download in reversed(snapshot.downloads)},
        )
        told = {record.worker_id for record in snapshot.workers}
        for record in self.workers.select(node=name):
            if record.worker_id not in told:
                self._end_unseen(record)
        for record in snapshot.workers:
            if record.state not in WORKERS.final:
                # It ended for us when its machine was forgotten; the machine is back, and so is it.
                self._ended.pop(record.worker_id, None)
            self.observe(_here(name, record), snapshot.worker_tokens.get(record.worker_id, ""))
        if node.state is NodeState.JOINING:
            self._step(node, NodeState.READY)
        else:
            self._tell(NodeChanged(node=node.record()))
        self._has_models(node, snapshot.models)
        self._follow_wish(node)
        for download_id, download in node.downloads.items():
            if before.get(download_id) != download:
                # What happened while nobody listened.
                self._tell(DownloadChanged(download=download))
        return node

    def heard(self, node: Node, event: AgentEvent) -> None:
        """Take one event after the snapshot."""
        node.last_connected_unix = self._clock.wall_s()
        if node.state is NodeState.UNREACHABLE:
            # It spoke in the very moment in which it was given up.
            self._step(node, NodeState.JOINING)
            self._step(node, NodeState.READY)
            node.error = None
            self._follow_wish(node)
        if isinstance(event, WorkerChanged):
            self.observe(_here(node.name, event.worker), event.worker_token)
            self.views.told(node.name, event.worker.worker_id)
        elif isinstance(event, DownloadChanged):
            download = _on(node.name, event.download)
            node.downloads[download.download_id] = download
            _forget_old(node.downloads)
            self._tell(DownloadChanged(download=download))
        elif isinstance(event, ModelsChanged):
            self._has_models(node, event.models)
        elif isinstance(event, AgentBeat):
            free = event.device_free_mb
            node.capabilities = msgspec.structs.replace(
                node.capabilities,
                ram_free_mb=event.ram_free_mb,
                disk_free_mb=event.disk_free_mb,
                devices=[
                    msgspec.structs.replace(device, memory_free_mb=free.get(device.id, device.memory_free_mb))
                    for device in node.capabilities.devices
                ],
            )
            self.views.beat(
                node.name,
                ram_free_mb=event.ram_free_mb,
                disk_free_mb=event.disk_free_mb,
                devices=node.capabilities.devices,
                promised_mb=event.promised_mb,
            )

    def unreachable(self, node: Node, error: ArrieroError) -> None:
        """Know that a node does not answer; safe to call twice."""
        before, node.error = node.error, reach.told_of_node(error, node.name).body()
        if node.state in (NodeState.READY, NodeState.DRAINING, NodeState.JOINING):
            self._log.warning("node unreachable", node=node.name, why=error.message)
            self._step(node, NodeState.UNREACHABLE)
        elif before is None or before.code != node.error.code:
            self._tell(NodeChanged(node=node.record()))

    def on_machine(self, machine_id: str) -> list[Node]:
        """Return the nodes that are one machine, by name; none for one that is not known."""
        if not machine_id:
            return []
        return [node for node in self.nodes() if node.capabilities.machine_id == machine_id]

    def _match_machines(self, machine_id: str) -> None:
        here = self.on_machine(machine_id)
        for node in here:
            others = [other.name for other in here if other is not node]
            if others != node.same_machine_as:
                node.same_machine_as = others
                self._tell(NodeChanged(node=node.record()))

    def _follow_wish(self, node: Node) -> None:
        """Take a node out of the choice, or back, as was asked for; also after it comes back."""
        takes_none = node.entry.is_drained or node.is_paused
        wished = NodeState.DRAINING if takes_none else NodeState.READY
        if node.state in (NodeState.READY, NodeState.DRAINING) and node.state is not wished:
            self._step(node, wished)

    def observe(self, record: WorkerRecord, token: str = "") -> None:
        """Take what an agent says of one worker."""
        before = self.workers.find(record.worker_id)
        if record.worker_id in self._ended or (before is not None and self._is_of_another(before, record)):
            return
        if token:
            self._tokens[record.worker_id] = token
        try:
            self.workers.observe(record)
        except ArrieroError as error:
            # The agent is the truth: our view was older than we thought.
            self._log.error("worker went where no arrow leads", worker_id=record.worker_id, why=error.message)
            self.workers.remove(record.worker_id)
            self.workers.register(record)
        if record.state in WORKERS.final:
            self.workers.remove(record.worker_id)
            self._tokens.pop(record.worker_id, None)
            self._ended[record.worker_id] = record
            while len(self._ended) > ENDED_MAX:
                self._ended.popitem(last=False)
        if before is None or before.state is not record.state:
            # Busy and idle come and go with every request.
            is_common = before is not None and {before.state, record.state} <= READY
            (self._log.debug if is_common else self._log.info)(
                "worker", worker_id=record.worker_id, node=record.node, state=str(record.state),
                model_ref=record.model_ref,
            )  # fmt: skip
        if before != record:
            self._tell(PoolWorkerChanged(worker=self.public(record)))

    def _is_of_another(self, before: WorkerRecord, record: WorkerRecord) -> bool:
        """Return whether a machine tells of a worker that is another's: it ends and moves none of those."""
        if before.node == record.node:
            return False
        # This machine's own agent may have got another name.
        nodes = [self._nodes[name] for name in (before.node, record.node) if name in self._nodes]
        is_foreign = any(node.entry.is_remote for node in nodes)
        if is_foreign:
            self._log.error(
                "told of another node's worker",
                worker_id=record.worker_id,
                node=record.node,
                owner=before.node,
            )
        return is_foreign

    def _end_unseen(self, record: WorkerRecord) -> None:
        ended = WorkerExit(code=ErrorCode.WORKER_LOST.value, message="its agent does not know it any more")
        self.observe(msgspec.structs.replace(record, state=WorkerState.FAILED, exit=ended))

    def _step(self, node: Node, state: NodeState) -> None:
        NODES.check(node.state, state)
        node.state = state
        self._log.info("node", node=node.name, state=str(state))
        self._tell(NodeChanged(node=node.record()))

    def _has_models(self, node: Node, models: list[ModelRecord]) -> None:
        node.models = {model.model_ref: model for model in models}
        self.views.models_told(node.name, models)
        self.changed.notify()

    def _tell(self, event: PoolEvent) -> None:
        self.views.take(event)
        self._feed.tell(event)
        self.changed.notify()


def _on(node: str, download: DownloadRecord) -> DownloadRecord:
    return msgspec.structs.replace(download, node=node)


def _here(node: str, worker: WorkerRecord) -> WorkerRecord:
    # An agent that was there before its machine was added goes by another name.
    return worker if worker.node == node else msgspec.structs.replace(worker, node=node)


def _forget_old(downloads: dict[str, DownloadRecord]) -> None:
    """Forget the downloads that ended longest ago, where there are too many."""
    excess = len(downloads) - DOWNLOADS_MAX
    ended = [key for key, download in downloads.items() if download.state in DOWNLOADS.final]
    for key in ended[: max(excess, 0)]:
        del downloads[key]
