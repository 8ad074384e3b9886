"""By which way are a node's agent and its workers talked to from here?

A `Line` is such a way while it holds: this machine's loopback, or one SSH connection.  A `Reach`
makes lines, and finds the agent at their other end.
"""

import asyncio
import contextlib
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Final, Protocol

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.events import NodeStep
from arriero.contracts.fence import FENCE_HEADER, Fence, number_in, silent_s_in
from arriero.contracts.records import Capabilities, RunRecord
from arriero.fabrics.base import Connection, Fabric, LocalEnd, NodeAddress, SocketPath
from arriero.fabrics.ssh import check_key_file
from arriero.orchestrator.store.nodes import NodeEntry
from arriero.orchestrator.upstream import Address
from arriero.runtime.clock import Clock
from arriero.runtime.http import Http, Peer
from arriero.runtime.state_dir import StateDir

#: At a port is either a node's agent, or a worker with an id.
AGENT: Final = "agent"
RUN_FILE_BYTES_MAX: Final = 65_536
#: While a machine does not answer, a new attempt begins so often beside those that still wait: a
#: packet that was lost is sent again after 1, 3, 7 s, and a link may be mended at any time.
#: No divisor of a second: what is sent again goes between the new ones.
ATTEMPT_EVERY_S: Final = 0.4
ATTEMPTS_AT_ONCE: Final = 10
#: One that gets answers is let alone while they come: another one would be no faster, and a server counts
#: those that hang up before they are logged in, and shuts out who does so often.
HEARD_S: Final = 1.0
#: So long a machine that was there a moment ago is tried: its sshd may be starting anew.
REACHED_AGAIN_S: Final = 20.0
#: So long, at most, is waited for one that held a machine, and is silent, to lose it.
BACK_S: Final = 30.0
#: Each end is a socket of ours: one machine must not take those of all others.
ENDS_MAX: Final = 256


class Line:
    """One way to a node, and which local ends lead to its ports."""

    def __init__(self, connection: Connection, http: Http, *, holder_id: str, lease: int) -> None:
        self.connection = connection
        #: Number of the lease that we hold on the node for as long as this line lasts.
        self.lease = lease
        self.fence = str(Fence(holder_id, lease))
        self._http = http
        self._ends: dict[int, LocalEnd] = {}
        #: Who is at a port.  The news that one is gone may come after its port is another's.
        self._at: defaultdict[int, set[str]] = defaultdict(set)
        self.is_gone = False

    async def open(self, url: str, who: str = AGENT) -> None:
        """Have an end for the port in a daemon's `url`; `who`: a worker's id.

        Raises NODE_UNREACHABLE, STATE_DIR_UNUSABLE; VERSION_MISMATCH beyond `ENDS_MAX`.
        """
        port = Address.of(url, "").port
        self._at[port].add(who)
        if port not in self._ends:
            if len(self._ends) >= ENDS_MAX:
                fail(
                    ErrorCode.VERSION_MISMATCH,
                    f"its agent tells of more than {ENDS_MAX} workers: it is none of ours",
                )
            self._ends[port] = await self.connection.forward(port)

    async def shut(self, url: str, who: str = AGENT) -> None:
        """Close the end of a daemon that is gone, unless another is at its port.  Safe to call twice."""
        port = Address.of(url, "").port
        self._at[port].discard(who)
        if self._at[port]:
            return
        del self._at[port]
        end = self._ends.pop(port, None)
        # The socket first: whoever still has a peer must not begin anew.
        await self.connection.unforward(port)
        if isinstance(end, SocketPath):
            await self._http.forget(str(end.path))

    async def check(self, url: str) -> None:
        """Know that its machine lets a daemon's port be spoken to: what comes back of a refusal is silence.

        Asked when a daemon did not answer, and not before: from far away each question takes long.  Raises
        SSH_COMMAND_FAILED, NODE_UNREACHABLE.
        """
        await self.connection.check_port(Address.of(url, "").port)

    def end(self, url: str) -> LocalEnd | None:
        """Return the end that leads to a daemon; None before `open`."""
        return self._ends.get(Address.of(url, "").port)

    def address(self, url: str, token: str) -> Address:
        """Return where requests to a daemon go.  Raises NODE_UNREACHABLE before `open`."""
        told = Address.of(url, token)
        end = self._ends.get(told.port)
        if end is None:
            fail(ErrorCode.NODE_UNREACHABLE, f"no way leads to port {told.port} yet")
        path = str(end.path) if isinstance(end, SocketPath) else ""
        return Address(told.host, told.port, token, path, self.fence)

    def peer(self, url: str, token: str) -> Peer:
        """Return a caller of a daemon.  Raises NODE_UNREACHABLE before `open`."""
        address = self.address(url, token)
        headers = {FENCE_HEADER: self.fence}
        return self._http.peer(url, token, socket_path=address.socket_path, headers=headers)

    async def aclose(self) -> None:
        """Close the connection, and what still goes through its ends."""
        self.is_gone = True
        ends, self._ends = self._ends, {}
        await self.connection.aclose()
        for end in ends.values():
            if isinstance(end, SocketPath):
                await self._http.forget(str(end.path))


