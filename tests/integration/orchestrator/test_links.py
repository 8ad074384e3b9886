"""What fails on the way to one node is that node's, and nobody else's."""

import asyncio
from pathlib import Path
from typing import Any, NoReturn

import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.events import AgentSnapshot, WorkerChanged
from arriero.contracts.fence import FENCE_NUMBER_MAX
from arriero.contracts.records import Capabilities, RunRecord, WorkerRecord
from arriero.contracts.states import NodeState, WorkerState
from arriero.fabrics.base import Connection, NodeAddress, OnHeard, OnRetry
from arriero.fabrics.local import LocalConnection
from arriero.orchestrator.cascade import Leaving, leave
from arriero.orchestrator.feed import Feed
from arriero.orchestrator.links import LASTING_RETRY_S, NodeLink
from arriero.orchestrator.nodes import Node, NodeRegistry
from arriero.orchestrator.reach import ATTEMPT_EVERY_S, HEARD_S, Line, LocalReach, SshReach, reached_again
from arriero.orchestrator.store import open_database
from arriero.orchestrator.store.nodes import LEAP_MAX, NodeEntry, NodeStore
from arriero.runtime.attention import Attention
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SystemEntropy
from arriero.runtime.http import Http
from arriero.runtime.tasks import Changed
from arriero.testing.agents import AgentProcess

WAIT_S = 60.0


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


def registered(registry: NodeRegistry, name: str, machine_id: str = "") -> Node:
    has = Capabilities(
        name=name, version="0.1.0", api_version=1, backends=["cpu"], devices=[], engines={},
        ram_mb=8000, ram_free_mb=4000, disk_free_mb=9000, cpu_cores=2, os="linux", arch="x86_64",
        machine_id=machine_id,
    )  # fmt: skip
    return registry.add(NodeEntry(name=name, ssh="u@h", install_path="arr", capabilities=has))


class Nobody:
    """A membership of which nobody is let go."""

    async def let_go(self, name: str) -> None:
        """Never be asked."""
        raise AssertionError(name)


class GoneConnection(LocalConnection):
    """One that is lost at once."""

    async def closed(self) -> str:
        """Tell it."""
        return "cut"


class GoneReach(BrokenReach):
    """A way to a node that breaks as soon as it is there."""

    def __init__(self, gone: Line) -> None:
        self._gone = gone

    async def line(self) -> Line:  # type: ignore[override]
        """Return what is gone."""
        return self._gone

    async def agent(self, line: Line) -> RunRecord:
        """Know that nobody can be asked."""
        fail(ErrorCode.NODE_UNREACHABLE, "the connection is gone")


def held(registry: NodeRegistry, name: str, http: Http, machine_id: str = "") -> tuple[Node, Line]:
    """Return a node that was held until now, and its line, over which nothing leads to it any more."""
    node = registered(registry, name, machine_id)
    line = Line(GoneConnection(SystemEntropy(), Path()), http, holder_id="o-1", lease=1)
    snapshot = AgentSnapshot(capabilities=node.capabilities, workers=[], downloads=[], worker_tokens={})
    agent = RunRecord(pid=1, url="http://127.0.0.1:9", version="0.1.0", started=0.0)
    registry.joined(snapshot, line, agent, name=name)
    assert node.state is NodeState.READY
    return node, line


async def test_a_node_whose_connection_is_gone_is_no_choice_from_then_on() -> None:
    clock = SystemClock()
    registry = NodeRegistry(clock, Feed())
    async with Http() as http, asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        node, line = held(registry, "far", http)
        link = NodeLink(
            registry,
            GoneReach(line),
            clock,
            SystemEntropy(),
            attention=Attention(),
            node_timeout_s=60,
            connect_timeout_s=60,
            name="far",
        )
        task = group.create_task(link.run())
        while node.state is not NodeState.UNREACHABLE:
            await registry.changed.wait()
        task.cancel()


class SlowReach(BrokenReach):
    """A way to a node that is being looked for until somebody gives up."""

    async def line(self) -> NoReturn:
        """Never return."""
        await asyncio.Event().wait()
        raise AssertionError


class RefusedReach(BrokenReach):
    """A way to a node where nobody listens."""

    async def line(self) -> NoReturn:
        """Be refused."""
        fail(ErrorCode.NODE_UNREACHABLE, "refused")


