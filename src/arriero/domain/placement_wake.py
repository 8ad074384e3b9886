"""Which machine that sleeps is woken for a model that fits nowhere else?"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

import msgspec

from arriero.contracts.errors import ErrorCode
from arriero.contracts.records import DeviceRecord
from arriero.contracts.states import NodeState
from arriero.domain.placement_nodes import NO_FACTS, NodeView, unfit
from arriero.domain.placement_wants import ModelFacts, Wants

#: Whoever answers with anything else is awake: another version, another host key, a login that fails.
_MAY_SLEEP: Final = frozenset({None, ErrorCode.NODE_UNREACHABLE})


def choose_sleeper(
    nodes: Iterable[NodeView], wants: Wants, needed_mb: int | None, facts: ModelFacts = NO_FACTS
) -> NodeView | None:
    """Return the node to wake; None if none that sleeps could take the worker.

    Reckoned with all of its memory, for nobody computes there.  One that has the model first, then
    the one that is cheapest to wake, then the smallest that suffices, then by name; one of which
    nothing is known yet comes last.
    """
    best: tuple[tuple[object, ...], NodeView] | None = None
    for node in nodes:
        if not may_sleep(node):
            continue
        is_unknown = not node.devices
        if not is_unknown and needed_mb is not None and needed_mb > _most_mb(node):
            # Whoever waits in a pool that mostly sleeps looks at all of them again and again.
            continue
        awake = as_if_awake(node)
        if is_unknown:
            if wants.backend is not None or wants.device is not None or wants.node not in (None, node.name):
                continue
            if node.is_drained or node.name in wants.excluded or set(wants.labels) - set(node.labels.items()):
                continue
            size_class = 0
        else:
            room = awake.room(wants)
            if room is None or unfit(awake, wants, facts) is not None:
                continue
            if needed_mb is not None and needed_mb > room.free_mb:
                continue
            size_class = room.size_class
        rank = (is_unknown, not facts.is_on(node.name), node.wake_cost_s, size_class, node.name)
        if best is None or rank < best[0]:
            best = (rank, node)
    return best[1] if best is not None else None


def may_sleep(node: NodeView) -> bool:
    """Return whether a node may be a machine that sleeps, and can be woken."""
    return node.state is NodeState.UNREACHABLE and bool(node.mac) and node.error_code in _MAY_SLEEP


def _most_mb(node: NodeView) -> int:
    return max(node.ram_mb, node.ram_free_mb, *[device.memory_mb for device in node.devices])


def as_if_awake(node: NodeView) -> NodeView:
    """Return a node as it would be right after it woke: all of its memory is free."""
    return replace(
        node,
        state=NodeState.READY,
        error_code=None,
        ram_free_mb=node.ram_mb or node.ram_free_mb,
        devices=tuple(_emptied(device) for device in node.devices),
        promised_mb={},
    )


def _emptied(device: DeviceRecord) -> DeviceRecord:
    return msgspec.structs.replace(device, memory_free_mb=device.memory_mb)
