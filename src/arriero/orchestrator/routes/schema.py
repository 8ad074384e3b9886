"""How are the orchestrator's routes described?  (`GET /openapi.json`)

The framework describes its own; what is answered below it is added here.
"""

from typing import Any, Final

import msgspec
from litestar import Litestar

from arriero.contracts.requests import Place, TaskBody
from arriero.orchestrator.routes.streams import RELAYED, STREAM_ROUTES

#: Methods that a route for any method is described with.
_ANY: Final = ("get", "post", "delete")


def document(app: Litestar) -> bytes:
    """Return the OpenAPI description as JSON."""
    schema: dict[str, Any] = app.openapi_schema.to_schema()
    (task_schema, place_schema), components = msgspec.json.schema_components(
        [TaskBody, Place], ref_template="#/components/schemas/{name}"
    )
    schema.setdefault("components", {}).setdefault("schemas", {}).update(components)
    relayed = {"type": "object", "properties": {"arriero": place_schema}}
    bodies = {"/v1/tasks": task_schema, **dict.fromkeys(RELAYED, relayed)}
    for path, methods, summary in STREAM_ROUTES:
        row = schema["paths"].setdefault(path, {})
        for method in _ANY if methods == "ANY" else (methods.lower(),):
            row[method] = _operation(path, method, summary, bodies.get(path, {"type": "object"}))
    return msgspec.json.encode(schema)


def _operation(path: str, method: str, summary: str, body: dict[str, Any]) -> dict[str, Any]:
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
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation
