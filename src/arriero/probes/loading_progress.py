"""Does a worker load its model, and does it tell how far it is?"""

from collections.abc import Callable
from typing import Any, Final

import msgspec

from arriero.client.api import loading_frames
from arriero.client.stream import PROGRESS_CODES
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.states import WorkerState
from arriero.probes.result import SHOWN_MAX, ProbeResult, ask, in_terms_of
from arriero.probes.where import Where, find_worker

NAME: Final = "loading-progress"
TIMEOUT_S: Final = 60.0


def loading_progress(
    where: Where, *, timeout_s: float = TIMEOUT_S, tell: Callable[[str], None] | None = None
) -> ProbeResult:
    """Read a worker's loading up to the stage `ready`, for `timeout_s` at most; `tell` hears of its steps."""

    def question(seen: dict[str, Any]) -> None:
        seen.update(events=0, frames=[])
        try:
            _read(where, timeout_s, seen, tell)
        except ArrieroError as error:
            raise in_terms_of(PROGRESS_CODES, error, also=(ErrorCode.NO_WORKERS,)) from error

    return ask(NAME, question)


def _read(where: Where, timeout_s: float, seen: dict[str, Any], tell: Callable[[str], None] | None) -> None:
    loading = (WorkerState.LOADING, WorkerState.STARTING)
    worker, record = find_worker(
        where, PROGRESS_CODES, prefer=loading, timeout_s=timeout_s, wait_started_s=timeout_s
    )
    seen["worker_id"] = record.worker_id if record else None
    highest = 0.0
    is_ready = False
    with worker.progress(connect_s=min(timeout_s, 10.0), silence_s=timeout_s, total_s=timeout_s) as stream:
        for frame in loading_frames(stream):
            seen["events"] += 1
            if len(seen["frames"]) < SHOWN_MAX:
                seen["frames"].append(msgspec.to_builtins(frame))
            if not 0.0 <= frame.fraction <= 1.0 or frame.fraction < highest:
                raise ArrieroError(
                    ErrorCode.PROGRESS_STREAM_ERROR,
                    f"the fraction went from {highest:g} to {frame.fraction:g}",
                    before=highest,
                    after=frame.fraction,
                )
            if tell is not None:
                tell(f"[probe] {frame.stage} {frame.fraction:.0%}")
            highest = frame.fraction
            is_ready = frame.stage == "ready"
    if not is_ready:
        raise ArrieroError(
            ErrorCode.PROGRESS_STREAM_ERROR,
            f"the stream ended after {seen['events']} events without the stage `ready`",
        )
