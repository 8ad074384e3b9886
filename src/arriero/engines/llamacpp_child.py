"""The process that computes: llama.cpp's own server on a unix socket, and nothing else.

    python -m arriero.engines.llamacpp_child

reads one JSON line from stdin, serves until stdin ends, and never outlives the process that
started it.  stdout carries llama.cpp's progress lines, stderr its log.  Imports stay few: this
runs once a model, and a person waits for it.

The line: `{"owner_pid": 1, "gpu": false, "folder": "", "params": {…}}`; `folder` holds the build of
the engine to use (empty: the environment's own), `params` are attributes of xllamacpp's
`CommonParams`, a dot steps into a part; `{"enum": "kind.NAME"}` and `{"set": […]}` are what JSON has not.
"""

import json
import os
import sys
import threading
from typing import Any

from arriero.runtime.parent_death import die_with

SPEC_BYTES_MAX = 1 << 20
EXIT_BAD_SPEC = 64
EXIT_ORPHANED = 65
EXIT_REFUSED = 66
EXIT_NO_DEVICE = 67


def main() -> None:
    """Read the specification, serve, and end when the owner ends."""
    try:
        spec = json.loads(_first_line(sys.stdin.fileno()))
        params, owner_pid, needs_gpu = spec["params"], spec["owner_pid"], spec["gpu"]
        folder = spec.get("folder", "")
    except (ValueError, KeyError, TypeError) as error:
        _end(EXIT_BAD_SPEC, f"bad specification: {error!r}")
    if not die_with(owner_pid):
        _end(EXIT_ORPHANED, "the owner is gone")
    if folder:
        sys.path.insert(0, folder)
    try:
        import xllamacpp
    except ImportError as error:
        _end(EXIT_REFUSED, f"xllamacpp cannot be imported: {error}")
    if needs_gpu and not _has_gpu(xllamacpp):
        _end(EXIT_NO_DEVICE, "this build of the engine sees no accelerator")
    try:
        server = xllamacpp.Server(_common_params(xllamacpp, params))
    except Exception as error:  # noqa: BLE001  Whatever it is: its text is what the owner needs.
        _end(EXIT_REFUSED, f"engine refused: {error}")
    # The engine serves in threads of its own, and one of them ends the process with stdin.
    threading.Event().wait()
    del server


def _first_line(descriptor: int) -> bytes:
    """Read up to the first newline and no byte more: the rest of stdin belongs to the engine."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte or len(line) >= SPEC_BYTES_MAX:
            raise ValueError("stdin ended, or its line is too long")
        line += byte
    return bytes(line)


def _has_gpu(xllamacpp: Any) -> bool:
    kinds = xllamacpp.ggml_backend_dev_type
    processor = kinds.GGML_BACKEND_DEVICE_TYPE_CPU
    return any(device["type"] != processor for device in xllamacpp.get_device_info())


def _common_params(xllamacpp: Any, values: dict[str, Any]) -> Any:
    params = xllamacpp.CommonParams()
    for path, value in values.items():
        *parts, name = path.split(".")
        target = params
        for part in parts:
            target = getattr(target, part)
        if not hasattr(target, name):
            raise AttributeError(f"this xllamacpp has no parameter {path}")
        if isinstance(value, dict) and "set" in value:
            value = set(value["set"])
        elif isinstance(value, dict):
            enumeration, _, member = value["enum"].partition(".")
            value = getattr(getattr(xllamacpp, enumeration), member)
        setattr(target, name, value)
    return params


def _end(code: int, message: str) -> Any:
    print(message, file=sys.stderr, flush=True)  # noqa: T201  stderr is the log.
    os._exit(code)


if __name__ == "__main__":
    main()
