"""Does a worker come up: process, ready callback, HTTP server, registration, model?"""

import time
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from arriero.client import discovery
from arriero.client.api import Agent, Orchestrator, Worker
from arriero.client.connection import Limits
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import SpawnBody
from arriero.contracts.states import WorkerState
from arriero.probes.result import ProbeResult, ask
from arriero.probes.where import NO_WORKERS_CODES, Listed, Where, choose, listed, registry

SPAWN: Final = "worker-spawn"
READY: Final = "worker-ready"
TIMEOUT_S: Final = 30.0
LOOK_S: Final = 0.05
#: What is watched for, in this order: the process has a pid; it called back; its HTTP server
#: answers with its id; the registry lists it; its model is loaded.
STAGES: Final = ("process", "callback", "http", "registered", "idle")


@dataclass(slots=True)
class _Watch:
    caller: Orchestrator | Agent
    worker_id: str
    until: str
    began_s: float
    deadline_s: float
    seen: dict[str, Any]

    def reached(self, stage: str) -> None:
        stages: dict[str, float] = self.seen["stages"]
        stages.setdefault(stage, round(time.monotonic() - self.began_s, 3))

    @property
    def is_over(self) -> bool:
        return self.until in self.seen["stages"]


def worker_spawn(
    where: Where, *, model: str, until: str = "registered", timeout_s: float = TIMEOUT_S
) -> ProbeResult:
    """Start a worker and watch it come up to the stage `until`, for `timeout_s` at most.

    The worker stays when the probe has ended.
    """

    def question(seen: dict[str, Any]) -> None:
        seen["stages"] = {}
        began_s = time.monotonic()
        caller = registry(where, timeout_s=timeout_s)
        record = caller.spawn(SpawnBody(model_ref=model), timeout_s=timeout_s)
        seen.update(worker_id=record.worker_id, pid=record.pid)
        _follow(_Watch(caller, record.worker_id, until, began_s, began_s + timeout_s, seen))

    return ask(SPAWN, question)


def worker_ready(where: Where, *, until: str = "idle", timeout_s: float = TIMEOUT_S) -> ProbeResult:
    """Watch the newest worker, or the one named, come up to the stage `until`, for `timeout_s` at most.

    NO_READY_WORKERS at once where there is none, and when time runs out while it loads;
    WORKER_READY_TIMEOUT when time runs out before it called back.
    """

    def question(seen: dict[str, Any]) -> None:
        seen["stages"] = {}
        began_s = time.monotonic()
        try:
            caller = registry(where, timeout_s=timeout_s)
            workers = listed(caller, NO_WORKERS_CODES)
            is_dead = bool(workers) and all(worker.is_final for worker in workers)
            worker = choose(workers, where.worker_id, any_state=is_dead, is_agent=where.is_agent)
        except ArrieroError as error:
            if error.code not in (ErrorCode.NO_WORKERS, ErrorCode.NOT_RUNNING):
                raise
            raise ArrieroError(ErrorCode.NO_READY_WORKERS, error.message, cause=error.code.value) from error
        seen.update(worker_id=worker.worker_id, pid=worker.pid)
        _follow(_Watch(caller, worker.worker_id, until, began_s, began_s + timeout_s, seen))

    return ask(READY, question)


def _follow(watch: _Watch) -> None:
    worker: Listed | None = None
    while True:
        # Right after the spawn the pool's registry may not have heard of the worker yet.
        found = [w for w in listed(watch.caller, NO_WORKERS_CODES) if w.worker_id == watch.worker_id]
        worker = found[0] if found else None
        if worker is not None:
            watch.seen.update(state=worker.state, url=worker.url, pid=worker.pid)
            _check_alive(worker)
            _note(watch, worker)
            if watch.is_over:
                return
        elif "process" in watch.seen["stages"]:
            raise ArrieroError(
                ErrorCode.WORKER_START_FAILED, f"worker {watch.worker_id} is gone from the registry"
            )
        if time.monotonic() >= watch.deadline_s:
            raise _out_of_time(watch, worker)
        time.sleep(LOOK_S)


def _note(watch: _Watch, worker: Listed) -> None:
    if worker.pid > 0:
        watch.reached("process")
    if worker.state == WorkerState.STARTING:
        return
    watch.reached("callback")
    if "http" not in watch.seen["stages"] and not _answers(watch, worker):
        return
    watch.reached("http")
    watch.reached("registered")
    if worker.is_ready:
        watch.reached("idle")


def _answers(watch: _Watch, worker: Listed) -> bool:
    left_s = max(0.1, watch.deadline_s - time.monotonic())
    limits = Limits(connect_s=left_s, silence_s=left_s, total_s=left_s)
    client = Worker(worker.url, discovery.token_for(worker.url), limits=limits)
    try:
        return client.health(timeout_s=left_s).worker_id == worker.worker_id
    except ArrieroError as error:
        watch.seen["http_error"] = str(error.code)
        return False


def _check_alive(worker: Listed) -> None:
    if not worker.is_final:
        return
    told = msgspec.convert(worker.exit or {}, dict[str, Any])
    code = str(told.get("code") or "")
    own = {
        ErrorCode.WORKER_BINARY_NOT_FOUND,
        ErrorCode.WORKER_READY_TIMEOUT,
        ErrorCode.LOADING_TIMEOUT,
        ErrorCode.OUT_OF_MEMORY,
        ErrorCode.MODEL_CORRUPTED,
    }
    raise ArrieroError(
        ErrorCode(code) if code in own else ErrorCode.WORKER_START_FAILED,
        f"worker {worker.worker_id} is {worker.state}: {told.get('message') or 'no reason told'}",
        worker_id=worker.worker_id,
        exit=told,
    )


def _out_of_time(watch: _Watch, worker: Listed | None) -> ArrieroError:
    waited_s = watch.deadline_s - watch.began_s
    has_called = "callback" in watch.seen["stages"]
    state = worker.state if worker else "unknown to the registry"
    return ArrieroError(
        ErrorCode.NO_READY_WORKERS if has_called else ErrorCode.WORKER_READY_TIMEOUT,
        f"worker {watch.worker_id} is {state} after {waited_s:g} s, not yet {watch.until}",
        worker_id=watch.worker_id,
        timeout_s=waited_s,
        stages=watch.seen["stages"],
    )
