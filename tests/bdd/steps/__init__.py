"""The steps of the behaviour suite.

Each of these functions takes a `World` and what its name says it needs, does it for real, and sets
`last_exit_code` and, on failure, `last_error`.
"""

from tests.bdd.steps.deadlines import then_timeout_cascades
from tests.bdd.steps.downloads import then_download_progress_stream, then_retries_with_exponential_backoff
from tests.bdd.steps.exhaustion import then_worker_detects_oom, when_disk_exhausted, when_ram_exhausted
from tests.bdd.steps.health import given_worker_is_healthy
from tests.bdd.steps.loading import then_stream_loading_progress
from tests.bdd.steps.models import (
    then_register_model_in_catalog,
    when_initiate_download,
    when_query_model_catalog,
)
from tests.bdd.steps.starting import (
    given_worker_http_started,
    given_worker_ready_idle,
    given_worker_sent_callback,
    then_register_worker,
    when_spawn_worker_process,
)
from tests.bdd.steps.states import then_worker_transitions, then_worker_transitions_to_state
from tests.bdd.steps.tokens import then_inference_completes_with_tokens, then_stream_tokens

__all__ = [
    "given_worker_http_started",
    "given_worker_is_healthy",
    "given_worker_ready_idle",
    "given_worker_sent_callback",
    "then_download_progress_stream",
    "then_inference_completes_with_tokens",
    "then_register_model_in_catalog",
    "then_register_worker",
    "then_retries_with_exponential_backoff",
    "then_stream_loading_progress",
    "then_stream_tokens",
    "then_timeout_cascades",
    "then_worker_detects_oom",
    "then_worker_transitions",
    "then_worker_transitions_to_state",
    "when_disk_exhausted",
    "when_initiate_download",
    "when_query_model_catalog",
    "when_ram_exhausted",
    "when_spawn_worker_process",
]
