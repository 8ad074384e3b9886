"""On which node does a worker begin, and on which one if that refuses?  (`Placing`)

A node is found, it fetches the model if it lacks it, the worker is started there.  Whoever lacks
the model makes room only when it is there: a copy may take hours.
"""

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import TaskDownloading, TaskPlacing
from arriero.contracts.records import WorkerRecord
from arriero.domain.placement import Wants
from arriero.orchestrator.nodes import NodeRegistry
from arriero.orchestrator.room import Found, RoomFinder
from arriero.orchestrator.views import is_local

#: With these another node may still succeed.
_TRY_ELSEWHERE: Final = frozenset(
    {
        ErrorCode.INSUFFICIENT_RAM,
        ErrorCode.INSUFFICIENT_VRAM,
        ErrorCode.INSUFFICIENT_DISK,
        ErrorCode.NODE_UNREACHABLE,
        ErrorCode.WORKER_START_FAILED,
        ErrorCode.BACKEND_UNAVAILABLE,
    }
)
_TOO_BIG: Final = frozenset({ErrorCode.INSUFFICIENT_RAM, ErrorCode.INSUFFICIENT_VRAM})

Step: TypeAlias = TaskPlacing | TaskDownloading


@dataclass(frozen=True, slots=True)
class Ways:
    """What is done for one worker, and how."""

    tell: Callable[[Step], None]
    #: Finds room; takes what an agent reckoned, where our own guess was too small.
    find: Callable[[Wants, int | None], Awaitable[Found]]
    start: Callable[[Found], Awaitable[WorkerRecord]]
    #: Has a node fetch the model; None: nothing is fetched.
    fetch: Callable[[str], Awaitable[None]] | None = None


class Placing:
    """One worker's way to its node, and what was learned of nodes on it."""

    def __init__(self, registry: NodeRegistry, room: RoomFinder, wants: Wants, ways: Ways) -> None:
        self._registry = registry
        self._room = room
        self._wants = wants
        self._ways = ways
        self._refused: dict[str, ArrieroError] = {}
        self._learned: dict[str, int] = {}
        #: Nodes whose catalog has the model and whose disk has not.
        self._lacking: set[str] = set()
        self._fetched: set[str] = set()
        #: The one that fetched it last.
        self._here: str | None = None
        #: What a node itself said first tells more than that no node is left.
        self._told: ArrieroError | None = None

    async def run(self) -> WorkerRecord:
        """Return the worker, on whichever node took it.  Raises why none did."""
        while True:
            found = await self._found()
            lacks = self._lacks(found.node)
            message = found.message
            if lacks and found.victims:
                message = f"{found.node} lacks {self._wants.model_ref}: fetches it before others make room"
            self._tell(found.node, message)
            with contextlib.ExitStack() as unless_begun:
                unless_begun.callback(self._room.give_up, found)
                try:
                    if not lacks:
                        record = await self._ways.start(found)
                        unless_begun.pop_all()
                        return record
                    # Nobody goes for a copy that may take hours, and no memory is kept for it.
                    unless_begun.close()
                    await self._fetch(found.node)
                except ArrieroError as error:
                    self._take(found.node, error)

    async def _found(self) -> Found:
        while True:
            wants = replace(self._wants, excluded=self._wants.excluded | self._refused.keys())
            learned_mb = max(self._learned.values(), default=None)
            try:
                return await self._ways.find(self._near(wants, learned_mb), learned_mb)
            except ArrieroError as error:
                if self._here is None or self._wants.node is not None:
                    raise self._told or error from None
                # While it fetched the model, its memory became another's.
                self._refuse(self._here, error)

    def _near(self, wants: Wants, learned_mb: int | None) -> Wants:
        """Return where room is looked for: where the model was fetched to, unless only others have any."""
        if self._here is None:
            return wants
        there = replace(wants, node=self._here)
        is_taken = self._room.fits(wants, learned_mb) and not self._room.fits(there, learned_mb)
        return wants if is_taken else there

    def _lacks(self, node: str) -> bool:
        """Return whether a node is to fetch the model: once at the most."""
        if self._ways.fetch is None or node in self._fetched:
            return False
        return node in self._lacking or not self._registry.views.has_model(node, self._wants.model_ref)

    async def _fetch(self, node: str) -> None:
        assert self._ways.fetch is not None, "it lacks nothing otherwise"
        self._fetched.add(node)
        await self._ways.fetch(node)
        self._here = node

    def _take(self, node: str, error: ArrieroError) -> None:
        """Take what a node said, and go on elsewhere or otherwise.  Raises it where nothing else helps."""
        required_mb = error.details.get("required_mb")
        if (
            error.code in _TOO_BIG
            and isinstance(required_mb, int)
            and node not in self._learned
            and self._registry.workers.select(node=node)
        ):
            # Our guess was too small: with what the agent reckoned, others may have to go.
            self._learned[node] = required_mb
            self._told = self._told or error
            return
        if error.code is ErrorCode.MODEL_NOT_FOUND and self._may_fetch(node):
            self._lacking.add(node)
            return
        others = len(self._registry.nodes()) - len(self._refused) - 1
        if error.code not in _TRY_ELSEWHERE or others < 1:
            raise error
        self._refuse(node, error)

    def _may_fetch(self, node: str) -> bool:
        is_fetched = self._ways.fetch is not None and not is_local(self._wants.model_ref)
        return is_fetched and node not in self._fetched

    def _refuse(self, node: str, error: ArrieroError) -> None:
        self._refused[node] = error
        self._told = self._told or error
        if self._here == node:
            self._here = None
        self._tell(node, f"{node} refused: {error.message}")

    def _tell(self, node: str, message: str) -> None:
        self._ways.tell(TaskPlacing(node=node, actor="orchestrator", message=message))
