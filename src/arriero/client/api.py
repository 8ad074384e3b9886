"""What can be asked of orchestrator, agent and worker?  The sync, typed client.

Every call raises `ArrieroError`: the daemon's own code from its envelope, or one of the chosen
`FailureCodes` where it cannot be reached, answers with nothing in time, or with no 2xx.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote, urlencode

import msgspec

from arriero.client import stream as streams
from arriero.client.caller import STREAM_SILENCE_S, Caller, RawAnswer
from arriero.client.connection import FailureCodes
from arriero.client.engines_api import EngineCalls
from arriero.client.models_api import ModelCalls
from arriero.client.nodes_api import NodeCalls
from arriero.client.stream import EventStream, InferenceFrame
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import DownloadFrame, InferenceAnswer, LoadingFrame, TaskEvent
from arriero.contracts.placements import PlacementExplained
from arriero.contracts.records import (
    Capabilities,
    DownloadList,
    DownloadRecord,
    Health,
    ModelList,
    ModelRecord,
    TaskRecord,
    WorkerHealth,
    WorkerList,
    WorkerReady,
    WorkerRecord,
)
from arriero.contracts.requests import DownloadBody, InferenceBody, ShutdownBody, SpawnBody, TaskBody

__all__ = [
    "DEADLINE_HEADER",
    "REQUEST_ID_HEADER",
    "STREAM_SILENCE_S",
    "Agent",
    "Caller",
    "DownloadStarted",
    "OpenAiModel",
    "OpenAiModelList",
    "Orchestrator",
    "RawAnswer",
    "Worker",
    "download_frames",
    "inference_frames",
    "loading_frames",
    "task_events",
]

REQUEST_ID_HEADER: Final = "X-Request-Id"
DEADLINE_HEADER: Final = "X-Request-Deadline"


class DownloadStarted(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /v1/models/download` of an agent, `POST /v1/downloads` of the orchestrator: 202."""

    download_id: str
    progress_url: str
    #: With this whoever asked leaves the download again; the last one to leave cancels it.
    holder: str = ""
    node: str = ""


