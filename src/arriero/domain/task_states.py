"""Which way may a task go?"""

from typing import Final

from arriero.contracts.states import TaskState as S
from arriero.domain.state_table import StateTable

_ENDS: Final = frozenset({S.FAILED, S.CANCELLED, S.TIMED_OUT})

TASKS: Final = StateTable(
    "task",
    {
        S.ACCEPTED: frozenset({S.QUEUED, S.PLACING}) | _ENDS,
        # A task waits where a worker's slots are taken, before or after its worker was chosen.
        S.QUEUED: frozenset({S.PLACING, S.RUNNING}) | _ENDS,
        S.PLACING: frozenset({S.PROVISIONING, S.QUEUED, S.RUNNING}) | _ENDS,
        S.PROVISIONING: frozenset({S.PLACING, S.QUEUED, S.RUNNING}) | _ENDS,
        # Back to placing: the worker was lost before the first token.
        S.RUNNING: frozenset({S.DONE, S.PLACING}) | _ENDS,
        S.DONE: frozenset(),
        S.FAILED: frozenset(),
        S.CANCELLED: frozenset(),
        S.TIMED_OUT: frozenset(),
    },
    S.ACCEPTED,
)
