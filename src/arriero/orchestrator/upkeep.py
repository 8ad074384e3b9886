"""How is a machine of the pool upgraded, removed, examined?  (`arriero nodes upgrade|remove|doctor|logs`)"""

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode, from_body
from arriero.contracts.events import NodeDone, NodeStep
from arriero.contracts.records import Finding
from arriero.contracts.states import NodeState
from arriero.contracts.version import __version__
from arriero.domain.placement_wants import count
from arriero.fabrics.base import Connection, Fabric
from arriero.orchestrator.adding import READY_TIMEOUT_S, Underway
from arriero.orchestrator.fitting import fit_engine
from arriero.orchestrator.machines.environment import Installation
from arriero.orchestrator.machines.machines import Machines
from arriero.orchestrator.machines.running import LogEnd
from arriero.orchestrator.machines.survey import Survey, Tell
from arriero.orchestrator.membership import Membership
from arriero.orchestrator.nodes import Node, NodeRegistry, shared_memory
from arriero.orchestrator.reach import (
    ask_capabilities,
    connected,
    connected_again,
    first_words,
    is_anothers,
)
from arriero.orchestrator.scheduler import Scheduler
from arriero.orchestrator.store.nodes import NodeEntry, NodeStore
from arriero.runtime.clock import Clock
from arriero.runtime.http import Http

#: Between two looks at what still runs on a node that is being drained.
DRAIN_LOOK_S: Final = 0.2