class Leases(Protocol):
    """Who hands out fencing numbers (the orchestrator's store)."""

    holder_id: str

    async def next_lease(self, above: int = 0) -> int:
        """Return a number larger than all before, and than `above`."""
        ...


class Reach(Protocol):
    """How one node is reached, again and again."""

    async def line(self) -> Line:
        """Return the line that holds, a new one where there is none.

        Raises NODE_UNREACHABLE, and what logging in may raise.
        """
        ...

    async def agent(self, line: Line) -> RunRecord:
        """Return how the agent is talked to.  Raises NOT_RUNNING, NODE_UNREACHABLE."""
        ...

    async def drop(self, above: int = 0) -> None:
        """End the line that holds; the next one is a new one.  Safe to call twice.

        `above`: its lease has a number larger than that, under which another held the node.
        """
        ...


class LocalReach:
    """The agent of this machine, found by its run file; a new one takes its place there."""

    def __init__(self, state_dir: StateDir, http: Http, leases: Leases, connection: Connection) -> None:
        self._state_dir = state_dir
        self._http = http
        self._leases = leases
        self._connection = connection
        self._line: Line | None = None
        self._above = 0

    async def line(self) -> Line:
        """Return the one line: this machine does not go away while we live."""
        if self._line is None:
            above, self._above = self._above, 0
            lease = await self._leases.next_lease(above)
            self._line = Line(self._connection, self._http, holder_id=self._leases.holder_id, lease=lease)
        return self._line

    async def agent(self, line: Line) -> RunRecord:
        """Return the run record of an agent whose process lives."""
        record = self._state_dir.running("agent")
        if record is None:
            fail(ErrorCode.NOT_RUNNING, "no agent runs on this machine")
        return record

    async def drop(self, above: int = 0) -> None:
        """Keep the line, of which nothing can be cut, unless it needs a larger number."""
        if above:
            self._above = above
            self._line = None


