"""Is a worker well?"""

from typing import Any, Final

import msgspec

from arriero.client.connection import FailureCodes
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import WorkerHealth
from arriero.domain.worker_states import WORKERS
from arriero.probes.result import ProbeResult, ask, in_terms_of
from arriero.probes.where import Where, find_worker

NAME: Final = "worker-health"
TIMEOUT_S: Final = 10.0
_CODES: Final = FailureCodes(
    ErrorCode.HEALTH_CHECK_ERROR, ErrorCode.HEALTH_CHECK_ERROR, ErrorCode.WORKER_UNHEALTHY
)
#: What whoever stands between says when the worker itself gave no answer.
_NOT_REACHED: Final = frozenset(
    {ErrorCode.NODE_UNREACHABLE, ErrorCode.WORKER_LOST, ErrorCode.REQUEST_TIMEOUT}
)


def worker_health(where: Where, *, timeout_s: float = TIMEOUT_S) -> ProbeResult:
    """Ask a worker's health route, for `timeout_s` at most.

    WORKER_UNHEALTHY: it answered, but not that it is well.  HEALTH_CHECK_ERROR: no answer, or not in time.
    """

    def question(seen: dict[str, Any]) -> None:
        worker, record = find_worker(where, _CODES, timeout_s=timeout_s)
        seen["worker_id"] = record.worker_id if record else None
        try:
            health = worker.health(timeout_s=timeout_s, codes=_CODES)
        except ArrieroError as error:
            raise _judged(error) from error
        seen["health"] = msgspec.to_builtins(health)
        _check(health, record.worker_id if record else None)

    return ask(NAME, question)


def _judged(error: ArrieroError) -> ArrieroError:
    if error.code is ErrorCode.VERSION_MISMATCH:
        return ArrieroError(ErrorCode.WORKER_UNHEALTHY, error.message, cause=error.code.value)
    if error.code is ErrorCode.WORKER_UNHEALTHY and error.details.get("answered_code") in _NOT_REACHED:
        return ArrieroError(ErrorCode.HEALTH_CHECK_ERROR, error.message, **error.details)
    return in_terms_of(_CODES, error)


def _check(health: WorkerHealth, worker_id: str | None) -> None:
    if worker_id is not None and health.worker_id != worker_id:
        raise ArrieroError(
            ErrorCode.WORKER_UNHEALTHY,
            f"{health.worker_id} answers in the place of {worker_id}",
            expected=worker_id,
            actual=health.worker_id,
        )
    if health.status != "alive" or health.state in WORKERS.final or health.exit is not None:
        raise ArrieroError(
            ErrorCode.WORKER_UNHEALTHY,
            f"worker {health.worker_id} says {health.status!r}, state {health.state}",
            status=health.status,
            state=str(health.state),
            exit=msgspec.to_builtins(health.exit),
        )
