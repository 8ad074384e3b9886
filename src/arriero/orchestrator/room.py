"""Where does a new worker go, and what has to happen before it has room there?  (`RoomFinder`)

What is decided stands in `domain` (`placement_nodes`, `placement_eviction`, `placement_turns`,
`placement_wake`); here it is waited for.  Whoever waits stands in a line: the first one that wants a
node's memory has it first.
"""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, NoReturn

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.events import TaskPlacing
from arriero.contracts.states import NodeState
from arriero.domain.placement_decision import Decision, Evict, Fit, Hold, Wake, decide
from arriero.domain.placement_eviction import Eviction, Stage
from arriero.domain.placement_ledger import Movement
from arriero.domain.placement_memory import Needed, larger
from arriero.domain.placement_nodes import (
    Candidate,
    NodeChoice,
    NodeView,
    candidates,
    chosen_node,
    no_node,
    refuse,
)
from arriero.domain.placement_turns import Turn, Verdict, limits_of, turn
from arriero.domain.placement_wake import choose_sleeper
from arriero.domain.placement_wants import ModelFacts, Wants, count, gib
from arriero.orchestrator.nodes import Node, NodeRegistry
from arriero.runtime import logs
from arriero.runtime.clock import Clock
from arriero.runtime.settings import Settings
from arriero.runtime.wake import parse_target, wake

#: Between two looks of the first in line: the end of a request is no news of its own.
LOOK_S: Final = 0.25
#: Between two looks of those behind it.
LOOK_BEHIND_S: Final = 1.0
#: All that wait look so often together at the most: in a large pool something changes all the time.
LOOKS_PER_S: Final = 100
#: A machine that is being woken is called again after so long.
WAKE_AGAIN_S: Final = 10.0
#: Requests that run on a worker which is to make room may take so long to end.
CLOSING_S: Final = 600.0
#: Whoever may not wait still waits so long for workers that are idle already: a moment of grace, and
#: others who came earlier.
IDLE_WAIT_S: Final = 5.0
#: Beyond the agent's own grace time, until a stopped worker is known to be gone.
STOP_EXTRA_S: Final = 10.0

Tell = Callable[[TaskPlacing], None]


@dataclass(frozen=True, slots=True)
class Found:
    """A node for a new worker, its memory reserved; these workers of it are to be stopped first."""

    node: str
    message: str
    movement: Movement | None = None
    victims: tuple[str, ...] = ()

    @property
    def device(self) -> str | None:
        """The device that room is made on; None: the agent chooses."""
        return self.movement.device if self.movement is not None and self.victims else None


@dataclass(frozen=True, slots=True)
class Foreseen:
    """What would happen to a new worker now: for people, nothing is done."""

    choice: NodeChoice
    candidates: list[Candidate]
    needed: Needed | None
    #: What would be done; nothing of it is.
    decision: Decision


@dataclass(slots=True, eq=False)
class _Waiter:
    since_s: float
    #: The node whose memory it waits for.
    node: str | None = None
    failed: dict[str, ArrieroError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Wait:
    message: str
    again_s: float


_SERVED: Final = _Wait("another worker takes what waited for this one", LOOK_S)


class RoomFinder:
    """Finds nodes for new workers; makes room, wakes machines."""

    def __init__(self, registry: NodeRegistry, clock: Clock, settings: Settings) -> None:
        self._registry = registry
        #: What choices see of the pool.
        self.views = registry.views
        self._clock = clock
        self._limits = limits_of(settings.starvation_s)
        self._stop_limit_s = settings.stop_grace_s + STOP_EXTRA_S
        self._wake_timeout_s = settings.wake_timeout_s
        self._wake_target = parse_target(settings.wake_address)
        self._line: list[_Waiter] = []
        self._log = logs.get("arriero.placement")

    def choose_disk(self, wants: Wants) -> NodeChoice:
        """Return which node a model is fetched to, whatever its memory holds now."""
        facts = self.views.facts(wants.model_ref)
        # A disk is a disk, also where the engine for the accelerator is missing.
        for able in (wants, replace(wants, backend="cpu")):
            view = self.views.index.best(able, None, facts)
            if view is not None:
                return chosen_node(view, able, None)
        return no_node(self.views.nodes(), wants, None, facts)

    def spare(self, wants: Wants) -> NodeView | None:
        """Return a node that has the model and room for one more worker, so that nobody has to go for it."""
        facts, needed = self.views.facts(wants.model_ref), self.views.needed(wants.model_ref)
        view = self.views.index.best(wants, needed.full_mb if needed is not None else None, facts)
        return view if view is not None and facts.is_on(view.name) else None

    def foresee(self, wants: Wants) -> Foreseen:
        """Return what would happen to a new worker now."""
        facts, needed = self.views.facts(wants.model_ref), self.views.needed(wants.model_ref)
        decision = self.decision(wants, needed)
        full_mb = needed.full_mb if needed is not None else None
        if isinstance(decision, Fit):
            choice, compared_mb = _fitting(decision, wants), decision.needed_mb
        else:
            choice, compared_mb = no_node(self.views.nodes(), wants, full_mb, facts), full_mb
        listed = candidates(self.views.nodes(), wants, compared_mb, facts)
        return Foreseen(choice, listed, needed, decision)

    def decision(self, wants: Wants, needed: Needed | None) -> Decision:
        """Return what would be done for a new worker now, if it were asked for; nothing of it is."""
        facts = self.views.facts(wants.model_ref)
        return decide(_Ways(self, wants, facts, _Waiter(self._clock.monotonic_s())), needed)

    def fits(self, wants: Wants, learned: Needed | None) -> bool:
        """Return whether a new worker has room now and nobody goes for it; `learned`: as for `find`."""
        needed = larger(self.views.needed(wants.model_ref), learned)
        return isinstance(self.decision(wants, needed), Fit)

    async def find(
        self,
        wants: Wants,
        tell: Tell,
        *,
        needed: Needed | None = None,
        learned: Needed | None = None,
        may_wait: bool = True,
        is_served: Callable[[], bool] = lambda: False,
    ) -> Found:
        """Return a node with room, as long as it takes for others to make it.

        `needed`: what the worker takes, where that is not what one takes by default.  `learned`: what an
        agent reckoned, where our own guess was too small.  Unless `may_wait`, only what is idle makes
        room, and no machine is woken.  `is_served`: whether workers are there by now for all that wait for
        this one: it takes no room then, theirs least of all, and they are about to leave.  Whoever has
        the answer uses it, or gives the reservation back.
        Raises why no node can take the worker.
        """
        waiter = _Waiter(self._clock.monotonic_s())
        told = ""
        self._line.append(waiter)
        try:
            while True:
                step = (
                    _SERVED
                    if is_served()
                    else self._look(wants, waiter, needed=needed, learned=learned, may_wait=may_wait)
                )
                if isinstance(step, Found):
                    return step
                if isinstance(step, NodeView):
                    await self._wake(step, waiter, tell)
                    continue
                if step.message != told:
                    told = step.message
                    tell(TaskPlacing(node=waiter.node, actor="orchestrator", message=told))
                changed = self._registry.changed.next()
                pause_s = len(self._line) / LOOKS_PER_S
                await self._clock.sleep_s(pause_s)
                look_s = LOOK_BEHIND_S if self._before(waiter) else LOOK_S
                await self._changed(min(step.again_s, look_s) - pause_s, changed)
        finally:
            self._line.remove(waiter)

    def give_up(self, found: Found) -> None:
        """Take back what was reserved and closed for a worker that will not be made."""
        if found.movement is not None:
            self.views.unreserve(found.movement)
        self.views.stay(found.victims)

    # --- Looking: nothing is awaited between a look and what follows from it ----------------------

    def _look(
        self, wants: Wants, waiter: _Waiter, *, needed: Needed | None, learned: Needed | None, may_wait: bool
    ) -> Found | NodeView | _Wait:
        wants = replace(wants, excluded=wants.excluded | waiter.failed.keys())
        facts = self.views.facts(wants.model_ref)
        needed = larger(needed or self.views.needed(wants.model_ref), learned)
        decision = decide(_Ways(self, wants, facts, waiter), needed, may_wait=may_wait)
        if isinstance(decision, Fit):
            return self._found(decision, wants)
        if isinstance(decision, Wake):
            return decision.node
        is_late = not may_wait and self._clock.monotonic_s() - waiter.since_s >= IDLE_WAIT_S
        if decision is None or is_late:
            waiter.node = None
            self._none(wants, waiter, needed.full_mb if needed is not None else None, facts)
        if isinstance(decision, Evict):
            return self._take_turn(decision, wants, waiter)
        waiter.node = decision.plan.node
        return _Wait(f"{_need(decision, wants)}: waits for workers there that load or end", LOOK_BEHIND_S)

    def _take_turn(self, decision: Evict, wants: Wants, waiter: _Waiter) -> Found | _Wait:
        plan, verdict = decision.plan, decision.verdict
        need = _need(decision, wants)
        models = sorted({record.model_ref for record in map(self._registry.worker, plan.worker_ids)})
        if verdict.turn is Turn.WAIT:
            message = f"{need}: waits for who came earlier"
            if not self._before(waiter):
                limit = f"{self._limits.starvation_s:g} s at most"
                message = f"{need}: waits while {', '.join(models)} has requests there, {limit}"
            return _Wait(message, verdict.again_s)
        self.views.leave(plan.worker_ids, wants.model_ref)
        movement = self.views.reserve(plan.node, plan.device, decision.needed_mb)
        number = len(plan.worker_ids)
        what = "stops what was used longest ago" if verdict.turn is Turn.GO else "its turn has come, stops"
        message = f"{need}: {what}: {count(number, 'worker')} ({', '.join(models)})"
        return Found(plan.node, message, movement, plan.worker_ids)

    def verdict(self, plan: Eviction, waiter: _Waiter) -> Verdict:
        """Return whether these workers may go for whoever waits."""
        if self._before(waiter):
            return Verdict(Turn.WAIT, self._turn_s(waiter))
        waited_s = self._clock.monotonic_s() - waiter.since_s
        return turn(map(self.views.place, plan.worker_ids), waited_s, self._limits)

    def _before(self, waiter: _Waiter) -> int:
        """Return how many who came earlier wait for the same node."""
        earlier = itertools.takewhile(lambda other: other is not waiter, self._line)
        return sum(other.node == waiter.node for other in earlier)

    def _turn_s(self, waiter: _Waiter) -> float:
        """Return in how many seconds its turn is, where each one before it waits as long as it may."""
        return (self._before(waiter) + 1) * self._limits.starvation_s

    def _found(self, decision: Fit, wants: Wants) -> Found:
        choice = _fitting(decision, wants)
        room = decision.node.room(wants)
        movement = None
        if room is not None and decision.needed_mb is not None:
            movement = self.views.reserve(decision.node.name, room.device, decision.needed_mb)
        return Found(decision.node.name, choice.message, movement)

    def _none(self, wants: Wants, waiter: _Waiter, needed_mb: int | None, facts: ModelFacts) -> NoReturn:
        if waiter.failed:
            raise next(iter(waiter.failed.values()))
        refuse(no_node(self.views.nodes(), wants, needed_mb, facts), wants)

    # --- Making room ----------------------------------------------------------------------------

    def taking(self, name: str) -> Node:
        """Return a node that still takes work: much may have happened since it was chosen.

        Raises NODE_NOT_FOUND, NODE_UNREACHABLE; NODE_DRAINING also while it is upgraded.
        """
        node = self._registry.reachable(name)
        if node.state is not NodeState.READY:
            fail(ErrorCode.NODE_DRAINING, f"{name} takes no new work", node=name)
        return node

    async def clear(self, found: Found) -> None:
        """Stop the workers that make room, once nothing computes on them, and wait until they are gone.

        Raises NO_CAPACITY if that takes too long, what `taking` raises, and what the agent answers.
        """
        if not found.victims:
            return
        self._log.info("making room", node=found.node, workers=list(found.victims))
        try:
            async with asyncio.timeout(CLOSING_S):
                while any(self.views.place(worker_id).requests for worker_id in self._live(found)):
                    self.taking(found.node)
                    await self._changed(LOOK_S)
            node = self.taking(found.node)
            async with asyncio.timeout(self._stop_limit_s):
                for worker_id in self._live(found):
                    await node.peer.call("DELETE", f"/v1/workers/{worker_id}")
                while self._live(found):
                    self.taking(found.node)
                    await self._changed(LOOK_S)
        except TimeoutError:
            left = self._live(found)
            fail(
                ErrorCode.NO_CAPACITY,
                f"{', '.join(left)} on {found.node} did not make room in time",
                node=found.node,
                workers=left,
            )

    def _live(self, found: Found) -> list[str]:
        return [worker_id for worker_id in found.victims if worker_id in self._registry.workers]

    # --- Waking ---------------------------------------------------------------------------------

    async def _wake(self, node: NodeView, waiter: _Waiter, tell: Tell) -> None:
        """Wake a machine and wait until it is in the pool; note it among the failed if it does not come."""
        waiter.node = node.name
        limit_s = self._wake_timeout_s
        message = f"{node.name} sleeps, and nothing that is awake has room: wakes it ({node.mac})"
        tell(TaskPlacing(node=node.name, actor="orchestrator", message=message))
        started_s = self._clock.monotonic_s()
        try:
            async with asyncio.timeout(limit_s):
                while not await self._is_back(node):
                    message = f"waits for {node.name} to wake, {limit_s:g} s at most"
                    tell(TaskPlacing(node=node.name, actor="orchestrator", message=message))
        except ArrieroError as error:
            waiter.failed[node.name] = error
            return
        except TimeoutError:
            waiter.failed[node.name] = ArrieroError(
                ErrorCode.NODE_UNREACHABLE, f"{node.name} did not wake within {limit_s:g} s", node=node.name
            )
            return
        took_s = self._clock.monotonic_s() - started_s
        tell(TaskPlacing(node=node.name, actor=node.name, message=f"is awake after {took_s:.0f} s"))

    async def _is_back(self, node: NodeView) -> bool:
        """Send the packet and wait a while for the node; return whether it is there."""
        await wake(node.mac, self._wake_target)
        deadline_s = self._clock.monotonic_s() + WAKE_AGAIN_S
        while True:
            view = self.views.node(node.name)
            if view is not None and view.state is NodeState.READY:
                return True
            left_s = deadline_s - self._clock.monotonic_s()
            if left_s <= 0:
                return False
            await self._changed(left_s)

    async def _changed(self, timeout_s: float, changed: asyncio.Event | None = None) -> None:
        try:
            async with asyncio.timeout(max(timeout_s, 0.01)):
                await (changed or self._registry.changed.next()).wait()
        except TimeoutError:
            return


@dataclass(frozen=True, slots=True)
class _Ways:
    """What one model's search looks at: the pool as it is now."""

    finder: RoomFinder
    wants: Wants
    facts: ModelFacts
    waiter: _Waiter

    def best(self, needed_mb: int | None) -> NodeView | None:
        return self.finder.views.index.best(self.wants, needed_mb, self.facts)

    def plan(self, needed_mb: int, stages: frozenset[Stage]) -> Eviction | None:
        return self.finder.views.evictions.plan(self.wants, needed_mb, facts=self.facts, stages=stages)

    def verdict(self, plan: Eviction) -> Verdict:
        self.waiter.node = plan.node
        return self.finder.verdict(plan, self.waiter)

    def sleeper(self, needed_mb: int | None) -> NodeView | None:
        return choose_sleeper(self.finder.views.asleep(), self.wants, needed_mb, self.facts)


def _fitting(decision: Fit, wants: Wants) -> NodeChoice:
    choice = chosen_node(decision.node, wants, decision.needed_mb)
    if not decision.is_reduced:
        return choice
    return replace(choice, message=f"{choice.message}, with less context than the model could have")


def _need(decision: Evict | Hold, wants: Wants) -> str:
    return (
        f"{decision.plan.node} has {gib(max(decision.plan.free_mb, 0))} GiB free, {wants.model_ref} needs "
        f"{gib(decision.needed_mb)} GiB"
    )
