"""Is a worker in the state it should be in, and does it go there the right way?"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from arriero.client.api import Caller
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.states import WorkerState
from arriero.domain.worker_states import WORKERS
from arriero.probes.result import ProbeResult, ask, in_terms_of
from arriero.probes.where import NO_WORKERS_CODES, Listed, Where, choose, listed, registry

NAME: Final = "worker-state"
TIMEOUT_S: Final = 10.0
#: Between two looks while watching.
LOOK_S: Final = 0.03


@dataclass(frozen=True, slots=True)
class _Way:
    start: WorkerState | None
    through: WorkerState | None
    goal: WorkerState


def worker_state(
    where: Where,
    *,
    expect: str,
    start: str | None = None,
    through: str | None = None,
    is_watching: bool = False,
    timeout_s: float = TIMEOUT_S,
    tell: Callable[[str], None] | None = None,
) -> ProbeResult:
    """Compare a worker's state with `expect`; watch it for `timeout_s` where a way is asked for.

    With `start` or `through` the worker must be seen in each of these states in turn; with
    `is_watching` it has the time to come to `expect`.  Without them one look decides.  `tell` hears
    of each state as it is seen.
    """

    def question(seen: dict[str, Any]) -> None:
        seen["states"] = []
        way = _Way(_known(start), _known(through), _known_state(expect))
        _check_way(way)
        try:
            caller = registry(where, timeout_s=timeout_s)
        except ArrieroError as error:
            raise in_terms_of(NO_WORKERS_CODES, error) from error
        if is_watching or start or through:
            _watch(caller, where, way, timeout_s, seen, tell)
        else:
            state = _look(caller, where, None, seen)
            if state is not way.goal:
                _mismatch(way.goal, state)

    return ask(NAME, question)


def _known_state(name: str) -> WorkerState:
    try:
        return WorkerState(name)
    except ValueError:
        known = [str(state) for state in WorkerState]
        raise ArrieroError(
            ErrorCode.UNKNOWN_WORKER_STATE,
            f"there is no worker state {name[:40]!r}; there are {', '.join(known)}",
            state=name[:40],
            known=known,
        ) from None


def _known(name: str | None) -> WorkerState | None:
    return None if name is None else _known_state(name)


def _check_way(way: _Way) -> None:
    states = [state for state in (way.start, way.through, way.goal) if state is not None]
    for before, after in itertools.pairwise(states):
        WORKERS.check(before, after)


def _look(caller: Caller, where: Where, worker_id: str | None, seen: dict[str, Any]) -> WorkerState:
    """Return the worker's state now; keep it in `seen` where it is news.

    Raises INVALID_STATE_TRANSITION if no way leads there from the state seen before.
    """
    worker = _find(listed(caller, NO_WORKERS_CODES), where, worker_id)
    seen["worker_id"] = worker.worker_id
    state = _known_state(worker.state)
    states: list[str] = seen["states"]
    if states and states[-1] != state:
        before = WorkerState(states[-1])
        if state not in WORKERS.reachable(before):
            raise ArrieroError(
                ErrorCode.INVALID_STATE_TRANSITION,
                f"worker {worker.worker_id} was {before}, then {state}: no way leads there",
                before=str(before),
                after=str(state),
            )
    if not states or states[-1] != state:
        states.append(str(state))
    return state


def _find(workers: list[Listed], where: Where, worker_id: str | None) -> Listed:
    wanted = worker_id or where.worker_id
    living = any(not worker.is_final for worker in workers)
    return choose(workers, wanted, any_state=not living, is_agent=where.is_agent)


def _watch(
    caller: Caller,
    where: Where,
    way: _Way,
    timeout_s: float,
    seen: dict[str, Any],
    tell: Callable[[str], None] | None,
) -> None:
    todo = [state for state in (way.start, way.through, way.goal) if state is not None]
    deadline = time.monotonic() + timeout_s
    worker_id: str | None = None
    before: WorkerState | None = None
    while True:
        state = _look(caller, where, worker_id, seen)
        worker_id = seen["worker_id"]
        if tell is not None and state is not before:
            tell(f"[probe] worker {worker_id} is {state}")
        before = state
        while todo and state is todo[0]:
            todo.pop(0)
        if not todo:
            return
        if todo[0] not in WORKERS.reachable(state):
            raise ArrieroError(
                ErrorCode.INVALID_STATE_TRANSITION,
                f"worker {worker_id} is {state}: no way leads from there to {todo[0]}",
                before=str(state),
                after=str(todo[0]),
                states=seen["states"],
            )
        if time.monotonic() >= deadline:
            _mismatch(todo[0], state, f"not within {timeout_s:g} s; seen: {' → '.join(seen['states'])}")
        time.sleep(LOOK_S)


def _mismatch(expected: WorkerState, actual: WorkerState, why: str = "") -> None:
    raise ArrieroError(
        ErrorCode.WORKER_STATE_MISMATCH,
        f"expected {expected}, is {actual}" + (f" ({why})" if why else ""),
        expected=str(expected),
        actual=str(actual),
    )