class SshReach:
    """A machine behind SSH: one connection, and the agent's run file there."""

    def __init__(self, entry: NodeEntry, fabric: Fabric, http: Http, leases: Leases, clock: Clock) -> None:
        self._entry = entry
        self._fabric = fabric
        self._http = http
        self._leases = leases
        self._clock = clock
        self._line: Line | None = None
        self._above = 0
        self._known: RunRecord | None = None
        self._is_known_untried = False

    async def line(self) -> Line:
        """Return the line that holds, else connect: several attempts run while none gets answers."""
        if self._line is None:
            connection = await self._connect()
            try:
                # Once: what it was told may be wrong, and later numbers are larger anyway.
                above, self._above = self._above, 0
                lease = await self._leases.next_lease(above)
            except BaseException:
                await connection.aclose()
                raise
            self._line = Line(connection, self._http, holder_id=self._leases.holder_id, lease=lease)
            self._is_known_untried = True
        return self._line

    async def agent(self, line: Line) -> RunRecord:
        """Return how the agent was talked to before, once a line; then read its run file there.

        A cut ends no agent, and from far away the file takes a second.  Whether its process lives shows
        when it is talked to; the token of one that is gone opens nothing any more.
        """
        if self._known is not None and self._is_known_untried:
            self._is_known_untried = False
            return self._known
        self._known = await read_run_record(self._entry, line.connection)
        return self._known

    async def drop(self, above: int = 0) -> None:
        """Close the connection, and with it every stream that went over it."""
        self._above = max(self._above, above)
        line, self._line = self._line, None
        if line is not None:
            await line.aclose()

    async def _connect(self) -> Connection:
        address = address_of(self._entry)
        found: Connection | None = None
        failed: ArrieroError | None = None
        done = asyncio.Event()
        running = 0
        heard_s = -math.inf

        def heard() -> None:
            nonlocal heard_s
            heard_s = self._clock.monotonic_s()

        async def attempt() -> None:
            nonlocal found, failed, running
            running += 1
            try:
                connection = await self._fabric.connect(address, on_heard=heard)
                if found is None:
                    found = connection
                else:
                    await connection.aclose()
            except ArrieroError as error:
                failed = error
            finally:
                running -= 1
                done.set()

        try:
            async with asyncio.TaskGroup() as group:
                tasks = []
                while found is None and failed is None:
                    is_silent = self._clock.monotonic_s() - heard_s >= HEARD_S
                    if is_silent and running < ATTEMPTS_AT_ONCE:
                        tasks.append(group.create_task(attempt(), name=f"connect-{self._entry.name}"))
                    waiter = group.create_task(done.wait(), name="connected")
                    tick = group.create_task(self._clock.sleep_s(ATTEMPT_EVERY_S), name="next-attempt")
                    await asyncio.wait((waiter, tick), return_when=asyncio.FIRST_COMPLETED)
                    waiter.cancel()
                    tick.cancel()
                for task in tasks:
                    task.cancel()
        except BaseException:
            # Whoever waited is gone in the moment in which it came about.
            if found is not None:
                await found.aclose()
            raise
        if found is None:
            assert failed is not None
            raise failed
        return found


def address_of(entry: NodeEntry) -> NodeAddress:
    """Return the address of a registered machine.  Raises INVALID_REQUEST if it is not well formed."""
    return NodeAddress.parse(
        entry.ssh,
        key_path=entry.key_path or None,
        host_key=entry.host_key or None,
        install_path=entry.install_path,
    )


async def read_run_record(entry: NodeEntry, connection: Connection) -> RunRecord:
    """Return the run record of the agent on a registered machine.  Raises NOT_RUNNING, NODE_UNREACHABLE."""
    path = f"{entry.install_path}/home/run/agent.json"
    try:
        content = await connection.read(path, bytes_max=RUN_FILE_BYTES_MAX)
        return msgspec.json.decode(content, type=RunRecord)
    except msgspec.DecodeError as error:
        raise ArrieroError(ErrorCode.NOT_RUNNING, "the agent's run file is not whole") from error
    except ArrieroError as error:
        if error.code is ErrorCode.NOT_FOUND:
            raise ArrieroError(
                ErrorCode.NOT_RUNNING, f"no agent runs on {entry.name}", node=entry.name
            ) from error
        raise


async def ask_capabilities(
    entry: NodeEntry, connection: Connection, http: Http, leases: Leases
) -> Capabilities:
    """Return what the agent of a machine tells of it, over a connection of its own.

    Raises NOT_RUNNING, NODE_UNREACHABLE, SSH_COMMAND_FAILED; LEASE_SUPERSEDED if another orchestrator holds
    it now.
    """
    record = await read_run_record(entry, connection)
    above = 0
    while True:
        lease = await leases.next_lease(above)
        line = Line(connection, http, holder_id=leases.holder_id, lease=lease)
        await line.open(record.url)
        try:
            peer = line.peer(record.url, record.token)
            return await peer.call("GET", "/v1/capabilities", answer=Capabilities)
        except ArrieroError as error:
            if error.code is ErrorCode.NODE_UNREACHABLE:
                await line.check(record.url)
            number = number_in(error.details)
            if error.code is not ErrorCode.LEASE_SUPERSEDED or number < lease:
                raise
            # Who held it may be gone for good, and numbers rise whoever holds: once more, with a larger one.
            above = number
        finally:
            await line.shut(record.url)


