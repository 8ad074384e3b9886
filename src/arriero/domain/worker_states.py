"""Which way may a worker go?"""

from typing import Final

from arriero.contracts.states import WorkerState as S
from arriero.domain.state_table import StateTable

WORKERS: Final = StateTable(
    "worker",
    {
        S.STARTING: frozenset({S.LOADING, S.DRAINING, S.STOPPED, S.FAILED}),
        S.LOADING: frozenset({S.IDLE, S.DRAINING, S.STOPPED, S.FAILED}),
        S.IDLE: frozenset({S.BUSY, S.DRAINING, S.STOPPED, S.FAILED}),
        S.BUSY: frozenset({S.IDLE, S.DRAINING, S.STOPPED, S.FAILED}),
        S.DRAINING: frozenset({S.STOPPED, S.FAILED}),
        S.STOPPED: frozenset(),
        S.FAILED: frozenset(),
    },
    S.STARTING,
)

#: States in which a worker takes requests.
READY: Final = frozenset({S.IDLE, S.BUSY})
