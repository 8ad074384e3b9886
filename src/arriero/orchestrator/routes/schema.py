"""How are the orchestrator's routes described?  (`GET /openapi.json`)

The framework describes its own; what is answered below it is added here.
"""

from typing import Any, Final

import msgspec
from litestar import Litestar

from arriero.contracts.requests import TaskBody

_STREAMS: Final[dict[str, dict[str, str]]] = {
    "/v1/chat/completions": {"post": "OpenAI: chat completion, whole or streamed."},
    "/v1/completions": {"post": "OpenAI: completion, whole or streamed."},
    "/v1/embeddings": {"post": "OpenAI: embeddings."},
    "/v1/tasks": {"post": "Accept a task: 202, or its events with Accept: text/event-stream."},
    "/v1/tasks/{task_id}/events": {"get": "The events of a task; Last-Event-ID goes on after one."},
    "/v1/events": {
        "get": "The live feed: a snapshot, then nodes, workers, downloads and tasks as they change."
    },
    "/v1/workers/{worker_id}/logs": {"get": "A worker's log; follow=1 keeps on."},
    "/v1/workers/{worker_id}/proxy/{path}": {
        "get": "Any route of a worker.",
        "post": "Any route of a worker.",
        "delete": "Any route of a worker.",
    },
    "/v1/downloads/progress": {"get": "Progress of the download given by download_id."},
    "/v1/downloads/{download_id}/progress": {"get": "Progress of a download."},
}


def document(app: Litestar) -> bytes:
    """Return the OpenAPI description as JSON."""
    schema: dict[str, Any] = app.openapi_schema.to_schema()
    (task_schema,), components = msgspec.json.schema_components(
        [TaskBody], ref_template="#/components/schemas/{name}"
    )
    schema.setdefault("components", {}).setdefault("schemas", {}).update(components)
    for path, methods in _STREAMS.items():
        row = schema["paths"].setdefault(path, {})
        for method, summary in methods.items():
            row[method] = _operation(path, method, summary, task_schema)
    return msgspec.json.encode(schema)


def _operation(path: str, method: str, summary: str, task_schema: dict[str, Any]) -> dict[str, Any]:
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": method + path.replace("/", "_").replace("{", "").replace("}", ""),
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ],
        "responses": {"default": {"description": "See docs/reference/http.md."}},
    }
    if method == "post":
        schema = task_schema if path == "/v1/tasks" else {"type": "object"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation
