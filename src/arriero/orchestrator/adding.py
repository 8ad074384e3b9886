"""How does a machine join the pool, step by step?  (`arriero nodes add`)

Checked first, then installed, then started, then registered: whatever fails leaves either a working
node or no trace, and says which.
"""

import asyncio
import contextlib
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode, fail, from_body
from arriero.contracts.events import JOINED, NodeDone, NodeStep
from arriero.contracts.records import Capabilities
from arriero.contracts.requests import NodeAddBody
from arriero.contracts.states import NodeState
from arriero.contracts.version import __version__
from arriero.fabrics.base import INSTALL_PATH, Connection, Fabric, NodeAddress
from arriero.orchestrator.fitting import fit_engine
from arriero.orchestrator.machines.environment import Installation
from arriero.orchestrator.machines.machines import Machines
from arriero.orchestrator.machines.survey import Survey, Tell
from arriero.orchestrator.membership import Membership
from arriero.orchestrator.nodes import Node, NodeRegistry, shared_memory
from arriero.orchestrator.reach import (
    ask_capabilities,
    connected,
    connected_again,
    first_words,
    is_anothers,
    read_run_record,
)
from arriero.orchestrator.store.nodes import NodeEntry, NodeStore
from arriero.runtime import logs
from arriero.runtime.clock import Clock
from arriero.runtime.http import Http
from arriero.runtime.tasks import Changed

#: A machine that was installed and started just now answers within this, or is taken back.
READY_TIMEOUT_S: Final = 30.0
#: So long, at most, is spent on taking back what failed.
ROLLBACK_TIMEOUT_S: Final = 60.0
#: Whether ports of a machine can be spoken to does not depend on which.
ANY_PORT: Final = 9


@dataclass(slots=True)
class Begun:
    """What a machine was like before, and what has been done to it since."""

    survey: Survey
    #: What the agent that ran there told of itself; None if none answered.
    agent: Capabilities | None
    #: None until it has come to its end.
    installation: Installation | None = None

    def has_older_agent(self) -> bool:
        """Return whether what runs there, if anything does, is not what has been installed now."""
        found, installed = self.survey, self.installation
        assert installed is not None, "it has come to its end"
        is_exchanged = found.current is not None and found.current != installed.tag
        return is_exchanged or (self.agent is not None and self.agent.version != installed.version)

    def half_installed(self) -> Installation:
        """Return what a connection that broke in the middle may have left."""
        found = self.survey
        return Installation(
            "", __version__, found.install_path, found.python, None, is_new=found.current is None
        )