class Upkeep:
    """What is done to machines that are in the pool."""

    def __init__(
        self,
        registry: NodeRegistry,
        membership: Membership,
        store: NodeStore,
        machines: Machines,
        scheduler: Scheduler,
        fabric: Fabric,
        http: Http,
        clock: Clock,
        underway: Underway,
    ) -> None:
        self._registry = registry
        self._membership = membership
        self._store = store
        self._machines = machines
        self._scheduler = scheduler
        self._fabric = fabric
        self._http = http
        self._clock = clock
        self._underway = underway

    # --- Drain ---------------------------------------------------------------------------

    async def drain(self, name: str, tell: Tell, *, wait_s: float | None) -> NodeDone:
        """Give a node no new work; wait up to `wait_s` for what runs there (None: not at all).

        Raises NODE_NOT_FOUND; REQUEST_TIMEOUT if something still runs then: the node stays drained.
        """
        node = await self._membership.wish_drained(name, is_drained=True)
        tell(NodeStep(step="drain", message=f"{name} takes no new work"))
        if wait_s is not None:
            await self._drained(node, tell, wait_s)
        return NodeDone(message=f"{name} is drained", node=node.record())

    async def _drained(self, node: Node, tell: Tell, wait_s: float) -> None:
        deadline_s = self._clock.monotonic_s() + wait_s
        told = -1
        while running := self._scheduler.requests_on(node.name):
            if running != told:
                told = running
                message = f"waits for {count(running, 'request')} there"
                tell(NodeStep(step="drain", message=message, actor=node.name))
            if self._clock.monotonic_s() >= deadline_s:
                raise ArrieroError(
                    ErrorCode.REQUEST_TIMEOUT,
                    f"{node.name} still has {count(running, 'request')} after {wait_s:g} s",
                    node=node.name,
                    running=running,
                )
            await self._clock.sleep_s(DRAIN_LOOK_S)

    # --- Upgrade -------------------------------------------------------------------------

    async def upgrade(self, name: str, tell: Tell, *, carry: bool, wait_s: float) -> NodeDone:
        """Bring a machine to our version: install beside, drain, restart, check; go back if that fails.

        A machine that has our version already is left alone.  Raises NODE_NOT_FOUND, LEASE_SUPERSEDED if
        another orchestrator holds it, what connecting and installing raise, and VERSION_MISMATCH or
        NODE_UNREACHABLE if the new one does not answer or does not join: the details tell what is left there,
        the old one where there was one.
        """
        self._membership.remote(name)
        async with self._underway.only(name, "upgraded", tell):
            # It may have been removed meanwhile, or got another address.
            entry = self._membership.remote(name)
            async with connected(self._fabric, entry, tell) as connection:
                # Before anything is put there.
                version = await self._version(entry, connection)
                survey = await self._machines.survey(connection, entry.install_path, tell)
                installed = await self._machines.install(connection, survey, tell, carry=carry)
                if installed.tag == survey.current and version == __version__:
                    message = f"{name} is arriero {__version__} already"
                    return NodeDone(message=message, node=self._registry.node(name).record())
                if installed.previous is None:
                    before = _ran_from(survey, version, installed.tag)
                    installed = dataclasses.replace(installed, previous=before)
                # No worker may begin between two versions.
                with self._registry.paused(name) as node:
                    tell(NodeStep(step="drain", message=f"{name} takes no new work"))
                    with contextlib.suppress(ArrieroError):
                        await self._drained(node, tell, wait_s)
                    await self._replace(node, entry, connection, installed, tell)
            # A build that was there may have been for the engine's version before.  One that has to be
            # fetched takes long: meanwhile the machine works with what it has.
            await fit_engine(node, tell)
        return NodeDone(message=f"{name} is arriero {__version__} now", node=node.record())

    async def _version(self, entry: NodeEntry, connection: Connection) -> str | None:
        """Return which version answers there; None if none does.

        Raises LEASE_SUPERSEDED if another orchestrator holds it: then it is not ours to change.
        """
        try:
            return (await ask_capabilities(entry, connection, self._http, self._store)).version
        except ArrieroError as error:
            if is_anothers(error, self._store):
                error.details["suggested_action"] = (
                    f"`arriero nodes remove {entry.name} --force` forgets it here, and leaves it to that one"
                )
                raise
            return None

    async def _replace(
        self, node: Node, entry: NodeEntry, connection: Connection, installed: Installation, tell: Tell
    ) -> None:
        """Have the agent of the new version instead of the old one: it answers, and it joins."""
        try:
            async with self._membership.without_link(entry.name, "upgraded"):
                await self._machines.stop(connection, entry.install_path, tell)
                await self._machines.start(connection, entry.install_path, entry.name, tell)
                told = await first_words(entry, connection, self._http, self._store, self._clock)
                if told.version != __version__:
                    raise ArrieroError(
                        ErrorCode.VERSION_MISMATCH,
                        f"{entry.name} answers as arriero {told.version} after an upgrade to {__version__}",
                        node=entry.name,
                    )
            await self._held(node)
        except ArrieroError as error:
            tell(NodeStep(step="rollback", message=error.message))
            left = await self._go_back(entry, installed, tell)
            tell(NodeStep(step="rollback", message=left))
            error.details["left"] = left
            raise

    async def _go_back(self, entry: NodeEntry, installed: Installation, tell: Tell) -> str:
        """Have the agent run again that was there before; return what is left there."""
        if installed.previous is None:
            return f"there is nothing to go back to: {installed.tag} stays there"
        tell(NodeStep(step="rollback", message=f"goes back to {installed.previous}"))
        try:
            async with (
                self._membership.without_link(entry.name, "taken back"),
                # The one before may be what failed.
                connected_again(self._fabric, entry, self._clock) as connection,
            ):
                # Another may have come to hold it meanwhile.
                await self._version(entry, connection)
                await self._machines.stop(connection, entry.install_path, tell)
                await self._machines.switch_back(connection, installed, tell)
                await self._machines.start(connection, entry.install_path, entry.name, tell)
        except ArrieroError as error:
            return f"{installed.previous} does not run again: {error.message}"
        return f"{installed.previous} runs again"

    async def _held(self, node: Node) -> None:
        """Wait until a node has joined.  Raises NODE_UNREACHABLE, and at once what waiting does not mend."""
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while node.state not in (NodeState.READY, NodeState.DRAINING) or node.error is not None:
                    if node.error is not None and node.error.code == ErrorCode.VERSION_MISMATCH:
                        raise from_body(node.error)
                    await self._registry.changed.wait()
        except TimeoutError as error:
            why = node.error.message if node.error is not None else "its agent does not tell of itself"
            raise ArrieroError(ErrorCode.NODE_UNREACHABLE, f"{node.name} did not join: {why}") from error

    # --- Removal -------------------------------------------------------------------------

    async def remove(self, name: str, tell: Tell, *, purge: bool, force: bool) -> NodeDone:
        """Stop what we started there and forget the machine; `purge` removes models and environment too.

        A machine that cannot be reached, or that another orchestrator holds, is kept, unless `force`: then it
        is forgotten, and what is left there is told.  Raises NODE_NOT_FOUND, LEASE_SUPERSEDED and what
        connecting raises.
        """
        self._membership.remote(name)
        async with self._underway.only(name, "removed", tell):
            entry = self._membership.remote(name)
            left = "" if purge else f"; models and environment stay in {entry.install_path} there"
            try:
                async with connected(self._fabric, entry, tell) as connection:
                    await self._version(entry, connection)
                    async with self._membership.without_link(name, "removed"):
                        await self._machines.remove(connection, entry.install_path, tell, purge=purge)
                        await self._membership.forget(name)
            except ArrieroError as error:
                if not force:
                    forget = f"`arriero nodes remove {name} --force` forgets it all the same"
                    said = error.details.get("suggested_action")
                    if error.code is not ErrorCode.LEASE_SUPERSEDED:
                        error.details["suggested_action"] = f"{said}; {forget}" if said else forget
                    raise
                left = f"; what runs and lies in {entry.install_path} there is left ({error.message})"
                tell(NodeStep(step="clean", message=f"not cleaned up: {error.message}"))
                await self._membership.forget(name)
        return NodeDone(message=f"{name} is no part of the pool any more{left}")

    # --- Looking -------------------------------------------------------------------------

    async def doctor(self, name: str) -> list[Finding]:
        """Look for what is wrong with a machine, there and with its part in the pool.

        Raises what connecting raises.
        """
        entry = self._membership.remote(name)
        async with connected(self._fabric, entry, _unheard) as connection:
            found = await self._machines.doctor(connection, entry.install_path)
        node = self._registry.find(name)
        return found if node is None else [*found, *_of_the_pool(node)]

    async def logs(self, name: str, lines: int) -> LogEnd:
        """Return the last lines of the agent's log there.  Raises what connecting raises."""
        entry = self._membership.remote(name)
        async with connected(self._fabric, entry, _unheard) as connection:
            return await self._machines.logs(connection, entry.install_path, lines)


