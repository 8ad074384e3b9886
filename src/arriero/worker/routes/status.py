"""How is this worker?  Health, readiness, loading, state and metrics."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import WorkerHealth, WorkerReady
from arriero.contracts.states import WorkerState
from arriero.domain.worker_states import READY
from arriero.runtime import sse
from arriero.runtime.asgi import AsgiApp, SseResponse
from arriero.worker.core import Core
from arriero.worker.lease import HEADER as LEASE_HEADER
from arriero.worker.render import DONE_FRAME, encode
from arriero.worker.state import STAGE_READY
from arriero.worker.web import Handler, Plain, Request, json_answer

#: The state stream says at least so often that the worker lives.
STATE_BEAT_S = 1.0


class StatusRoutes:
    """Handlers over one worker."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def table(self) -> dict[tuple[str, str], Handler]:
        """Return the routes."""
        return {
            ("GET", "/v1/health"): self.health,
            ("GET", "/v1/ready"): self.ready,
            ("GET", "/v1/progress"): self.progress,
            ("GET", "/v1/state"): self.state,
            ("GET", "/metrics"): self.metrics,
        }

    async def health(self, request: Request) -> AsgiApp:
        """Answer how the worker is; a poll of the agent renews the lease."""
        if header := request.header(LEASE_HEADER):
            self._core.lease.renew(header)
        return json_answer(self._core.health())

    async def ready(self, request: Request) -> AsgiApp:
        """Answer whether requests are taken."""
        life = self._core.lifecycle
        return json_answer(
            WorkerReady(
                ready=life.state in READY,
                state=life.state,
                progress_url=f"{self._core.url}/v1/progress",
                model_loaded=life.is_loaded,
            )
        )

    async def progress(self, request: Request) -> AsgiApp:
        """Stream the loading: how far it is, each step, and its end."""
        return SseResponse(self._progress())

    async def _progress(self) -> AsyncGenerator[bytes, None]:
        life, event_id, seen = self._core.lifecycle, 0, None
        while True:
            if life.loading is not seen:
                seen = life.loading
                yield sse.encode(encode(seen), event_id)
                event_id += 1
                continue  # It may have moved on while the frame went out.
            if seen.stage == STAGE_READY:
                yield DONE_FRAME
                return
            if life.failure is not None:
                raise life.failure
            if life.state is WorkerState.DRAINING or life.is_final:
                raise ArrieroError(
                    ErrorCode.NO_READY_WORKERS,
                    f"the worker ends before its model was loaded: {self._core.ending.reason}",
                    state=str(life.state),
                )
            await life.changed.wait()

    async def state(self, request: Request) -> AsgiApp:
        """Stream the health at every change, and each second; an agent that reads keeps its lease."""
        return SseResponse(self._state(request.header(LEASE_HEADER)))

    async def _state(self, lease_header: bytes) -> AsyncGenerator[bytes, None]:
        life, event_id = self._core.lifecycle, 0
        lease = self._core.lease
        with lease.held(lease_header) if lease_header else contextlib.nullcontext():
            while True:
                seen = self._core.health()
                yield sse.encode(encode(seen), event_id)
                event_id += 1
                if seen.state in (WorkerState.STOPPED, WorkerState.FAILED):
                    yield DONE_FRAME
                    return
                if not _differs(seen, self._core.health()):
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(STATE_BEAT_S):
                            await life.changed.wait()

    async def metrics(self, request: Request) -> AsgiApp:
        """Answer the counters in Prometheus's text format."""
        core = self._core
        text = core.metrics.text(
            slots_total=core.slots.total,
            slots_busy=core.slots.busy,
            queued=core.slots.queued,
            load_s=core.host.load_s,
            memory_mb=core.host.memory_mb(),
        )
        return Plain(200, text.encode(), content_type=b"text/plain; version=0.0.4; charset=utf-8")


def _differs(before: WorkerHealth, after: WorkerHealth) -> bool:
    """Return whether something changed besides what always does: seconds and memory."""
    return msgspec.structs.replace(after, idle_s=before.idle_s, memory_mb=before.memory_mb) != before
