"""Which probes are there, and what does each take?  `arriero probe` is made from this table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from arriero.contracts.errors import ErrorCode as C
from arriero.probes import (
    download_progress,
    loading_progress,
    models,
    tokens,
    worker_health,
    worker_start,
    worker_state,
)
from arriero.probes.result import ProbeResult
from arriero.probes.where import Where


@dataclass(frozen=True, slots=True)
class Option:
    """One option of one probe, besides --url, --agent, --timeout and --json that are the same for most."""

    flag: str
    #: Name of the function's parameter.
    name: str
    help: str
    kind: type = str
    default: Any = None
    is_required: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """One row."""

    name: str
    help: str
    ask: Callable[..., ProbeResult]
    timeout_s: float
    #: How it may end besides well.
    codes: tuple[C, ...]
    options: tuple[Option, ...] = ()
    #: Takes an address as its argument, and no look-up.
    is_of_url: bool = False
    has_worker: bool = False
    #: What --url replaces; empty: there is no look-up.
    url_replaces: str = "the look-up of the worker"
    #: The agent is asked in any case, so that there is no --agent.
    is_of_agent: bool = False
    #: Takes `tell`, a function that is told what happens meanwhile.
    is_telling: bool = False


_MODEL: Final = Option("--model", "model", "Model reference.", is_required=True)
_UNTIL: Final = Option(
    "--until", "until", "Stage to watch for.", default="registered", choices=worker_start.STAGES
)


def _worker_state(where: Where, *, timeout_s: float, watch: bool, **options: Any) -> ProbeResult:
    return worker_state.worker_state(where, is_watching=watch, timeout_s=timeout_s, **options)


_ROWS: Final = (
    Probe(
        download_progress.NAME,
        "Read a download's progress stream until it is complete.",
        download_progress.download_progress,
        download_progress.CONNECT_S,
        (
            C.SSE_CONNECTION_FAILED,
            C.SSE_CONNECTION_ERROR,
            C.SSE_CONNECTION_TIMEOUT,
            C.DOWNLOAD_FAILED,
            C.DOWNLOAD_TIMEOUT,
            C.MODEL_NOT_FOUND,
            C.MODEL_ACCESS_DENIED,
            C.MODEL_CORRUPTED,
            C.INSUFFICIENT_DISK,
            C.INVALID_MODEL_PATH,
        ),
        (
            Option("--events", "events", "Enough after so many events.", int),
            Option(
                "--silence",
                "silence_s",
                "Limit without an event, seconds.",
                float,
                download_progress.SILENCE_S,
            ),
        ),
        is_of_url=True,
        is_telling=True,
        url_replaces="",
    ),
    Probe(
        loading_progress.NAME,
        "Read a worker's loading until it is ready.",
        loading_progress.loading_progress,
        loading_progress.TIMEOUT_S,
        (
            C.NO_WORKERS,
            C.PROGRESS_STREAM_FAILED,
            C.PROGRESS_STREAM_ERROR,
            C.PROGRESS_STREAM_TIMEOUT,
        ),
        has_worker=True,
        is_telling=True,
    ),
    Probe(
        tokens.NAME,
        "Have a worker stream tokens, and count them.",
        tokens.tokens,
        tokens.TIMEOUT_S,
        (
            C.NO_WORKERS,
            C.TOKEN_STREAM_FAILED,
            C.TOKEN_STREAM_ERROR,
            C.TOKEN_COUNT_MISMATCH,
            C.TOKEN_STREAM_TIMEOUT,
        ),
        (
            Option("--prompt", "prompt", "What to ask.", is_required=True),
            Option("--expect-tokens", "expect_tokens", "So many tokens must come.", int),
            Option("--max-tokens", "max_tokens", "Ask for so many at most.", int),
        ),
        has_worker=True,
        is_telling=True,
    ),
    Probe(
        worker_health.NAME,
        "Ask a worker whether it is well.",
        worker_health.worker_health,
        worker_health.TIMEOUT_S,
        (
            C.NO_WORKERS,
            C.WORKER_UNHEALTHY,
            C.HEALTH_CHECK_ERROR,
        ),
        has_worker=True,
    ),
    Probe(
        worker_state.NAME,
        "Compare a worker's state in the registry with the expected one.",
        _worker_state,
        worker_state.TIMEOUT_S,
        (
            C.NO_WORKERS,
            C.UNKNOWN_WORKER_STATE,
            C.WORKER_STATE_MISMATCH,
            C.INVALID_STATE_TRANSITION,
        ),
        (
            Option("--expect", "expect", "State it should be in.", is_required=True),
            Option("--from", "start", "State it must be seen in first."),
            Option("--through", "through", "State it must be seen in on the way."),
            Option("--watch", "watch", "Give it until --timeout to come there.", bool, default=False),
        ),
        has_worker=True,
        url_replaces="the registry",
        is_telling=True,
    ),
    Probe(
        worker_start.SPAWN,
        "Start a worker and watch it come up; it stays.",
        worker_start.worker_spawn,
        worker_start.TIMEOUT_S,
        (
            C.WORKER_BINARY_NOT_FOUND,
            C.WORKER_START_FAILED,
            C.NO_READY_WORKERS,
            C.WORKER_READY_TIMEOUT,
            C.LOADING_TIMEOUT,
            C.OUT_OF_MEMORY,
            C.INSUFFICIENT_RAM,
            C.INSUFFICIENT_VRAM,
            C.MODEL_NOT_FOUND,
            C.MODEL_CORRUPTED,
            C.INVALID_MODEL_PATH,
            C.INVALID_MODEL_REFERENCE,
            C.BACKEND_UNAVAILABLE,
            C.DEVICE_NOT_FOUND,
            C.NODE_UNREACHABLE,
            C.NOT_RUNNING,
        ),
        (_MODEL, _UNTIL),
        url_replaces="the registry",
    ),
    Probe(
        worker_start.READY,
        "Watch a worker that was started come up.",
        worker_start.worker_ready,
        worker_start.TIMEOUT_S,
        (
            C.NO_READY_WORKERS,
            C.WORKER_START_FAILED,
            C.WORKER_READY_TIMEOUT,
            C.LOADING_TIMEOUT,
            C.MODEL_CORRUPTED,
            C.OUT_OF_MEMORY,
        ),
        (Option("--until", "until", "Stage to watch for.", default="idle", choices=worker_start.STAGES),),
        has_worker=True,
        url_replaces="the registry",
    ),
    Probe(
        models.CATALOG,
        "Ask the catalog of this machine's agent for a model.",
        models.catalog,
        models.TIMEOUT_S,
        (
            C.MODEL_NOT_FOUND,
            C.INVALID_MODEL_REFERENCE,
            C.NOT_RUNNING,
            C.NODE_UNREACHABLE,
            C.REQUEST_TIMEOUT,
        ),
        (_MODEL,),
        url_replaces="the agent of this machine",
        is_of_agent=True,
    ),
    Probe(
        models.REGISTERED,
        "Have this machine's agent read the files behind its catalog again, and compare them.",
        models.model_registered,
        models.VERIFY_S,
        (
            C.MODEL_NOT_FOUND,
            C.INVALID_MODEL_REFERENCE,
            C.INVALID_MODEL_PATH,
            C.MODEL_CORRUPTED,
            C.NOT_RUNNING,
            C.NODE_UNREACHABLE,
            C.REQUEST_TIMEOUT,
        ),
        (Option("--model", "model", "Only this model."),),
        url_replaces="the agent of this machine",
        is_of_agent=True,
    ),
    Probe(
        models.DOWNLOAD,
        "Have this machine's agent fetch a model, and see the download begin; it goes on.",
        models.download_start,
        models.TIMEOUT_S,
        (
            C.MODEL_NOT_FOUND,
            C.INVALID_MODEL_REFERENCE,
            C.INVALID_MODEL_PATH,
            C.DOWNLOAD_FAILED,
            C.DOWNLOAD_TIMEOUT,
            C.MODEL_ACCESS_DENIED,
            C.MODEL_CORRUPTED,
            C.INSUFFICIENT_DISK,
            C.NOT_RUNNING,
            C.NODE_UNREACHABLE,
            C.REQUEST_TIMEOUT,
        ),
        (_MODEL,),
        url_replaces="the agent of this machine",
        is_of_agent=True,
    ),
)
PROBES: Final[dict[str, Probe]] = {probe.name: probe for probe in _ROWS}