def _of_the_pool(node: Node) -> Iterator[Finding]:
    """Yield what the machine itself does not show: why it gets no work, or less than it could do."""
    if node.error is not None:
        error = from_body(node.error)
        yield Finding(name="pool", is_ok=False, message=error.message, code=error.code, advice=error.advice)
    elif node.entry.is_drained:
        undrain = f"`arriero nodes undrain {node.name}` gives it work again"
        yield Finding(name="pool", is_ok=True, message=f"it is drained and takes no new work: {undrain}")
    for advice in node.capabilities.advice:
        yield Finding(name="engine", is_ok=False, message=advice, code=ErrorCode.BACKEND_UNAVAILABLE)
    if node.same_machine_as:
        yield Finding(name="memory", is_ok=True, message=shared_memory(node.same_machine_as))


def _ran_from(survey: Survey, version: str | None, new: str) -> str | None:
    """Return the environment that an agent of `version` ran from, though `new` was the current one already.

    What was interrupted between an installation and the agent's restart leaves that.  None if none ran, or
    nobody can tell: an environment that only lies there is nothing to go back to.
    """
    same = [tag for tag in survey.environments if tag.startswith(f"{version}-") and tag != new]
    return same[-1] if same else None


def _unheard(_: NodeStep) -> None:
    """Tell nobody."""