@pytest.mark.parametrize("connect_timeout_s", [0.05, 60.0])
async def test_a_machine_is_missed_the_first_time_when_connecting_to_it_took_too_long(
    connect_timeout_s: float,
) -> None:
    clock = SystemClock()
    registry = NodeRegistry(clock, Feed())
    nodes = {name: registered(registry, name) for name in ("slow", "refused")}
    assert {node.state for node in nodes.values()} == {NodeState.JOINING}
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        tasks = []
        # Were the slow one missed as others are, it would be long before the one that refuses.
        for name, reach, node_timeout_s in (("slow", SlowReach(), 0.05), ("refused", RefusedReach(), 0.5)):
            link = NodeLink(
                registry, reach, clock, SystemEntropy(), attention=Attention(), node_timeout_s=node_timeout_s,
                connect_timeout_s=connect_timeout_s, name=name,
            )  # fmt: skip
            tasks.append(group.create_task(link.run()))
        while nodes["refused"].state is not NodeState.UNREACHABLE:
            await registry.changed.wait()
        if connect_timeout_s < 1:
            while nodes["slow"].state is not NodeState.UNREACHABLE:
                await registry.changed.wait()
        else:
            assert nodes["slow"].state is NodeState.JOINING
        for task in tasks:
            task.cancel()


async def test_nodes_of_one_machine_share_what_is_promised_of_its_memory() -> None:
    registry = NodeRegistry(SystemClock(), Feed())
    views = registry.views
    names = ("one", "two", "elsewhere")

    def promised_mb() -> list[int]:
        found = [views.node(name) for name in names]
        return [view.promised_mb.get("cpu", 0) for view in found if view is not None]

    def beat(name: str, promised: int) -> None:
        views.beat(
            name,
            ram_free_mb=4000,
            disk_free_mb=9000,
            devices=[],
            promised_mb={"cpu": promised} if promised else {},
        )

    starting = worker_of("one", WorkerState.STARTING)
    async with Http() as http:
        (one, _), (two, _), _ = (
            held(registry, name, http, machine_id) for name, machine_id in zip(names, "aab", strict=True)
        )
        assert (one.record().same_machine_as, two.record().same_machine_as) == (["two"], ["one"])
        assert registry.node("elsewhere").record().same_machine_as == []
        assert "the same machine as one" in two.record().advice[0]
        # Given away by us, then told by its agent: counted on both, once.
        movement = views.reserve("one", "cpu", 3000)
        assert promised_mb() == [3000, 3000, 0]
        views.made(movement, starting.worker_id)
        registry.observe(starting)
        registry.heard(one, WorkerChanged(worker=starting, worker_token="t"))
        beat("one", 2500)
        assert promised_mb() == [2500, 2500, 0]
        views.reserve("two", "cpu", 100)
        assert promised_mb() == [2600, 2600, 0]
        # What does not answer promises nothing any more, and who has gone shares nothing.
        registry.unreachable(one, ArrieroError(ErrorCode.NODE_UNREACHABLE, "cut"))
        beat("two", 0)
        assert promised_mb() == [2600, 100, 0]
        registry.removed("one")
        assert two.record().same_machine_as == [] and two.record().advice == []


@pytest.mark.parametrize("cascades", [False, True])
async def test_an_orchestrator_leaves_also_when_a_line_has_gone_that_moment(cascades: bool) -> None:
    clock = SystemClock()
    registry = NodeRegistry(clock, Feed())
    membership: Any = Nobody()
    async with Http() as http, asyncio.timeout(WAIT_S):
        held(registry, "far", http)
        await leave(Leaving(cascades=cascades), registry, membership, grace_s=1, clock=clock)


async def test_a_defect_on_the_way_to_one_node_ends_nothing_else() -> None:
    clock = SystemClock()
    registry = NodeRegistry(clock, Feed())
    node = registered(registry, "far")
    reach = BrokenReach()
    link = NodeLink(
        registry,
        reach,
        clock,
        SystemEntropy(),
        attention=Attention(),
        node_timeout_s=60,
        connect_timeout_s=60,
        name="far",
    )
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        task = group.create_task(link.run())
        while node.state is not NodeState.UNREACHABLE:
            await registry.changed.wait()
        assert node.error is not None and node.error.code == ErrorCode.INTERNAL_ERROR
        assert reach.drops, "the next line is a new one"
        task.cancel()


class TakenReach(BrokenReach):
    """A way to a machine that says that another holds it, and what it likes about the number."""

    def __init__(self, number: object) -> None:
        self._number = number
        self.above = -1

    async def line(self) -> NoReturn:
        """Tell."""
        raise ArrieroError(ErrorCode.LEASE_SUPERSEDED, number=self._number)

    async def drop(self, above: int = 0) -> None:
        """Take note of the number."""
        self.above = max(self.above, above)


@pytest.mark.parametrize("number", ["many", None, [7], -1, 2**63])
async def test_a_refusal_may_tell_whatever_it_likes(number: object) -> None:
    clock = SystemClock()
    registry = NodeRegistry(clock, Feed())
    node, reach = registered(registry, "far"), TakenReach(number)
    link = NodeLink(
        registry,
        reach,
        clock,
        SystemEntropy(),
        attention=Attention(),
        node_timeout_s=60,
        connect_timeout_s=60,
        name="far",
    )
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        task = group.create_task(link.run())
        while node.state is not NodeState.UNREACHABLE:
            await registry.changed.wait()
        assert node.error is not None and node.error.code == ErrorCode.LEASE_SUPERSEDED
        assert reach.above == 0
        task.cancel()


