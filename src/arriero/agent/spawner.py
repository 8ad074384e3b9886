"""How does a request for a worker become a process?  Locate, estimate, check, start."""

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from arriero.agent import child as children
from arriero.agent.catalog import CatalogEntry
from arriero.agent.child import Child
from arriero.agent.held import Held, callback_token
from arriero.agent.oom import OomWitness
from arriero.agent.preflight import Plan, Preflight, configured_options, default_context, spec_of
from arriero.agent.supervisor import Supervisor, remove_traces, write_run
from arriero.contracts import ids
from arriero.contracts.errors import ErrorCode, fail
from arriero.contracts.fence import FENCE_HEADER
from arriero.contracts.records import WorkerRecord, WorkerRunRecord
from arriero.contracts.requests import SpawnBody, WorkerSpec
from arriero.contracts.states import WorkerState
from arriero.domain.preflight import Wish
from arriero.engines.base import EngineKind
from arriero.runtime import logs
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy
from arriero.runtime.settings import Settings
from arriero.runtime.state_dir import StateDir, socket_dir

TOKEN_DIGITS = 48
#: The engine that a request names which names none.
_ENGINE_UNNAMED = "llamacpp"
#: Secrets of the agent that a worker has no use for.
_NOT_FOR_WORKERS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "ARRIERO_API_KEY")


