"""Which workers would have to go, so that a new one has room?"""

import heapq
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from arriero.domain.placement_nodes import NodeView, Room, unfit
from arriero.domain.placement_wants import ModelFacts, Wants


class Stage(IntEnum):
    """What a worker does with its memory now."""

    #: No request is with it.
    IDLE = 0
    #: It computes: it is not stopped, but it may be waited for.
    BUSY = 1
    #: It loads, it leaves, or it is not even started: its memory may be had later.
    MOVING = 2


#: Workers that may be stopped at once.
IDLE_ONLY: Final = frozenset({Stage.IDLE})
#: Workers that may be stopped as soon as nothing computes.
READY_ONES: Final = frozenset({Stage.IDLE, Stage.BUSY})
ANY: Final = frozenset(Stage)


@dataclass(frozen=True, slots=True)
class Occupant:
    """One worker by the memory that it holds."""

    worker_id: str
    device: str
    model_ref: str
    memory_mb: int
    stage: Stage
    #: When it was used last: the oldest goes first.
    last_used: float
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class Eviction:
    """Workers of one node that go, for room on one device."""

    node: str
    device: str
    worker_ids: tuple[str, ...]
    freed_mb: int
    #: Free before anybody goes.
    free_mb: int


def plan_eviction(
    nodes: Iterable[NodeView],
    occupants: Mapping[str, Sequence[Occupant]],
    wants: Wants,
    needed_mb: int,
    *,
    facts: ModelFacts,
    stages: Container[Stage] = IDLE_ONLY,
) -> Eviction | None:
    """Return what to stop, so that some node has `needed_mb` free; None if that cannot be had.

    On each device the fewest that suffice, among those the ones that were used longest ago; of all
    nodes the one that loses fewest, then one that has the model, then the one whose workers were
    used longest ago, then by name.  Pinned models are never stopped, and none whose stage is not
    among `stages`.
    """
    best: tuple[tuple[object, ...], Eviction] | None = None
    for node in nodes:
        here = occupants.get(node.name)
        if not here or unfit(node, wants, facts) is not None:
            continue
        for room in node.rooms(wants):
            able = [o for o in here if o.device == room.device and not o.is_pinned and o.stage in stages]
            victims = fewest(able, needed_mb - room.free_mb)
            if victims is None:
                continue
            last_used = max((victim.last_used for victim in victims), default=0.0)
            rank = (len(victims), not facts.is_on(node.name), last_used, node.name, room.device)
            if best is None or rank < best[0]:
                best = (rank, evicted(node.name, room, victims))
    return best[1] if best is not None else None


def evicted(node: str, room: Room, victims: Sequence[Occupant]) -> Eviction:
    """Return the plan to stop these workers for room on this device."""
    return Eviction(
        node=node,
        device=room.device,
        worker_ids=tuple(victim.worker_id for victim in victims),
        freed_mb=sum(victim.memory_mb for victim in victims),
        free_mb=room.free_mb,
    )


def age(occupant: Occupant) -> tuple[float, str]:
    """Return what orders workers: the one used longest ago first."""
    return occupant.last_used, occupant.worker_id


def fewest(occupants: Iterable[Occupant], deficit_mb: int) -> list[Occupant] | None:
    """Return the fewest that hold `deficit_mb`, of those the ones used longest ago; None: not enough."""
    if deficit_mb <= 0:
        return []
    left = sorted((o for o in occupants if o.memory_mb > 0), key=age)
    largest = sorted((o.memory_mb for o in left), reverse=True)
    number, held = 0, 0
    while held < deficit_mb:
        if number == len(largest):
            return None
        held += largest[number]
        number += 1
    if number == len(left):
        return left
    victims: list[Occupant] = []
    for position, occupant in enumerate(left):
        if len(victims) == number:
            break
        # Taken if the largest of those that come after it can still make up what is missing.
        others = number - len(victims) - 1
        rest = sum(heapq.nlargest(others, (o.memory_mb for o in left[position + 1 :]))) if others else 0
        if sum(v.memory_mb for v in victims) + occupant.memory_mb + rest >= deficit_mb:
            victims.append(occupant)
    return victims