class Hasty(SystemClock):
    """What lasts is tried again in a moment."""

    def __init__(self) -> None:
        self.retries = 0
        self.retried = Changed()

    async def sleep_s(self, seconds: float) -> None:
        """Sleep, but not for that long."""
        if seconds == LASTING_RETRY_S:
            self.retries += 1
            self.retried.notify()
            seconds /= 100
        await super().sleep_s(seconds)


class Copied:
    """The numbers of an orchestrator whose database was copied: they begin where the other one's do."""

    holder_id = "a" * 16

    def __init__(self, first: int) -> None:
        self.number = first

    async def next_lease(self, above: int = 0) -> int:
        """Return the next one."""
        self.number = max(self.number, above) + 1
        return self.number


@pytest.mark.parametrize("first", [3, 30])
async def test_two_with_the_same_id_do_not_take_a_node_from_each_other_for_ever(
    tmp_path: Path, first: int
) -> None:
    clock = Hasty()
    with AgentProcess(tmp_path / "home") as running:
        async with Http() as http, asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[None]] = []
            registries = [NodeRegistry(clock, Feed()) for _ in range(2)]
            for registry, number in zip(registries, (10, first), strict=True):
                reach = LocalReach(
                    running.state, http, Copied(number), LocalConnection(SystemEntropy(), tmp_path)
                )
                link = NodeLink(
                    registry,
                    reach,
                    clock,
                    SystemEntropy(),
                    attention=Attention(),
                    node_timeout_s=60,
                    connect_timeout_s=60,
                )
                tasks.append(group.create_task(link.run()))
                while not registry.is_ready():
                    await registry.changed.wait()
            (older,), (newer,) = (registry.nodes() for registry in registries)
            assert newer.line is not None
            lease = newer.line.lease
            while clock.retries < 5:
                await clock.retried.wait()
            assert [older.state, newer.state] == [NodeState.UNREACHABLE, NodeState.READY]
            assert older.error is not None and older.error.code == ErrorCode.LEASE_SUPERSEDED
            assert newer.line.lease == lease
            # It ends: the older one has the node again.
            tasks[1].cancel()
            while older.state is not NodeState.READY:
                await registries[0].changed.wait()
            tasks[0].cancel()


async def test_one_machine_does_not_use_up_the_numbers_of_all(tmp_path: Path) -> None:
    database = await open_database(tmp_path / "orchestrator.db")
    try:
        store = await NodeStore.open(database, SystemEntropy())
        first = await store.next_lease()
        with pytest.raises(ArrieroError) as refused:
            await store.next_lease(FENCE_NUMBER_MAX - 1)
        assert refused.value.code is ErrorCode.LEASE_SUPERSEDED
        assert await store.next_lease() == first + 1
        assert await store.next_lease(first + LEAP_MAX) == first + LEAP_MAX + 1
    finally:
        await database.close()


def worker_of(node: str, state: WorkerState, port: int = 8001) -> WorkerRecord:
    return WorkerRecord(
        worker_id="w-000000000001", node=node, url=f"http://127.0.0.1:{port}", model_ref="demo",
        backend="cpu", device="cpu", state=state, slots_total=1, slots_available=1, pid=1, started_unix=1.0,
        last_activity_unix=1.0,
    )  # fmt: skip


async def test_a_machine_has_no_say_about_the_workers_of_another() -> None:
    registry = NodeRegistry(SystemClock(), Feed())
    async with Http() as http:
        (near, _), (far, line) = held(registry, "near", http), held(registry, "far", http)
        registry.heard(near, WorkerChanged(worker=worker_of("near", WorkerState.IDLE), worker_token="t"))
        for state in (WorkerState.IDLE, WorkerState.FAILED):
            theirs = worker_of("near", state, 9)
            registry.heard(far, WorkerChanged(worker=theirs, worker_token="u"))
            assert far.agent is not None
            snapshot = AgentSnapshot(
                capabilities=far.capabilities, workers=[theirs], downloads=[], worker_tokens={}
            )
            registry.joined(snapshot, line, far.agent, name="far")
            assert list(registry.workers) == [worker_of("near", WorkerState.IDLE)]


async def test_a_machine_does_not_take_the_sockets_of_all(tmp_path: Path) -> None:
    async with Http() as http:
        line = Line(LocalConnection(SystemEntropy(), tmp_path), http, holder_id="o-1", lease=1)
        with pytest.raises(ArrieroError) as refused:
            for port in range(1, 65_536):
                await line.open(f"http://127.0.0.1:{port}")
        assert refused.value.code is ErrorCode.VERSION_MISMATCH
        await line.aclose()


