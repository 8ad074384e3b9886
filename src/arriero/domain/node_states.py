"""Which way may a node go?"""

from typing import Final

from arriero.contracts.states import NodeState as S
from arriero.domain.state_table import StateTable

NODES: Final = StateTable(
    "node",
    {
        S.JOINING: frozenset({S.READY, S.UNREACHABLE, S.REMOVED}),
        S.READY: frozenset({S.DRAINING, S.UNREACHABLE, S.REMOVED}),
        S.DRAINING: frozenset({S.READY, S.UNREACHABLE, S.REMOVED}),
        S.UNREACHABLE: frozenset({S.JOINING, S.REMOVED}),
        S.REMOVED: frozenset(),
    },
    S.JOINING,
)
