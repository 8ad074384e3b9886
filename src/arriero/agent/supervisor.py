"""Which workers run on this machine, how do they do, and how do they end?  (`Supervisor`)

One task a worker: it waits for the process's end, which is seen at once, and watches it meanwhile.
What is decided from what is seen stands in `domain` (`WorkerRegistry`, `worker_exits`, `restarts`).
"""

import asyncio
import contextlib
import errno
import hmac
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from arriero.agent.held import Held, callback_token, slots_free, with_url
from arriero.agent.lease import NodeLease
from arriero.agent.worker_watch import WatchLimits, WorkerWatch
from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.records import WorkerExit, WorkerHealth, WorkerRecord, WorkerRunRecord
from arriero.contracts.requests import EndBody, ReadyCallback
from arriero.contracts.states import WorkerState
from arriero.domain.preflight import Promises, promise
from arriero.domain.restarts import CrashHistory, RestartPolicy
from arriero.domain.worker_exits import Evidence, judge
from arriero.domain.worker_states import WORKERS
from arriero.domain.workers import WorkerRegistry
from arriero.runtime import logs, processes, state_dir
from arriero.runtime.asgi import LOOPBACK_HOSTS
from arriero.runtime.clock import Clock
from arriero.runtime.http import Http
from arriero.runtime.settings import Settings
from arriero.runtime.state_dir import StateDir

#: Ended workers stay in the lists for so long.
ENDED_KEPT_S: Final = 600.0
#: A worker that said it has failed ends by itself within this time, or is killed.
FAILED_LINGER_S: Final = 5.0
DRAIN_ASK_TIMEOUT_S: Final = 2.0
#: The worker's part of the grace time: then it tells its clients and unloads before it is killed.
WORKER_GRACE_FRACTION: Final = 0.8
LOG_TAIL_LINES: Final = 20
EXIT_FILE: Final = "exit.json"
_LOADING: Final = frozenset({WorkerState.STARTING, WorkerState.LOADING})


@dataclass(slots=True)
class Counts:
    """What happened since the agent started; shown in its metrics."""

    spawns: int = 0
    adoptions: int = 0
    crashes: int = 0
    kills: int = 0
    out_of_memory: int = 0
    stops: int = 0
    idle_unloads: int = 0