class OpenAiModel(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the orchestrator's `GET /v1/models`."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = ""


class OpenAiModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The orchestrator's `GET /v1/models`, in OpenAI's shape."""

    data: list[OpenAiModel]
    object: str = "list"


class Orchestrator(NodeCalls):
    """The orchestrator's routes."""

    def health(self, *, timeout_s: float | None = None) -> Health:
        """Ask whether it lives."""
        return self.call("GET", "/health", Health, timeout_s=timeout_s)

    def workers(self) -> list[WorkerRecord]:
        """Return the workers of the pool; their `url` is a route of the orchestrator."""
        return self.call("GET", "/v1/workers", WorkerList).workers

    def worker(self, worker_id: str) -> WorkerRecord:
        """Return one worker.  Raises WORKER_NOT_FOUND."""
        return self.call("GET", f"/v1/workers/{quote(worker_id, safe='')}", WorkerRecord)

    def spawn(
        self, body: SpawnBody, *, node: str | None = None, timeout_s: float | None = None
    ) -> WorkerRecord:
        """Start a worker on a node; it comes back `starting`."""
        content = msgspec.to_builtins(body) | ({"node": node} if node else {})
        return self.call("POST", "/v1/workers", WorkerRecord, body=content, timeout_s=timeout_s)

    def stop_worker(self, worker_id: str, *, timeout_s: float | None = None) -> None:
        """Stop a worker gracefully.  Raises WORKER_NOT_FOUND."""
        self.send("DELETE", f"/v1/workers/{quote(worker_id, safe='')}", timeout_s=timeout_s)

    def explain(self, body: TaskBody) -> PlacementExplained:
        """Return where a request would go now, and why nowhere else."""
        return self.call("POST", "/v1/placements:explain", PlacementExplained, body=_without_defaults(body))

    def downloads(self) -> list[DownloadRecord]:
        """Return the downloads of the pool, running and ended."""
        return self.call("GET", "/v1/downloads", DownloadList).downloads

    def start_download(self, body: DownloadBody) -> DownloadStarted:
        """Have a node begin to fetch a model, or join the download that does."""
        return self.call("POST", "/v1/downloads", DownloadStarted, body=body)

    def leave_download(
        self, download_id: str, holder: str | None = None, *, timeout_s: float | None = None
    ) -> DownloadRecord:
        """Leave a download; the last one to leave cancels it.  Safe to call twice with a `holder`."""
        path = f"/v1/downloads/{quote(download_id, safe='')}"
        query = f"?holder={quote(holder, safe='')}" if holder else ""
        return self.call("DELETE", path + query, DownloadRecord, timeout_s=timeout_s)

    def download_progress(
        self, download_id: str, *, last_event_id: str = "", codes: FailureCodes = streams.SSE_CODES,
        **limits: Any,
    ) -> EventStream:  # fmt: skip
        """Follow a download (decode with `download_frames`), from behind `last_event_id` on."""
        path = f"/v1/downloads/{quote(download_id, safe='')}/progress"
        headers = {"Last-Event-ID": last_event_id} if last_event_id else None
        return self.stream("GET", path, codes=codes, headers=headers, **limits)

    def models(self) -> list[OpenAiModel]:
        """Return the models that can be asked for at once."""
        return self.call("GET", "/v1/models", OpenAiModelList).data

    def start_task(self, body: TaskBody, *, headers: Mapping[str, str] | None = None) -> TaskRecord:
        """Hand in a task to be collected later."""
        return self.call("POST", "/v1/tasks", TaskRecord, body=_without_defaults(body), headers=headers)

    def task(self, task_id: str) -> TaskRecord:
        """Return a task.  Raises NOT_FOUND."""
        return self.call("GET", f"/v1/tasks/{quote(task_id, safe='')}", TaskRecord)

    def cancel_task(self, task_id: str, *, timeout_s: float | None = None) -> None:
        """Cancel a task; nothing happens to one that is over."""
        self.send("DELETE", f"/v1/tasks/{quote(task_id, safe='')}", timeout_s=timeout_s)

    def run_task(
        self, body: TaskBody, *, request_id: str = "", remaining_ms: float | None = None,
        total_s: float | None = None, silence_s: float = STREAM_SILENCE_S,
        codes: FailureCodes = streams.TASK_CODES,
    ) -> EventStream:  # fmt: skip
        """Run a task and return its events (decode them with `task_events`); closing cancels it.

        `remaining_ms` goes out as the deadline; `total_s` is our own limit and should be larger.
        """
        headers = {REQUEST_ID_HEADER: request_id} if request_id else {}
        if remaining_ms is not None:
            headers[DEADLINE_HEADER] = f"{remaining_ms:.0f}"
        return self.stream(
            "POST", "/v1/tasks",
            body=_without_defaults(body), headers=headers, codes=codes, silence_s=silence_s, total_s=total_s,
        )  # fmt: skip

    def worker_log(self, worker_id: str, *, follow: bool) -> Iterator[bytes]:
        """Yield a worker's log as it comes."""
        return self.lines(f"/v1/workers/{quote(worker_id, safe='')}/logs" + ("?follow=1" if follow else ""))

    def node_agent(self, node: str) -> "Agent":
        """Return a client of a node's agent, wherever it lives: for its models and engines alone."""
        return Agent(f"{self.url}/v1/nodes/{quote(node, safe='')}/proxy", self._target.token)

    def worker_client(self, record: WorkerRecord, **options: Any) -> "Worker":
        """Return a client of a worker, through the orchestrator."""
        return Worker(record.url, self._target.token, **options)


class Agent(ModelCalls, EngineCalls):
    """The agent's routes."""

    def health(self, *, timeout_s: float | None = None) -> Health:
        """Ask whether it lives."""
        return self.call("GET", "/v1/health", Health, timeout_s=timeout_s)

    def capabilities(self) -> Capabilities:
        """Return what the machine has."""
        return self.call("GET", "/v1/capabilities", Capabilities)

    def workers(self) -> list[WorkerRecord]:
        """Return the machine's workers."""
        return self.call("GET", "/v1/workers", WorkerList).workers

    def worker(self, worker_id: str) -> WorkerRecord:
        """Return one worker.  Raises WORKER_NOT_FOUND."""
        return self.call("GET", f"/v1/workers/{quote(worker_id, safe='')}", WorkerRecord)

    def spawn(self, body: SpawnBody, *, timeout_s: float | None = None) -> WorkerRecord:
        """Start a worker; it comes back `starting`."""
        return self.call("POST", "/v1/workers", WorkerRecord, body=body, timeout_s=timeout_s)

    def stop_worker(self, worker_id: str, *, timeout_s: float | None = None) -> None:
        """Stop a worker gracefully.  Raises WORKER_NOT_FOUND."""
        self.send("DELETE", f"/v1/workers/{quote(worker_id, safe='')}", timeout_s=timeout_s)

    def shut_down(self, *, workers: bool = True, timeout_s: float | None = None) -> None:
        """Have it end, with its workers or without; returns as soon as it has begun."""
        self.send("POST", "/v1/admin/shutdown", body=ShutdownBody(workers=workers), timeout_s=timeout_s)

    def models(self) -> list[ModelRecord]:
        """Return the machine's catalog."""
        return self.catalog().models

    def catalog(self) -> ModelList:
        """Return the machine's catalog, with what was put right in it at start."""
        return self.call("GET", "/v1/models", ModelList)

    def model_of(self, model_ref: str) -> ModelRecord:
        """Return the model of a reference.  Raises MODEL_NOT_FOUND."""
        for record in self.models():
            if record.model_ref == model_ref:
                return record
        raise ArrieroError(ErrorCode.MODEL_NOT_FOUND, f"the catalog has no model {model_ref[:200]!r}")

    def remove_model(self, model_id: str) -> None:
        """Remove a model from the catalog, and its files where they are ours."""
        self.send("DELETE", f"/v1/models/{quote(model_id, safe='')}")

    def verify_model(self, model_id: str, *, timeout_s: float | None = None) -> ModelRecord:
        """Read a model's files again and compare.  Raises MODEL_CORRUPTED."""
        path = f"/v1/models/{quote(model_id, safe='')}/verify"
        return self.call("POST", path, ModelRecord, timeout_s=timeout_s)

    def downloads(self) -> list[DownloadRecord]:
        """Return the machine's downloads, running and ended."""
        return self.call("GET", "/v1/downloads", DownloadList).downloads

    def start_download(self, model_ref: str) -> DownloadStarted:
        """Begin to fetch a model."""
        return self.call(
            "POST", "/v1/models/download", DownloadStarted, body=DownloadBody(model_ref=model_ref)
        )

    def download_progress(
        self, download_id: str, *, codes: FailureCodes = streams.SSE_CODES, **limits: Any
    ) -> EventStream:
        """Follow a download (decode with `download_frames`)."""
        path = "/v1/models/download/progress?" + urlencode({"download_id": download_id})
        return self.stream("GET", path, codes=codes, **limits)

    def worker_log(self, worker_id: str, *, follow: bool) -> Iterator[bytes]:
        """Yield a worker's log as it comes."""
        return self.lines(f"/v1/workers/{quote(worker_id, safe='')}/logs" + ("?follow=1" if follow else ""))


class Worker(Caller):
    """A worker's own routes, on loopback or through the orchestrator's proxy route."""

    def health(self, *, timeout_s: float | None = None, codes: FailureCodes | None = None) -> WorkerHealth:
        """Ask how it is."""
        return self.call("GET", "/v1/health", WorkerHealth, timeout_s=timeout_s, codes=codes)

    def ready(self, *, timeout_s: float | None = None, codes: FailureCodes | None = None) -> WorkerReady:
        """Ask whether it takes requests."""
        return self.call("GET", "/v1/ready", WorkerReady, timeout_s=timeout_s, codes=codes)

    def progress(self, *, codes: FailureCodes = streams.PROGRESS_CODES, **limits: Any) -> EventStream:
        """Follow its loading (decode with `loading_frames`)."""
        return self.stream("GET", "/v1/progress", codes=codes, **limits)

    def infer(self, body: InferenceBody, *, timeout_s: float | None = None) -> InferenceAnswer:
        """Run a request and return the whole answer."""
        return self.call(
            "POST", "/v1/inference", InferenceAnswer, body=_without_defaults(body), timeout_s=timeout_s
        )

    def infer_stream(
        self, body: InferenceBody, *, request_id: str = "", remaining_ms: float | None = None,
        codes: FailureCodes = streams.TOKEN_CODES, **limits: Any,
    ) -> EventStream:  # fmt: skip
        """Run a request and return its frames (decode with `inference_frames`); closing cancels it."""
        headers = {REQUEST_ID_HEADER: request_id} if request_id else {}
        if remaining_ms is not None:
            headers[DEADLINE_HEADER] = f"{remaining_ms:.0f}"
        return self.stream(
            "POST",
            "/v1/inference/stream",
            body=_without_defaults(body),
            headers=headers,
            codes=codes,
            **limits,
        )

    def cancel(self, request_id: str) -> None:
        """Cancel a request by its id; also the second time."""
        self.send("DELETE", f"/v1/inference/{quote(request_id, safe='')}")


def task_events(stream: EventStream) -> Iterator[TaskEvent]:
    """Yield the events of a task's stream; a failure is the event `TaskFailed`."""
    for event in stream:
        decoded = streams.task_event(event)
        if decoded is not None:
            yield decoded


def inference_frames(stream: EventStream) -> Iterator[InferenceFrame]:
    """Yield the frames of a worker's token stream.  Raises the error of an error event."""
    for event in stream:
        frame = streams.inference_frame(event)
        if frame is not None:
            yield frame


def loading_frames(stream: EventStream) -> Iterator[LoadingFrame]:
    """Yield the frames of a worker's loading.  Raises the error of an error event."""
    for event in stream:
        frame = streams.loading_frame(event)
        if frame is not None:
            yield frame


def download_frames(stream: EventStream) -> Iterator[DownloadFrame]:
    """Yield the frames of a download.  Raises the error of an error event."""
    for event in stream:
        frame = streams.download_frame(event)
        if frame is not None:
            yield frame


def _without_defaults(body: InferenceBody) -> dict[str, Any]:
    """Return only what was asked for: the server's defaults stay its own."""
    given = msgspec.to_builtins(body)
    return {
        name: value for name, value in given.items() if value is not None and not _is_default(name, value)
    }


def _is_default(name: str, value: object) -> bool:
    defaults = {"ignore_eos": False, "queue": True, "labels": {}}
    return name in defaults and value == defaults[name]
