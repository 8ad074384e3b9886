"""The process that computes: llama.cpp's own server on a unix socket, and nothing else.

    python -m arriero.engines.llamacpp_child

reads one JSON line from stdin (`{"params": {…}, "env": {…}}`), serves until stdin ends or a line
`cmd_router_to_child:exit` comes, and never outlives the process that started it.  stdout carries
llama.cpp's progress lines, stderr its log.  Imports stay few: this runs once a model, and a person
waits for it.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
from typing import Any

_PR_SET_PDEATHSIG = 1
_SPEC_BYTES_MAX = 1 << 20
EXIT_BAD_SPEC = 64
EXIT_ORPHANED = 65
EXIT_ENGINE_REFUSED = 66


def main() -> None:
    """Read the specification, serve, and end when the owner ends."""
    _die_with_parent(os.getppid())
    line = _read_line(0)
    try:
        spec = json.loads(line)
        params, environment = spec["params"], spec.get("env", {})
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"bad specification: {error!r}")
    os.environ.update(environment)
    try:
        # After the environment: the library reads some of it when it is loaded.
        import xllamacpp

        server = xllamacpp.Server(_common_params(xllamacpp, params))
    except Exception as error:  # noqa: BLE001  The message is all that the owner gets to see.
        print(f"engine refused: {error}", file=sys.stderr, flush=True)
        os._exit(EXIT_ENGINE_REFUSED)
    del server
    threading.Event().wait()


if __name__ == "__main__":
    main()
