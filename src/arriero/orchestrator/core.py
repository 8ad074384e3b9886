"""What are the orchestrator's parts, and how do they hang together?  (`Orchestrator`)"""

import asyncio
from dataclasses import dataclass

from arriero.contracts.errors import ErrorCode, fail
from arriero.contracts.events import PoolSnapshot
from arriero.contracts.placements import PlacementExplained
from arriero.domain.placement import Wants
from arriero.fabrics.base import Fabric
from arriero.orchestrator.adding import Adding, Underway
from arriero.orchestrator.courier import Counters, Courier
from arriero.orchestrator.exchange import Exchanges
from arriero.orchestrator.explaining import explain
from arriero.orchestrator.feed import Feed
from arriero.orchestrator.machines.machines import Machines
from arriero.orchestrator.membership import Membership
from arriero.orchestrator.nodes import Node, NodeRegistry
from arriero.orchestrator.provisioning import ModelProvisioner
from arriero.orchestrator.proxy import Proxy
from arriero.orchestrator.relay import Relay
from arriero.orchestrator.room import RoomFinder
from arriero.orchestrator.scheduler import Scheduler
from arriero.orchestrator.store.nodes import NodeStore
from arriero.orchestrator.store.tasks import TaskStore
from arriero.orchestrator.task_run import TaskRunner
from arriero.orchestrator.tasks import TaskRegistry
from arriero.orchestrator.upkeep import Upkeep
from arriero.orchestrator.upstream import Upstreams
from arriero.runtime.asgi import BEAT_S
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy
from arriero.runtime.http import Http
from arriero.runtime.settings import Settings


@dataclass(frozen=True, slots=True)
class Orchestrator:
    """The parts, made by `assemble`."""

    settings: Settings
    clock: Clock
    #: Set when the daemon is to end.
    stop: asyncio.Event
    feed: Feed
    registry: NodeRegistry
    membership: Membership
    adding: Adding
    upkeep: Upkeep
    underway: Underway
    upstreams: Upstreams
    provisioner: ModelProvisioner
    scheduler: Scheduler
    exchanges: Exchanges
    counters: Counters
    relay: Relay
    proxy: Proxy
    tasks: TaskRegistry

    @property
    def is_working(self) -> bool:
        """Whether any request, task, start of a worker or work on a machine is under way."""
        return bool(
            len(self.exchanges) or len(self.tasks) or self.provisioner.jobs_running or len(self.underway)
        )

    def snapshot(self) -> PoolSnapshot:
        """Return what the live feed begins with."""
        registry = self.registry
        return PoolSnapshot(
            nodes=[node.record() for node in registry.nodes()],
            workers=[registry.public(record) for record in registry.workers],
            downloads=[download for _, download in registry.downloads()],
            tasks=self.tasks.open_records(),
        )

    def explain(self, wants: Wants) -> PlacementExplained:
        """Return where a request would go now, and why nowhere else."""
        running = self.provisioner.running(wants)
        return explain(self.registry.views, self.provisioner.room, wants, running)

    def node_for_download(self, wants: Wants) -> Node:
        """Return the node that a model is to be fetched to.  Raises why there is none."""
        if wants.node is not None:
            return self.registry.reachable(wants.node)
        choice = self.provisioner.room.choose_disk(wants)
        if choice.code is not None:
            fail(choice.code, choice.message)
        return self.registry.reachable(choice.node or "")

    def node_of_download(self, download_id: str) -> Node:
        """Return the node that fetches, or fetched, a download.  Raises NOT_FOUND."""
        for node, download in self.registry.downloads():
            if download.download_id == download_id:
                return node
        fail(ErrorCode.NOT_FOUND, f"no download {download_id!r}", download_id=download_id)


def assemble(
    settings: Settings,
    *,
    http: Http,
    store: TaskStore,
    node_store: NodeStore,
    fabric: Fabric,
    machines: Machines,
    group: asyncio.TaskGroup,
    stop: asyncio.Event,
    clock: Clock,
    entropy: Entropy,
) -> Orchestrator:
    """Return an orchestrator whose parts know each other; nothing runs yet."""
    feed = Feed()
    registry = NodeRegistry(clock, feed, wake_cost_s=settings.wake_cost_s)
    membership = Membership(
        registry, node_store, fabric, http, group, clock, entropy,
        node_timeout_s=settings.node_timeout_s, connect_timeout_s=settings.connect_timeout_s,
        machines=machines, stop=stop,
    )  # fmt: skip
    upstreams = Upstreams(clock, entropy, connect_timeout_s=settings.connect_timeout_s)
    courier = Courier(upstreams)
    provisioner = ModelProvisioner(registry, RoomFinder(registry, clock, settings), group, clock)
    scheduler = Scheduler(
        registry, provisioner, clock, beat_s=BEAT_S,
        join_s=settings.node_timeout_s, connect_s=settings.connect_timeout_s,
    )  # fmt: skip
    exchanges = Exchanges(clock)
    counters = Counters()
    stall_s = settings.stream_stall_s
    runner = TaskRunner(registry, scheduler, courier, counters, clock, stall_s=stall_s)
    underway = Underway()
    return Orchestrator(
        settings=settings,
        clock=clock,
        stop=stop,
        feed=feed,
        registry=registry,
        membership=membership,
        adding=Adding(registry, membership, node_store, machines, fabric, http, group, clock, underway),
        upkeep=Upkeep(registry, membership, node_store, machines, scheduler, fabric, http, clock, underway),
        underway=underway,
        upstreams=upstreams,
        provisioner=provisioner,
        scheduler=scheduler,
        exchanges=exchanges,
        counters=counters,
        relay=Relay(scheduler, courier, exchanges, counters, clock, stall_s=stall_s),
        proxy=Proxy(courier, exchanges, counters, stall_s=stall_s),
        tasks=TaskRegistry(
            store, runner, exchanges, feed, group, clock, entropy, default_model=settings.default_model
        ),
    )
