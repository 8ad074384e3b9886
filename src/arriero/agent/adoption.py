"""What became of the workers of the agent before?

Those that live are adopted: the same process of the same boot, which accepts the token of its
record.  Those that ended meanwhile are shown as ended, by what they wrote down themselves.
"""

import asyncio
from pathlib import Path

import msgspec

from arriero.agent.child import Child
from arriero.agent.held import Held, slots_free
from arriero.agent.oom import OomWitness
from arriero.agent.supervisor import Supervisor, read_exit, remove_traces
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import WorkerExit, WorkerHealth, WorkerRecord, WorkerRunRecord
from arriero.contracts.states import WorkerState
from arriero.domain.worker_exits import Evidence, judge
from arriero.domain.worker_states import WORKERS
from arriero.runtime import logs, processes
from arriero.runtime.http import Http
from arriero.runtime.state_dir import StateDir, socket_dir, worker_identity

#: A worker that is slow to answer is adopted all the same; its health checks decide.
ASK_TIMEOUT_S = 2.0


async def adopt(state: StateDir, supervisor: Supervisor, http: Http) -> None:
    """Take over every worker that this state folder knows of; asks all at the same time."""
    runs = state.worker_runs()
    for path in set(state.worker_files()) - {state.worker_file(run.record.worker_id) for run in runs}:
        path.unlink(missing_ok=True)
    answers: dict[str, WorkerHealth | ArrieroError] = {}
    living = [run for run in runs if processes.is_alive(worker_identity(run))]
    async with asyncio.TaskGroup() as group:
        for run in living:
            group.create_task(_ask(http, run, answers), name=f"adopt-{run.record.worker_id}")
    for run in runs:
        _take(state, supervisor, run, answers.get(run.record.worker_id))


async def _ask(http: Http, run: WorkerRunRecord, answers: dict[str, WorkerHealth | ArrieroError]) -> None:
    if not run.record.url:
        return  # It has not called back; its callback will prove that it has our token.
    try:
        health = await http.peer(run.record.url, run.token).call(
            "GET",
            "/v1/health",
            answer=WorkerHealth,
            timeout_s=ASK_TIMEOUT_S,
            unreachable=ErrorCode.HEALTH_CHECK_ERROR,
        )
        if health.worker_id != run.record.worker_id:
            raise ArrieroError(ErrorCode.WORKER_UNHEALTHY, "another worker answers at its address")
        answers[run.record.worker_id] = health
    except ArrieroError as error:
        answers[run.record.worker_id] = error


def _take(
    state: StateDir, supervisor: Supervisor, run: WorkerRunRecord, answer: WorkerHealth | ArrieroError | None
) -> None:
    identity = worker_identity(run)
    path = Path(run.cgroup_path) if run.cgroup_path else None
    held = Held(
        run=run,
        child=Child(identity),
        run_dir=socket_dir(run.record.worker_id),
        oom=OomWitness(run.record.pid, path, run.oom_kills_at_start),
    )
    log = logs.get("arriero.agent.adoption")
    if not processes.is_alive(identity):
        record = _ended(held)
        log.info("worker_ended_unseen", worker_id=held.worker_id, state=str(record.state))
        remove_traces(state, held)
        supervisor.remember(held, record)
        return
    if isinstance(answer, ArrieroError) and answer.code in (
        ErrorCode.INVALID_API_KEY,
        ErrorCode.MISSING_API_KEY,
        ErrorCode.WORKER_UNHEALTHY,
    ):
        # Whatever lives under this pid, it does not prove to be our worker: it is left alone.
        log.warning("worker_not_adopted", worker_id=held.worker_id, reason=answer.message)
        told = WorkerExit(code=str(ErrorCode.WORKER_UNHEALTHY), message=f"not adopted: {answer.message}")
        remove_traces(state, held)
        supervisor.remember(
            held, msgspec.structs.replace(run.record, state=WorkerState.FAILED, slots_available=0, exit=told)
        )
        return
    if run.record.url:
        held.called_back.set()
    record = _living(run.record, answer if isinstance(answer, WorkerHealth) else None)
    log.info("worker_adopted", worker_id=held.worker_id, pid=run.record.pid, state=str(record.state))
    supervisor.counts.adoptions += 1
    supervisor.hold(held, record)


def _living(record: WorkerRecord, health: WorkerHealth | None) -> WorkerRecord:
    """Return the record of an adopted worker; final states are left to its watch."""
    if health is None or health.state in WORKERS.final:
        return record
    return msgspec.structs.replace(
        record,
        state=health.state,
        slots_total=health.slots_total,
        slots_available=slots_free(health.state, total=health.slots_total, busy=health.slots_busy),
        context_tokens=health.context_tokens,
        memory_mb=health.memory_mb,
        queued=health.queued,
        load_fraction=health.load_fraction,
        is_embedding=health.is_embedding,
        tokens_per_s=health.tokens_per_s,
    )


def _ended(held: Held) -> WorkerRecord:
    record = held.run.record
    state, told = judge(
        Evidence(
            state_before=record.state,
            exit_code=None,
            signal=None,
            was_watched=False,
            own_words=read_exit(held.run_dir),
            log_tail=tuple(processes.tail(held.log_path, 20)),
        )
    )
    return msgspec.structs.replace(record, state=state, slots_available=0, queued=0, memory_mb=0, exit=told)
