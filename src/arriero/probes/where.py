"""Whom does a probe ask?  The registry of the orchestrator or the agent, or an address that is given."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import msgspec

from arriero.client import discovery
from arriero.client.api import Agent, Caller, Orchestrator, Worker
from arriero.client.connection import FailureCodes, Limits
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.states import WorkerState
from arriero.domain.worker_states import READY, WORKERS

REGISTRY_TIMEOUT_S: Final = 10.0
#: Between two looks at a worker that starts.
LOOK_S: Final = 0.05
#: Whoever is looked up in no registry answers so.
NO_WORKERS_CODES: Final = FailureCodes(ErrorCode.NO_WORKERS, ErrorCode.NO_WORKERS, ErrorCode.NO_WORKERS)


@dataclass(frozen=True, slots=True)
class Where:
    """What the caller said about whom to ask."""

    #: Replaces the look-up: of the worker for the questions to a worker, else of the registry.
    url: str | None = None
    #: Ask the agent of this machine, not the orchestrator.
    is_agent: bool = False
    worker_id: str | None = None


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """A worker as a registry lists it; the state is any text, since judging it is the probe's work."""

    worker_id: str
    url: str
    state: str
    node: str = ""
    model_ref: str = ""
    pid: int = 0
    started_unix: float = 0.0
    slots_total: int = 0
    slots_available: int = 0
    load_fraction: float = 0.0
    exit: dict[str, object] | None = None

    @property
    def is_final(self) -> bool:
        """Whether it will never be anything else."""
        return self.state in WORKERS.final

    @property
    def is_ready(self) -> bool:
        """Whether it takes requests."""
        return self.state in READY


class _List(msgspec.Struct, frozen=True):
    workers: list[Listed]


def registry(where: Where, *, timeout_s: float = REGISTRY_TIMEOUT_S) -> Orchestrator | Agent:
    """Return the registry to ask.  Raises NOT_RUNNING if there is none."""
    limits = Limits(connect_s=min(timeout_s, 10.0), silence_s=timeout_s, total_s=timeout_s)
    kind: type[Orchestrator | Agent] = Agent if where.is_agent else Orchestrator
    if where.url is not None:
        return kind(where.url, discovery.token_for(where.url), limits=limits)
    address = discovery.agent() if where.is_agent else discovery.orchestrator()
    return kind(address.url, address.token, limits=limits)


def agent(where: Where, *, timeout_s: float = REGISTRY_TIMEOUT_S) -> Agent:
    """Return the agent to ask about models.  Raises NOT_RUNNING if there is none."""
    found = registry(Where(where.url, is_agent=True), timeout_s=timeout_s)
    assert isinstance(found, Agent)
    return found


def listed(caller: Caller, codes: FailureCodes) -> list[Listed]:
    """Return the workers of a registry, those that ended lately too, by start.

    Raises `codes` where it does not tell.
    """
    try:
        found = caller.call("GET", "/v1/workers?all=1", _List, codes=codes).workers
    except ArrieroError as error:
        if error.code is not ErrorCode.VERSION_MISMATCH:
            raise
        raise ArrieroError(codes.unreachable, f"the registry's answer is none: {error.message}") from error
    return sorted(found, key=lambda worker: (worker.started_unix, worker.worker_id))


def find_worker(
    where: Where,
    codes: FailureCodes,
    *,
    prefer: Collection[WorkerState] = (),
    timeout_s: float = REGISTRY_TIMEOUT_S,
    wait_started_s: float = 0.0,
) -> tuple[Worker, Listed | None]:
    """Return a client of the worker to ask, and its record where a registry was asked.

    Without an id it is the newest living worker, of those in a preferred state if there are any;
    one that is starting is waited for, for `wait_started_s`.  Raises NO_WORKERS if there is none,
    also when no registry runs; `codes` where the registry does not tell, or the worker has ended.
    """
    limits = Limits(connect_s=min(timeout_s, 10.0), silence_s=timeout_s, total_s=timeout_s)
    if where.url is not None:
        return Worker(where.url, discovery.token_for(where.url), limits=limits), None
    try:
        caller = registry(where, timeout_s=timeout_s)
    except ArrieroError as error:
        if error.code is not ErrorCode.NOT_RUNNING:
            raise
        raise ArrieroError(ErrorCode.NO_WORKERS, error.message, cause=error.code.value) from error
    deadline = time.monotonic() + wait_started_s
    is_agent = where.is_agent
    worker = choose(listed(caller, codes), where.worker_id, prefer=prefer, is_agent=is_agent)
    while worker.state == WorkerState.STARTING and time.monotonic() < deadline:
        time.sleep(LOOK_S)
        worker = choose(listed(caller, codes), worker.worker_id, is_agent=is_agent)
    if worker.state == WorkerState.STARTING or worker.is_final:
        raise ArrieroError(
            codes.unreachable if worker.is_final or not wait_started_s else codes.timeout,
            f"worker {worker.worker_id} is {worker.state}: nobody answers there",
            worker_id=worker.worker_id,
            state=worker.state,
            exit=worker.exit,
        )
    return Worker(worker.url, discovery.token_for(worker.url), limits=limits), worker


def choose(
    workers: list[Listed],
    worker_id: str | None,
    *,
    prefer: Collection[WorkerState] = (),
    any_state: bool = False,
    is_agent: bool = False,
) -> Listed:
    """Return the worker that is meant; `is_agent`: of those that an agent listed.  Raises NO_WORKERS."""
    limits = "; an agent knows those of its own machine alone" if is_agent else ""
    if worker_id is not None:
        for worker in workers:
            if worker.worker_id == worker_id:
                return worker
        raise ArrieroError(
            ErrorCode.NO_WORKERS,
            f"no worker {worker_id!r} is registered, of {len(workers)} there are{limits}",
            worker_id=worker_id,
            registered=[worker.worker_id for worker in workers],
        )
    living = [worker for worker in workers if any_state or not worker.is_final]
    if not living:
        raise ArrieroError(ErrorCode.NO_WORKERS, f"no worker is registered{limits}", registered=len(workers))
    preferred = [worker for worker in living if worker.state in prefer]
    return (preferred or living)[-1]