async def first_words(
    entry: NodeEntry, connection: Connection, http: Http, leases: Leases, clock: Clock
) -> Capabilities:
    """Return what an agent tells of itself that was started just now, as `ask_capabilities` does.

    Who held the one before it has some seconds to come back, and it refuses all others meanwhile (ADR 13).
    """
    deadline_s = clock.monotonic_s() + BACK_S
    while True:
        try:
            return await ask_capabilities(entry, connection, http, leases)
        except ArrieroError as error:
            may_be_gone = is_anothers(error, leases) and silent_s_in(error.details) > 0
            if not may_be_gone or clock.monotonic_s() >= deadline_s:
                raise
        await clock.sleep_s(ATTEMPT_EVERY_S)


def is_anothers(error: ArrieroError, leases: Leases) -> bool:
    """Return whether an agent refused us since another orchestrator holds its machine."""
    return error.code is ErrorCode.LEASE_SUPERSEDED and error.details.get("holder") != leases.holder_id


def told_of_node(error: ArrieroError, name: str) -> ArrieroError:
    """Return an error with advice for a registered node: commands that bear its name."""
    error.details.setdefault("node", name)
    option, advice = error.details.pop("option", None), error.details.get("suggested_action")
    if isinstance(option, str) and isinstance(advice, str):
        # Who adds a machine gives the option there; of one that is in the pool it is changed.
        error.details["suggested_action"] = advice.replace(option, f"`arriero nodes update {name} {option}`")
    return error


async def reached_again(
    fabric: Fabric, address: NodeAddress, clock: Clock, *, patience_s: float
) -> Connection:
    """Connect to a machine that was there a moment ago, again and again for `patience_s`.

    Raises what connecting raises.
    """
    deadline_s = clock.monotonic_s() + patience_s
    while True:
        try:
            return await fabric.connect(address)
        except ArrieroError as error:
            if error.code is not ErrorCode.NODE_UNREACHABLE or clock.monotonic_s() >= deadline_s:
                raise
        await clock.sleep_s(ATTEMPT_EVERY_S)


@contextlib.asynccontextmanager
async def connected_again(fabric: Fabric, entry: NodeEntry, clock: Clock) -> AsyncIterator[Connection]:
    """Hold a connection of its own to a machine that was there a moment ago.

    Raises what connecting raises.
    """
    connection = await reached_again(fabric, address_of(entry), clock, patience_s=REACHED_AGAIN_S)
    try:
        yield connection
    finally:
        await connection.aclose()


@contextlib.asynccontextmanager
async def connected(
    fabric: Fabric, entry: NodeEntry, tell: Callable[[NodeStep], None]
) -> AsyncIterator[Connection]:
    """Hold a connection to a machine for a piece of work, telling each step.

    The key's file is checked before anything is sent.  Raises SSH_KEY_UNUSABLE, SSH_HOST_KEY_UNKNOWN,
    SSH_HOST_KEY_CHANGED, SSH_AUTH_FAILED, NODE_UNREACHABLE.
    """
    address = address_of(entry)
    if address.key_path is not None:
        await asyncio.to_thread(check_key_file, address.key_path)
        tell(NodeStep(step="key", message=f"the key {address.key_path} is there and nobody else's to read"))
    tell(NodeStep(step="connect", message=f"connects to {address}"))
    connection = await fabric.connect(
        address, lambda error: tell(NodeStep(step="connect", message=f"{error.message}: tries again"))
    )
    tell(NodeStep(step="login", message=f"{address} let us in; its host key is the one that is known"))
    try:
        yield connection
    finally:
        await connection.aclose()