class Supervisor:
    """Holds all workers of one agent.  Its tasks live in `group`; `name` tells this agent from others."""

    def __init__(
        self,
        *,
        settings: Settings,
        state: StateDir,
        registry: WorkerRegistry,
        http: Http,
        group: asyncio.TaskGroup,
        clock: Clock,
        name: str,
        lease: NodeLease,
    ) -> None:
        self._settings = settings
        self._state = state
        self._http = http
        self._group = group
        self._clock = clock
        self._name = name
        self._lease = lease
        self._log = logs.get("arriero.agent.supervisor")
        self._held: dict[str, Held] = {}
        self._crashes: dict[str, CrashHistory] = {}
        self.registry = registry
        self.counts = Counts()
        self.is_stopping = False

    # --- Asked from outside -------------------------------------------------------------------

    def token_of(self, worker_id: str) -> str:
        """Return a worker's token, empty for one that is not known."""
        held = self._held.get(worker_id)
        return "" if held is None else held.token

    def live_tokens(self) -> dict[str, str]:
        """Return the tokens of the workers that live, by id."""
        return {record.worker_id: self.token_of(record.worker_id) for record in self.registry.live()}

    def models_in_use(self) -> set[str]:
        """Return the references of the models that live workers have loaded or are loading."""
        return {record.model_ref for record in self.registry.live()}

    def promises(self) -> Promises:
        """Return the memory that loading workers were promised and have not taken yet."""
        loading = [(self._held[r.worker_id].run, r) for r in self.registry.live() if r.state in _LOADING]
        return Promises(
            tuple(
                promise(
                    estimated_host_mb=run.estimated_host_mb,
                    estimated_device_mb=run.estimated_device_mb,
                    used_mb=record.memory_mb,
                    device=record.device,
                )
                for run, record in loading
            )
        )

    def refuse_if_crashing(self, model_ref: str) -> None:
        """Raise WORKER_START_FAILED (refused_for_s, crashes) while a model crashes too often."""
        history = self._crashes.get(model_ref)
        refused_for_s = history.refused_for_s(self._clock.monotonic_s()) if history is not None else 0.0
        if refused_for_s > 0:
            crashes, window_s = self._settings.restart_max, self._settings.restart_window_s
            fail(
                ErrorCode.WORKER_START_FAILED,
                f"workers of this model crashed {crashes} times within {window_s:g} s: refused for another "
                f"{refused_for_s:.0f} s",
                refused_for_s=round(refused_for_s, 1),
                crashes=crashes,
                model_ref=model_ref,
            )

    def hold(self, held: Held, record: WorkerRecord) -> None:
        """Take a worker whose process was just started or found, and watch it from now on."""
        self._held[record.worker_id] = held
        self.registry.register(record)
        held.task = self._group.create_task(self._attend(held), name=f"worker-{record.worker_id}")

    def let_go(self) -> None:
        """Watch no worker any more: those that could not be stopped are left to the next agent."""
        for held in self._held.values():
            if held.task is not None:
                held.task.cancel()

    def remember(self, held: Held, record: WorkerRecord) -> None:
        """Show a worker that ended before this agent came."""
        held.ended_at_s = self._clock.monotonic_s()
        held.ended.set()
        self._held[record.worker_id] = held
        self.registry.register(record)

    def called_back(self, callback: ReadyCallback, token: str) -> WorkerRecord:
        """Take a worker's ready callback; the same one twice changes nothing.

        Raises INVALID_API_KEY for a wrong token, also where there is no such worker;
        WORKER_ALREADY_REGISTERED for a second address; INVALID_REQUEST for one that is not loopback.
        """
        held = self._held.get(callback.worker_id)
        expected = callback_token(held.token) if held is not None else callback_token("")
        if not hmac.compare_digest(token.encode(), expected.encode()) or held is None:
            fail(ErrorCode.INVALID_API_KEY, "the callback's token is not the worker's")
        record = self.registry.get(callback.worker_id)
        if record.state in WORKERS.final:
            WORKERS.check(record.state, WorkerState.LOADING)
        if record.url and record.url != callback.url:
            fail(
                ErrorCode.WORKER_ALREADY_REGISTERED,
                f"worker {record.worker_id} has called back with another address already",
                worker_id=record.worker_id,
            )
        split = urlsplit(callback.url)
        if split.scheme != "http" or split.hostname not in LOOPBACK_HOSTS or split.port is None:
            fail(ErrorCode.INVALID_REQUEST, "a worker's address is http on loopback", param="url")
        if callback.model_ref != record.model_ref:
            fail(ErrorCode.INVALID_REQUEST, "the worker has another model than asked for", param="model_ref")
        if not record.url:
            after = self.registry.update(record.worker_id, **with_url(record, callback.url))
            held.called_back.set()
            self._save(held, after)
        return self.registry.get(callback.worker_id)

    # --- Stopping -----------------------------------------------------------------------------

    def stop(self, worker_id: str, *, is_forced: bool = False, reason: str = "stopped on request") -> bool:
        """Begin to stop a worker: drain, grace, SIGKILL; forced: SIGKILL now.  Returns at once.

        Returns False if it has ended already.  Safe to call twice, and forced after unforced.
        Raises WORKER_NOT_FOUND.
        """
        record = self.registry.get(worker_id)
        held = self._held[worker_id]
        if held.ended.is_set():
            return False
        is_first = held.stop_reason is None
        held.stop_reason = held.stop_reason or reason
        if record.state not in WORKERS.final:
            self.registry.update(worker_id, state=WorkerState.DRAINING, slots_available=0)
        if is_forced:
            self._kill(held)
        elif is_first:
            self._group.create_task(self._stop(held), name=f"stop-{worker_id}")
        return True

    async def stop_all(self, reason: str) -> None:
        """Stop all workers at the same time and wait until they are gone; starts none from now on."""
        self.is_stopping = True
        open_ended = [held for held in self._held.values() if not held.ended.is_set()]
        for held in open_ended:
            self.stop(held.worker_id, reason=reason)
        await self.wait_ended(open_ended)

    def stop_bound(self, is_gone: Callable[[str], bool]) -> list[Held]:
        """Begin to stop the workers whose orchestrator has gone, by its id, and return them."""
        found = [
            held
            for held in self._held.values()
            if held.run.bound_to and not held.ended.is_set() and is_gone(held.run.bound_to)
        ]
        for held in found:
            self.stop(held.worker_id, reason="the orchestrator that it was bound to has gone")
        return found

    async def wait_ended(self, helds: Sequence[Held]) -> None:
        """Wait until workers that are being stopped are gone, at most as long as that may take."""
        limit_s = self._settings.stop_grace_s + processes.KILLED_WAIT_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                for held in helds:
                    await held.ended.wait()

    async def _stop(self, held: Held) -> None:
        grace_s = self._settings.stop_grace_s
        try:
            async with asyncio.timeout(grace_s):
                if not await self._ask_to_drain(held):
                    held.child.terminate()
                await held.ended.wait()
        except TimeoutError:
            held.stop_reason = f"{held.stop_reason}; killed after {grace_s:g} s of grace"
            self._kill(held)

    async def _ask_to_drain(self, held: Held) -> bool:
        url = self.registry.get(held.worker_id).url
        if not url:
            return False
        try:
            await self._http.peer(url, held.token).call(
                "POST",
                "/v1/admin/drain",
                body=EndBody(grace_s=self._settings.stop_grace_s * WORKER_GRACE_FRACTION),
                timeout_s=DRAIN_ASK_TIMEOUT_S,
            )
        except ArrieroError:
            return False
        return True

    def _kill(self, held: Held) -> None:
        self.counts.kills += 1
        held.child.kill()

    # --- One worker's life --------------------------------------------------------------------

    async def _attend(self, held: Held) -> None:
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(self._watch(held), name=f"watch-{held.worker_id}")
            await held.child.wait_ended(self._clock)
            watch.cancel()
        self._end(held)

    async def _watch(self, held: Held) -> None:
        limit_s = self._settings.worker_ready_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await held.called_back.wait()
        except TimeoutError:
            message = f"the worker's process did not call back within {limit_s:g} s"
            self._condemn(held, ErrorCode.WORKER_READY_TIMEOUT, message)
            return
        url = self.registry.get(held.worker_id).url
        watch = WorkerWatch(
            http=self._http,
            url=url,
            token=held.token,
            lease=self._name,
            clock=self._clock,
            limits=WatchLimits(self._settings.health_interval_s, self._settings.health_failures_max),
            on_health=lambda health: self._heard(held, health),
            on_unhealthy=lambda error: self._unhealthy(held, error),
        )
        async with asyncio.TaskGroup() as group:
            telling = self._lease.keep_told(held.worker_id, self._http.peer(url, held.token))
            fencing = group.create_task(telling, name=f"fence-{held.worker_id}")
            await watch.run()
            fencing.cancel()

    def _unhealthy(self, held: Held, error: ArrieroError) -> None:
        if held.stop_reason is not None:
            return  # It is ending, and the grace time bounds that.
        times = self._settings.health_failures_max
        message = f"{times} health checks in a row failed: {error.message}"
        self._condemn(held, ErrorCode.WORKER_UNHEALTHY, message)

    def _condemn(self, held: Held, code: ErrorCode, message: str) -> None:
        """Kill a worker because it failed; the record becomes `failed` when it is gone."""
        if held.verdict is None and not held.ended.is_set():
            held.verdict = WorkerExit(code=str(code), message=message)
            self._log.warning("worker_condemned", worker_id=held.worker_id, code=str(code), reason=message)
            self._kill(held)

    def _heard(self, held: Held, health: WorkerHealth) -> None:
        """Take a worker's news.  Raises INVALID_STATE_TRANSITION if no arrow leads there."""
        record = self.registry.get(held.worker_id)
        if record.state in WORKERS.final:
            return
        held.oom.look()
        held.note_engine(health.engine_pid)
        if health.state is WorkerState.FAILED:
            self._told_failed(held, record, health)
            return
        state = self._state_told(held, health)
        now_s, now_unix = self._clock.monotonic_s(), self._clock.wall_s()
        was_active = health.slots_busy > 0 or (record.state is WorkerState.BUSY and state is not record.state)
        if state is not WorkerState.IDLE:
            held.idle_since_s = None
        elif held.idle_since_s is None:
            held.idle_since_s = now_s
        self.registry.observe(
            msgspec.structs.replace(
                record,
                state=state,
                slots_total=health.slots_total or record.slots_total,
                slots_available=slots_free(state, total=health.slots_total, busy=health.slots_busy),
                last_activity_unix=now_unix if was_active else record.last_activity_unix,
                context_tokens=health.context_tokens,
                memory_mb=health.memory_mb,
                queued=health.queued,
                load_fraction=health.load_fraction,
                is_embedding=health.is_embedding,
                tokens_per_s=health.tokens_per_s,
            )
        )
        self._unload_if_idle(held, health, now_s)

    @staticmethod
    def _state_told(held: Held, health: WorkerHealth) -> WorkerState:
        """Return the state to record: what we asked for counts more than news from before."""
        if held.stop_reason is not None or health.state is WorkerState.STOPPED:
            return WorkerState.DRAINING
        return WorkerState.LOADING if health.state is WorkerState.STARTING else health.state

    def _told_failed(self, held: Held, record: WorkerRecord, health: WorkerHealth) -> None:
        """Forget it for new work at once; its process follows, or is killed."""
        held.failed_at_s = self._clock.monotonic_s()
        told = health.exit or WorkerExit(code=str(ErrorCode.WORKER_LOST), message="the engine ended")
        if not told.log_tail:
            tail = processes.tail(held.log_path, LOG_TAIL_LINES)
            told = msgspec.structs.replace(told, log_tail=tail)
        self._finish(held, record, WorkerState.FAILED, told)

    def _unload_if_idle(self, held: Held, health: WorkerHealth, now_s: float) -> None:
        limit_s = self._settings.idle_timeout_s
        if limit_s <= 0 or held.idle_since_s is None or held.stop_reason is not None:
            return
        # A request between two looks leaves no other trace than the worker's own count.
        if min(now_s - held.idle_since_s, health.idle_s) >= limit_s:
            self.counts.idle_unloads += 1
            self.stop(held.worker_id, reason=f"without work for {limit_s:g} s")

    # --- Its end ------------------------------------------------------------------------------

    def _end(self, held: Held) -> None:
        """Record how a process ended, and remove what was made for it."""
        held.kill_engine()
        record = self.registry.get(held.worker_id)
        if record.state not in WORKERS.final:
            exit_code, signal_name = held.child.result()
            state, told = judge(
                Evidence(
                    state_before=record.state,
                    exit_code=exit_code,
                    signal=signal_name,
                    was_asked=held.stop_reason is not None,
                    reason=held.stop_reason or "",
                    verdict=held.verdict,
                    own_words=read_exit(held.run_dir),
                    has_oom_proof=held.oom.has_proof(),
                    log_tail=tuple(processes.tail(held.log_path, LOG_TAIL_LINES)),
                )
            )
            self._finish(held, record, state, told)
        remove_traces(self._state, held)
        held.ended_at_s = self._clock.monotonic_s()
        held.ended.set()

    def _finish(self, held: Held, record: WorkerRecord, state: WorkerState, told: WorkerExit) -> None:
        self.registry.update(held.worker_id, state=state, slots_available=0, queued=0, memory_mb=0, exit=told)
        self._log.info(
            "worker_ended",
            worker_id=held.worker_id,
            state=str(state),
            exit_code=told.exit_code,
            signal=told.signal,
            code=told.code,
            reason=told.message,
        )
        if state is WorkerState.STOPPED:
            self.counts.stops += 1
            return
        self.counts.crashes += 1
        if told.code == ErrorCode.OUT_OF_MEMORY:
            self.counts.out_of_memory += 1
            for other in self._held.values():
                if other is not held and not other.ended.is_set():
                    other.oom.discount(held.oom.path)
        policy = RestartPolicy(
            intensity_max=self._settings.restart_max, window_s=self._settings.restart_window_s
        )
        history = self._crashes.setdefault(record.model_ref, CrashHistory(policy))
        history.crashed(self._clock.monotonic_s())

    def tidy(self) -> None:
        """Forget workers that ended long ago; kill those that failed and do not end."""
        now_s = self._clock.monotonic_s()
        for held in list(self._held.values()):
            if held.ended.is_set():
                if now_s - held.ended_at_s > ENDED_KEPT_S:
                    self.registry.remove(held.worker_id)
                    del self._held[held.worker_id]
            elif held.failed_at_s is not None and now_s - held.failed_at_s > FAILED_LINGER_S:
                self._kill(held)

    def live_logs(self) -> list[Path]:
        """Return the logs that are still written to."""
        return [held.log_path for held in self._held.values() if not held.ended.is_set()]

    def log_of(self, worker_id: str) -> tuple[Path, asyncio.Event]:
        """Return a worker's log, and what is set when nothing is written to it any more.

        Raises WORKER_NOT_FOUND.
        """
        self.registry.get(worker_id)
        held = self._held[worker_id]
        return held.log_path, held.ended

    def _save(self, held: Held, record: WorkerRecord) -> None:
        """Write down what the next agent needs; a full disk must not stop a worker that is well."""
        held.run = msgspec.structs.replace(held.run, record=record)
        try:
            write_run(self._state, held.run)
        except ArrieroError as error:
            self._log.warning("record_not_written", worker_id=held.worker_id, code=str(error.code))


def read_exit(run_dir: Path) -> WorkerExit | None:
    """Return what a worker wrote down of its end; None if it did not."""
    return state_dir.read(run_dir / EXIT_FILE, WorkerExit)


def write_run(state: StateDir, run: WorkerRunRecord) -> None:
    """Write a worker's run record.  Raises INSUFFICIENT_DISK or STATE_DIR_UNUSABLE."""
    try:
        state_dir.write(state.worker_file(run.record.worker_id), run)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ArrieroError(ErrorCode.INSUFFICIENT_DISK, "no room for a worker's record") from error
        raise ArrieroError(
            ErrorCode.STATE_DIR_UNUSABLE, f"a worker's record cannot be written: {error.strerror}"
        ) from error


def remove_traces(state: StateDir, held: Held) -> None:
    """Remove what was made for a worker besides its log; safe to call twice."""
    shutil.rmtree(held.run_dir, ignore_errors=True)
    state.worker_file(held.worker_id).unlink(missing_ok=True)
