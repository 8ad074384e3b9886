"""In which state is this worker, how far is its model loaded, and who must hear of a change?"""

from typing import Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import LoadingFrame
from arriero.contracts.records import WorkerExit
from arriero.contracts.states import WorkerState
from arriero.domain.worker_states import READY, WORKERS
from arriero.engines.base import LoadProgress, LoadReady
from arriero.runtime import logs
from arriero.runtime.clock import Clock
from arriero.runtime.tasks import Changed

#: Stage of the last frame of a load that succeeded.
STAGE_READY: Final = "ready"


class Lifecycle:
    """The worker's one state.  `changed` wakes whoever watches, at each change of anything here."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._log = logs.get("arriero.worker")
        self.state = WORKERS.initial
        self.changed = Changed()
        self.loading = LoadingFrame(
            stage="starting", fraction=0.0, layers_loaded=0, layers_total=0, memory_mb=0
        )
        #: Context of one slot in tokens; 0 until the model is loaded.
        self.context_tokens = 0
        #: Why the worker failed; None unless the state is FAILED.
        self.failure: ArrieroError | None = None
        #: How the process will have ended; None until that is known.
        self.exit: WorkerExit | None = None
        self.idle_since_s = clock.monotonic_s()

    @property
    def is_final(self) -> bool:
        """Whether nothing comes after this state."""
        return self.state in WORKERS.final

    @property
    def is_loaded(self) -> bool:
        """Whether the model was loaded, whatever came after."""
        return self.loading.stage == STAGE_READY

    def go(self, state: WorkerState, **why: object) -> None:
        """Take an arrow of the table.  Raises INVALID_STATE_TRANSITION if there is none."""
        WORKERS.check(self.state, state)
        before, self.state = self.state, state
        if state is WorkerState.IDLE:
            self.idle_since_s = self._clock.monotonic_s()
        # Between idle and busy a worker goes with each request: no line a request.
        if not {before, state} <= READY:
            self._log.info("state", before=str(before), state=str(state), **why)
        self.changed.notify()

    def settle(self, busy: int) -> None:
        """Take the number of slots that compute: idle with none of them, busy with any."""
        if self.state is WorkerState.IDLE and busy:
            self.go(WorkerState.BUSY)
        elif self.state is WorkerState.BUSY and not busy:
            self.go(WorkerState.IDLE)
        else:
            self.changed.notify()

    def loaded_so_far(self, event: LoadProgress | LoadReady) -> None:
        """Take a step of loading; the fraction never falls.  `LoadReady` leads to idle."""
        if isinstance(event, LoadProgress):
            self.loading = LoadingFrame(
                stage=event.stage if event.stage != STAGE_READY else "loading",
                fraction=min(1.0, max(self.loading.fraction, event.fraction)),
                layers_loaded=event.layers_loaded,
                layers_total=event.layers_total,
                memory_mb=event.memory_mb,
            )
            self.changed.notify()
            return
        self.context_tokens = event.context_tokens
        self.loading = msgspec.structs.replace(
            self.loading,
            stage=STAGE_READY,
            fraction=1.0,
            layers_loaded=self.loading.layers_total,
            memory_mb=event.memory_mb or self.loading.memory_mb,
        )
        if self.state is WorkerState.LOADING:  # Else the wish to end was quicker.
            self.go(WorkerState.IDLE, context_tokens=event.context_tokens, memory_mb=event.memory_mb)

    def idle_s(self) -> float:
        """Return for how many seconds nothing was computed; 0 while something is."""
        if self.state is not WorkerState.IDLE:
            return 0.0
        return self._clock.monotonic_s() - self.idle_since_s

    def check_takes_requests(self) -> None:
        """Raise what a new request is told unless the worker is idle or busy.

        MODEL_LOADING while it loads, NO_READY_WORKERS when it ends, the failure when it failed.
        """
        if self.state in READY:
            return
        if self.state in (WorkerState.STARTING, WorkerState.LOADING):
            raise ArrieroError(
                ErrorCode.MODEL_LOADING,
                f"the model is still loading: {self.loading.fraction:.0%}",
                state=str(self.state),
                fraction=self.loading.fraction,
            )
        if self.failure is not None:
            raise self.failure
        raise ArrieroError(
            ErrorCode.NO_READY_WORKERS,
            f"the worker is {self.state} and takes no new request",
            state=str(self.state),
        )