class Kept(LocalConnection):
    """One that tells whether it was closed."""

    is_closed = False

    async def aclose(self) -> None:
        """Take note."""
        self.is_closed = True


class Slow:
    """Connects at once; a number for the lease takes for ever."""

    holder_id = "o-1"

    def __init__(self) -> None:
        self.connection = Kept(SystemEntropy(), Path())
        self.asked = asyncio.Event()

    async def connect(
        self, address: NodeAddress, on_retry: OnRetry | None = None, on_heard: OnHeard | None = None
    ) -> Connection:
        """Return the one connection."""
        return self.connection

    async def next_lease(self, above: int = 0) -> int:
        """Never return."""
        self.asked.set()
        await asyncio.Event().wait()
        return 1


class Restarting:
    """Machines whose sshd starts anew: the first attempts find nobody."""

    def __init__(self, code: ErrorCode, attempts: int) -> None:
        self._code = code
        self.left = attempts

    async def connect(
        self, address: NodeAddress, on_retry: OnRetry | None = None, on_heard: OnHeard | None = None
    ) -> Connection:
        """Fail so often."""
        if self.left:
            self.left -= 1
            fail(self._code)
        return Kept(SystemEntropy(), Path())


class Timeless(SystemClock):
    """One whose waits pass at once, and are counted."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def monotonic_s(self) -> float:
        """Return how long was waited."""
        return self._now_s

    async def sleep_s(self, seconds: float) -> None:
        """Wait no time."""
        self._now_s += seconds
        await asyncio.sleep(0)


async def test_what_is_to_be_taken_back_waits_for_a_machine_that_is_gone_for_a_moment() -> None:
    address = NodeAddress("far")
    restarting = Restarting(ErrorCode.NODE_UNREACHABLE, 5)
    await reached_again(restarting, address, Timeless(), patience_s=20)
    assert not restarting.left
    for code, is_tried_again in ((ErrorCode.NODE_UNREACHABLE, True), (ErrorCode.SSH_AUTH_FAILED, False)):
        gone = Restarting(code, 1000)
        with pytest.raises(ArrieroError) as caught:
            await reached_again(gone, address, Timeless(), patience_s=20)
        assert caught.value.code is code and (gone.left < 999) == is_tried_again


async def test_a_connection_that_nobody_waits_for_any_more_is_closed() -> None:
    slow = Slow()
    entry = NodeEntry(name="far", ssh="u@h", install_path="arr")
    async with Http() as http, asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        task = group.create_task(SshReach(entry, slow, http, slow, SystemClock()).line())
        await slow.asked.wait()
        task.cancel()
    assert slow.connection.is_closed


class Answering(Slow):
    """Says something for so many seconds, then nothing; the second one to ask is let in."""

    def __init__(self, clock: SystemClock, talks_s: float) -> None:
        super().__init__()
        self._clock = clock
        self._talks_s = talks_s
        self.asked_s: list[float] = []

    async def connect(
        self, address: NodeAddress, on_retry: OnRetry | None = None, on_heard: OnHeard | None = None
    ) -> Connection:
        """Begin a login."""
        self.asked_s.append(self._clock.monotonic_s())
        if len(self.asked_s) == 1:
            while self._clock.monotonic_s() < self._talks_s:
                assert on_heard is not None
                on_heard()
                await asyncio.sleep(0)
            await asyncio.Event().wait()
        return self.connection

    async def next_lease(self, above: int = 0) -> int:
        """Return a number."""
        return 1


@pytest.mark.parametrize(("talks_s", "next_s"), [(0, ATTEMPT_EVERY_S), (20, 20 + HEARD_S)])
async def test_a_machine_that_answers_is_asked_once_more_only_when_it_falls_silent(
    talks_s: float, next_s: float
) -> None:
    clock = Timeless()
    machine = Answering(clock, talks_s)
    entry = NodeEntry(name="far", ssh="u@h", install_path="arr")
    async with Http() as http, asyncio.timeout(WAIT_S):
        await SshReach(entry, machine, http, machine, clock).line()
    _, second_s = machine.asked_s
    assert next_s <= second_s <= next_s + 2 * ATTEMPT_EVERY_S


async def test_nothing_begins_anew_towards_a_socket_that_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "end"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(answer, path)
    async with Http() as http, server:
        peer = http.peer("http://127.0.0.1:9", socket_path=str(path))
        await peer.call("GET", "/v1/health")
        path.unlink()
        await http.forget(str(path))
        with pytest.raises(ArrieroError) as caught:
            await peer.call("GET", "/v1/health")
        assert caught.value.code is ErrorCode.NODE_UNREACHABLE
        # Else one session would stay for each socket that ever was.
        with pytest.raises(FileNotFoundError):
            http.session(str(path))
