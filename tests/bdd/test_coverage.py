"""Does every step that can fail have a scenario for each way it can end?

The table says how each of the named steps can end; the scenarios are read for who ends how.  A
judging line (`it succeeds`, `it fails with …`) speaks of the last named step before it.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pytest_bdd.feature import get_features
from pytest_bdd.steps import StepFunctionContext, step_function_context_registry

from arriero.contracts.errors import KINDS, ErrorCode
from tests.bdd import steps

FEATURES = Path(__file__).with_name("features")
FAILS = re.compile(r"it fails with exit code (\d+) and (\w+)")
OK = "OK"
DOWNLOAD = {
    "MODEL_NOT_FOUND",
    "MODEL_ACCESS_DENIED",
    "MODEL_CORRUPTED",
    "INVALID_MODEL_PATH",
    "DOWNLOAD_FAILED",
}
COMING_UP = {OK, "NO_READY_WORKERS", "WORKER_START_FAILED", "WORKER_READY_TIMEOUT"}
WATCHED = {OK, "NO_WORKERS", "UNKNOWN_WORKER_STATE", "WORKER_STATE_MISMATCH", "INVALID_STATE_TRANSITION"}
TOKENS = {
    OK, "NO_WORKERS", "TOKEN_STREAM_FAILED", "TOKEN_STREAM_ERROR", "TOKEN_COUNT_MISMATCH", "TOKEN_STREAM_TIMEOUT",
}  # fmt: skip
ENDS: dict[str, set[str]] = {
    "then_download_progress_stream": {
        OK, "SSE_CONNECTION_FAILED", "SSE_CONNECTION_ERROR", "SSE_CONNECTION_TIMEOUT", "DOWNLOAD_TIMEOUT", *DOWNLOAD,
    },
    "then_stream_loading_progress": {
        OK, "NO_WORKERS", "PROGRESS_STREAM_FAILED", "PROGRESS_STREAM_ERROR", "PROGRESS_STREAM_TIMEOUT",
    },
    "then_stream_tokens": TOKENS,
    "given_worker_is_healthy": {OK, "NO_WORKERS", "WORKER_UNHEALTHY", "HEALTH_CHECK_ERROR"},
    "then_inference_completes_with_tokens": TOKENS,
    "then_worker_transitions_to_state": WATCHED,
    "then_worker_transitions": WATCHED,
    "when_spawn_worker_process": COMING_UP | {
        "WORKER_BINARY_NOT_FOUND", "NODE_UNREACHABLE", "MODEL_NOT_FOUND", "INVALID_MODEL_PATH",
        "INVALID_MODEL_REFERENCE", "INSUFFICIENT_RAM",
    },
    "given_worker_http_started": COMING_UP,
    "given_worker_sent_callback": COMING_UP,
    "then_register_worker": COMING_UP,
    "given_worker_ready_idle": COMING_UP | {"LOADING_TIMEOUT"},
    "when_query_model_catalog": {
        OK, "MODEL_NOT_FOUND", "INVALID_MODEL_REFERENCE", "NOT_RUNNING", "NODE_UNREACHABLE", "REQUEST_TIMEOUT",
    },
    "then_register_model_in_catalog": {OK, "INVALID_MODEL_PATH", "MODEL_CORRUPTED"},
    "when_initiate_download": {
        OK, "MODEL_NOT_FOUND", "MODEL_ACCESS_DENIED", "INVALID_MODEL_REFERENCE", "INVALID_MODEL_PATH", "DOWNLOAD_FAILED",
    },
    "then_retries_with_exponential_backoff": {OK, "DOWNLOAD_FAILED", "DOWNLOAD_TIMEOUT"},
    "then_timeout_cascades": {OK, "REQUEST_TIMEOUT"},
    "when_ram_exhausted": {OK, "OUT_OF_MEMORY"},
    "then_worker_detects_oom": {OK, "OUT_OF_MEMORY", "WORKER_LOST"},
    "when_disk_exhausted": {OK, "INSUFFICIENT_DISK"},
}  # fmt: skip


def named_step(text: str) -> str | None:
    """Return the name of the step function that a line calls, where it is one of the table."""
    for context in step_function_context_registry.values():
        name = context.step_func.__name__
        if name in ENDS and context.parser.is_matching(text):
            return name
    return None


def ends_seen() -> Iterator[tuple[str, str, int]]:
    """Yield who ends how in the scenarios: step function, code (or OK), exit code."""
    for feature in get_features([str(FEATURES)]):
        for template in feature.scenarios.values():
            rows: list[dict[str, Any]] = [
                dict(row) for e in template.examples for row in e.as_contexts()
            ] or [{}]
            for row in rows:
                last: str | None = None
                for step in template.render(row).steps:
                    last = named_step(step.name) or last
                    failure = FAILS.fullmatch(step.name)
                    if last is not None and failure:
                        yield last, failure[2], int(failure[1])
                    elif last is not None and step.name == "it succeeds":
                        yield last, OK, 0


def test_each_named_step_is_there() -> None:
    assert set(steps.__all__) == set(ENDS)
    contexts: set[Callable[..., Any]] = {c.step_func for c in _contexts()}
    assert all(getattr(steps, name) in contexts for name in ENDS), "each is bound to a line of the features"


@pytest.mark.parametrize("name", sorted(ENDS))
def test_each_way_to_end_has_a_scenario(name: str) -> None:
    seen = {code for who, code, _ in ends_seen() if who == name}
    assert seen == ENDS[name]


def test_exit_codes_are_those_of_the_registry() -> None:
    wrong = [
        (who, code, exit_code)
        for who, code, exit_code in ends_seen()
        # A worker that was killed by hand is told with 1; the registry's row is the same.
        if code != OK and KINDS[ErrorCode(code)].exit_code != exit_code
    ]
    assert wrong == []


def _contexts() -> list[StepFunctionContext]:
    return list(step_function_context_registry.values())
