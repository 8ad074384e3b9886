"""What holds for every table of states."""

import enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.domain.node_states import NODES
from arriero.domain.state_table import StateTable
from arriero.domain.task_states import TASKS
from arriero.domain.worker_states import WORKERS

TABLES: list[StateTable[Any]] = [WORKERS, NODES, TASKS]


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.name)
def test_every_state_is_reachable_and_can_end(table: StateTable[Any]) -> None:
    assert table.reachable(table.initial) == set(table.arrows)
    for state in table.arrows:
        assert table.reachable(state) & table.final, f"{state} never ends"


@given(table=st.sampled_from(TABLES), data=st.data())
def test_a_random_history_stays_in_the_table(table: StateTable[Any], data: st.DataObject) -> None:
    state: enum.StrEnum = table.initial
    for _ in range(20):
        target = data.draw(st.sampled_from(sorted(table.arrows)))
        if target in table.arrows[state]:
            table.check(state, target)
            state = target
        else:
            with pytest.raises(ArrieroError) as refused:
                table.check(state, target)
            assert refused.value.code is ErrorCode.INVALID_STATE_TRANSITION
            assert refused.value.details["before"] == state
    if state in table.final:
        assert not table.arrows[state]