class Spawner:
    """Starts workers.

    `locate` returns the catalog's entry of a reference, or raises MODEL_NOT_FOUND; `fence` the newest number
    of the node's lease.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        node: str,
        state: StateDir,
        supervisor: Supervisor,
        preflight: Preflight,
        locate: Callable[[str], Awaitable[CatalogEntry]],
        kind_of: Callable[[str], EngineKind],
        callback_url: str,
        fence: Callable[[], int],
        clock: Clock,
        entropy: Entropy,
    ) -> None:
        self._settings = settings
        self._node = node
        self._state = state
        self._supervisor = supervisor
        self._preflight = preflight
        self._locate = locate
        self._kind_of = kind_of
        self._callback_url = callback_url
        self._fence = fence
        self._clock = clock
        self._entropy = entropy
        self._log = logs.get("arriero.agent.spawner")

    async def spawn(self, body: SpawnBody, *, holder: str = "") -> WorkerRecord:
        """Start a worker and return its record (`starting`); `holder`: of the node's lease, if it asks.

        Raises MODEL_NOT_FOUND and the errors of a reference, those of preflight, WORKER_START_FAILED
        while the model is refused after crashes, WORKER_BINARY_NOT_FOUND, NO_CAPACITY while the
        agent ends.
        """
        self._refuse_if_ending()
        if body.bound and not holder:
            fail(ErrorCode.INVALID_REQUEST, f"{FENCE_HEADER} says to whom it is bound", param="bound")
        engine, options = self._engine_of(body)
        kind = self._kind_of(engine)
        self._supervisor.refuse_if_crashing(body.model_ref)
        entry = await self._locate(body.model_ref)
        slots = body.slots or self._settings.worker_slots
        threads = self._settings.engine_threads
        spec = spec_of(entry.path, slots=slots, threads=threads, options=options)
        plan = await self._preflight.plan(
            kind,
            spec,
            Wish(body.backend or self._backend_unless(body.device), body.device),
            model_ref=body.model_ref,
            context=self._context_of(body, entry),
            promises=self._supervisor.promises(),
        )
        # From here to the spawn nothing waits: what is checked is still so.
        self._refuse_if_ending()
        self._preflight.recheck(plan, self._supervisor.promises())
        return self._start(body, entry, engine, plan, bound_to=holder if body.bound else "")

    def _refuse_if_ending(self) -> None:
        if self._supervisor.is_stopping:
            fail(ErrorCode.NO_CAPACITY, f"the agent of {self._node} is ending", node=self._node)

    def _engine_of(self, body: SpawnBody) -> tuple[str, dict[str, Any]]:
        """Return the engine and its options: the request's over the settings'."""
        engine = body.engine if body.engine != _ENGINE_UNNAMED else self._settings.engine
        configured = configured_options(self._settings)
        base = configured if engine == self._settings.engine else {}
        return engine, {**base, **body.options}

    def _backend_unless(self, device: str | None) -> str | None:
        """Return the settings' backend, which counts where neither backend nor device is asked for."""
        return None if device is not None else self._settings.backend or None

    def _context_of(self, body: SpawnBody, entry: CatalogEntry) -> tuple[int, bool]:
        """Return the tokens of a slot's context, and whether they were asked for."""
        if body.context_tokens is not None:
            return body.context_tokens, True
        return default_context(self._settings, entry.record), False

    def _start(
        self, body: SpawnBody, entry: CatalogEntry, engine: str, plan: Plan, *, bound_to: str
    ) -> WorkerRecord:
        worker_id = ids.worker_id(self._entropy.hex(12))
        log_path = self._state.log_file(f"workers/{worker_id}")
        argv = children.worker_argv(self._settings.worker_command)
        started = children.start(argv, log_path=log_path, env=worker_env(os.environ))
        held, record = self._describe(body, worker_id, log_path, started, engine, plan)
        held.run = msgspec.structs.replace(held.run, bound_to=bound_to)
        try:
            # In this order an agent that dies in between leaves nothing that the next does not find.
            write_run(self._state, held.run)
            held.run_dir.mkdir(mode=0o700)
        except BaseException:
            started.abandon()
            remove_traces(self._state, held)
            raise
        started.hand_over(self._worker_spec(entry, held, record, plan))
        self._supervisor.counts.spawns += 1
        self._supervisor.hold(held, record)
        self._log.info(
            "worker_spawned",
            worker_id=worker_id,
            model_ref=body.model_ref,
            pid=started.pid,
            device=record.device,
            context_tokens=plan.estimate.context_tokens,
            context_reduced=plan.is_reduced,
            estimated_host_mb=plan.need.host_mb,
            estimated_device_mb=plan.need.device_mb,
        )
        return record

    def _describe(
        self, body: SpawnBody, worker_id: str, log_path: Path, started: Child,
        engine: str, plan: Plan,
    ) -> tuple[Held, WorkerRecord]:  # fmt: skip
        now_unix = self._clock.wall_s()
        record = WorkerRecord(
            worker_id=worker_id,
            node=self._node,
            url="",
            model_ref=body.model_ref,
            backend=plan.spec.backend,
            device=plan.spec.device,
            state=WorkerState.STARTING,
            slots_total=plan.spec.slots,
            slots_available=0,
            pid=started.pid,
            started_unix=now_unix,
            last_activity_unix=now_unix,
            engine=engine,
        )
        oom = OomWitness(started.pid)
        run = WorkerRunRecord(
            record=record,
            token=self._entropy.hex(TOKEN_DIGITS),
            pid_start_ticks=started.identity.start_ticks,
            boot_id=started.identity.boot_id,
            log_path=str(log_path),
            cgroup_path=str(oom.path or ""),
            oom_kills_at_start=oom.count,
            estimated_host_mb=plan.need.host_mb,
            estimated_device_mb=plan.need.device_mb,
        )
        return Held(run=run, child=started, run_dir=socket_dir(worker_id), oom=oom), record

    def _worker_spec(self, entry: CatalogEntry, held: Held, record: WorkerRecord, plan: Plan) -> WorkerSpec:
        settings = self._settings
        return WorkerSpec(
            worker_id=record.worker_id,
            node=self._node,
            model_ref=record.model_ref,
            model_path=str(entry.path),
            token=held.token,
            callback_url=self._callback_url,
            callback_token=callback_token(held.token),
            port_base=settings.worker_port_base,
            engine=record.engine,
            engine_options=plan.spec.options,
            backend=record.backend,
            device=record.device,
            slots=record.slots_total,
            queue_max=settings.worker_queue,
            context_tokens=plan.spec.context_tokens,
            run_dir=str(held.run_dir),
            lease_s=settings.lease_s,
            ready_timeout_s=settings.worker_ready_timeout_s,
            stall_s=settings.stream_stall_s,
            loading_stall_s=settings.loading_stall_s,
            stop_grace_s=settings.stop_grace_s,
            is_embedding=entry.record.is_embedding,
            threads=settings.engine_threads,
            engine_folder=os.fspath(plan.spec.engine_folder or ""),
            fence=self._fence(),
        )


def worker_env(env: Mapping[str, str]) -> dict[str, str]:
    """Return a worker's environment: ours without secrets, cards numbered as `runtime.devices` does."""
    kept = {name: value for name, value in env.items() if name not in _NOT_FOR_WORKERS}
    kept["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return kept