class Underway:
    """Which nodes and machines are being added, upgraded or removed now: one thing at a time for each."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._changed = Changed()

    def __len__(self) -> int:
        return len(self._names)

    @contextlib.asynccontextmanager
    async def only(
        self, name: str, what: str, tell: Tell, *, patience_s: float = ROLLBACK_TIMEOUT_S
    ) -> AsyncIterator[None]:
        """Hold a node for one piece of work, once the one before has ended.

        Raises INVALID_REQUEST if that takes too long: what was interrupted is being taken back, at most.
        """
        if name in self._names:
            message = f"{name} is being {self._names[name]}: waits for the end of that"
            tell(NodeStep(step="wait", message=message))
        try:
            async with asyncio.timeout(patience_s):
                while name in self._names:
                    await self._changed.wait()
        except TimeoutError as error:
            raise ArrieroError(
                ErrorCode.INVALID_REQUEST,
                f"{name} is being {self._names.get(name, 'changed')} already, for more than "
                f"{patience_s:g} s by now",
                node=name,
                suggested_action="give the same command again once that has ended",
            ) from error
        self._names[name] = what
        try:
            yield
        finally:
            del self._names[name]
            self._changed.notify()


class Adding:
    """Adds machines."""

    def __init__(
        self,
        registry: NodeRegistry,
        membership: Membership,
        store: NodeStore,
        machines: Machines,
        fabric: Fabric,
        http: Http,
        group: asyncio.TaskGroup,
        clock: Clock,
        underway: Underway,
    ) -> None:
        self._registry = registry
        self._membership = membership
        self._store = store
        self._machines = machines
        self._fabric = fabric
        self._http = http
        self._group = group
        self._clock = clock
        self._underway = underway
        self._log = logs.get("arriero.nodes")

    def check(self, body: NodeAddBody) -> NodeEntry:
        """Return the entry that is to be.  Raises INVALID_REQUEST, NODE_ALREADY_EXISTS."""
        path = INSTALL_PATH if body.install_path is None else body.install_path
        address = NodeAddress.parse(
            body.ssh, key_path=body.key_path, host_key=body.accept_host_key, install_path=path
        )
        known = self._registry.find(body.name)
        if known is not None:
            at = f" ({known.entry.ssh})" if known.entry.is_remote else " (this machine)"
            fail(
                ErrorCode.NODE_ALREADY_EXISTS,
                f"a node is called {body.name!r} already{at}",
                node=body.name,
                suggested_action=f"choose another name, or `arriero nodes remove {body.name}` first"
                if known.entry.is_remote
                else "choose another name; this machine's own is the setting node_name",
            )
        for node in self._registry.nodes():
            entry = node.entry
            same = entry.is_remote and (entry.ssh, entry.install_path) == (str(address), path)
            if same:
                fail(
                    ErrorCode.NODE_ALREADY_EXISTS,
                    f"{address} is in the pool already, as {node.name}",
                    node=node.name,
                )
        return NodeEntry(
            name=body.name,
            ssh=str(address),
            key_path=body.key_path or "",
            host_key=body.accept_host_key or "",
            install_path=path,
            labels=dict(body.labels),
            mac=(body.mac or "").lower().replace("-", ":"),
            added_unix=self._clock.wall_s(),
        )

    async def add(self, body: NodeAddBody, tell: Tell) -> NodeDone:
        """Have a machine join; each step is told.

        Raises what keeps it from that: SSH_KEY_UNUSABLE, SSH_HOST_KEY_UNKNOWN, SSH_AUTH_FAILED,
        NODE_UNREACHABLE, PYTHON_TOO_OLD, INSUFFICIENT_DISK, INSTALL_FAILED…
        """
        entry = self.check(body)
        machine = f"{entry.ssh}:{entry.install_path}"
        async with (
            self._underway.only(entry.name, "added", tell),
            self._underway.only(machine, "added", tell),
        ):
            # What was begun under this name meanwhile may have come to its end.
            self.check(body)
            async with connected(self._fabric, entry, tell) as connection:
                survey = await self._machines.survey(connection, entry.install_path, tell)
                # Before anything is put there.
                await connection.check_port(ANY_PORT)
                begun = Begun(survey, await self._answers_already(entry, connection))
                async with self._taken_back(entry, begun, tell):
                    begun.installation = await self._machines.install(
                        connection, survey, tell, carry=body.carry
                    )
                    if begun.has_older_agent():
                        await self._machines.stop(connection, survey.install_path, tell)
                    await self._machines.start(connection, survey.install_path, entry.name, tell)
                    node = await self._joined(entry, connection, tell)
                # From here on nothing is taken back.
                tell(NodeStep(step=JOINED, message=f"{entry.name} has joined", actor=entry.name))
                await fit_engine(node, tell)
        return NodeDone(message=f"{entry.name} is part of the pool", node=node.record())

    async def _answers_already(self, entry: NodeEntry, connection: Connection) -> Capabilities | None:
        """Return what the agent there tells of itself; None if none answers.

        Raises LEASE_SUPERSEDED if another orchestrator holds it, NODE_ALREADY_EXISTS if we do, for a node
        that is reached by another address: two of our links would take it from each other for ever.
        """
        try:
            there = await ask_capabilities(entry, connection, self._http, self._store)
            record = await read_run_record(entry, connection)
        except ArrieroError as error:
            if is_anothers(error, self._store):
                error.details["suggested_action"] = (
                    "remove it there first, or give another --install-path here: then each has an agent"
                )
                raise
            return None
        for node in self._registry.nodes():
            is_held_there = node.agent is not None and node.agent.token == record.token
            # A node that was not reached since our own start is known by the name that its agent bears.
            if is_held_there or (node.agent is None and node.entry.is_remote and node.name == there.name):
                fail(
                    ErrorCode.NODE_ALREADY_EXISTS,
                    f"{entry.ssh} with its {entry.install_path} is in the pool already, as {node.name}",
                    node=node.name,
                    suggested_action=f"`arriero nodes update {node.name} --ssh {shlex.quote(entry.ssh)}` "
                    "has it reached by this address",
                )
        return there

    @contextlib.asynccontextmanager
    async def _taken_back(self, entry: NodeEntry, begun: Begun, tell: Tell) -> AsyncIterator[None]:
        """Leave a machine as it was before, if what is done within fails or is interrupted."""
        try:
            yield
        except BaseException as error:
            is_lost = isinstance(error, ArrieroError) and error.code is ErrorCode.NODE_UNREACHABLE
            if begun.installation is None and not is_lost:
                # An installation that failed has taken itself back.
                raise
            # In a task of its own: whoever asked may be gone already.
            task = self._group.create_task(self._take_back(entry, begun, tell), name="take-back")
            left = await asyncio.shield(task)
            if isinstance(error, ArrieroError):
                error.details["left"] = left
                # No node is called so by now: what there is to look at is the machine.
                error.details.setdefault(
                    "suggested_action", "give the same command again once that is mended"
                )
            raise

    async def _take_back(self, entry: NodeEntry, begun: Begun, tell: Tell) -> str:
        name = entry.name
        tell(NodeStep(step="rollback", message=f"takes back what was begun on {name}"))
        try:
            async with asyncio.timeout(ROLLBACK_TIMEOUT_S):
                if self._registry.find(name) is not None:
                    await self._membership.forget(name)
                # A connection of its own: the other one may be what failed.
                async with connected_again(self._fabric, entry, self._clock) as connection:
                    await self._undo(begun, connection, tell)
        except (ArrieroError, TimeoutError) as error:
            why = error.message if isinstance(error, ArrieroError) else "it took too long"
            self._log.error("not taken back", node=name, why=why)
            left = f"something may be left in {entry.install_path} there ({why}): the same command goes on"
        else:
            left = "nothing new is left there"
        tell(NodeStep(step="rollback", message=left))
        return left

    async def _undo(self, begun: Begun, connection: Connection, tell: Tell) -> None:
        installed = begun.installation or begun.half_installed()
        if installed.is_new or installed.previous is not None:
            await self._machines.roll_back(connection, installed, tell)
        elif begun.agent is None:
            await self._machines.remove(connection, installed.install_path, tell, purge=False)
        if begun.agent is not None:
            # Its own name: whoever knew it does not know ours.
            await self._machines.start(connection, installed.install_path, begun.agent.name, tell)

    async def _joined(self, entry: NodeEntry, connection: Connection, tell: Tell) -> Node:
        """Register a machine whose agent runs, and wait until it is held."""
        # Asked over this connection, so that nothing is registered that does not answer.
        capabilities = await first_words(entry, connection, self._http, self._store, self._clock)
        tell(
            NodeStep(
                step="health",
                message=f"arriero {capabilities.version} answers: "
                f"{', '.join(device.name for device in capabilities.devices)}",
                actor=entry.name,
            )
        )
        if same := self._registry.on_machine(capabilities.machine_id):
            message = shared_memory([node.name for node in same])
            tell(NodeStep(step="health", message=message, actor=entry.name))
        if self._registry.find(entry.name) is not None:
            fail(ErrorCode.NODE_ALREADY_EXISTS, f"a node is called {entry.name!r} by now", node=entry.name)
        node = await self._membership.register(msgspec.structs.replace(entry, capabilities=capabilities))
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while node.state is NodeState.JOINING or node.state is NodeState.UNREACHABLE:
                    if node.error is not None and node.error.code == ErrorCode.VERSION_MISMATCH:
                        # Waiting does not mend it, nor what is advised for a node: it is taken back.
                        unfit = from_body(node.error)
                        unfit.details.pop("suggested_action", None)
                        raise unfit
                    await self._registry.changed.wait()
        except TimeoutError as error:
            why = node.error.message if node.error is not None else "its agent does not tell of itself"
            raise ArrieroError(ErrorCode.NODE_UNREACHABLE, f"{entry.name} did not join: {why}") from error
        return node
