"""Which part of arriero does this command line ask for?  Imports no more than that part needs."""

import contextlib
import os
import sys
from collections.abc import Sequence

_DAEMONS = frozenset({"orchestrator", "agent", "worker"})
_VERSION = frozenset({"version", "--version", "-V"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    first = given[0] if given else ""
    if first in _VERSION and set(given[1:]) <= {"--json"}:
        return _version(as_json="--json" in given)
    if first in _DAEMONS:
        from arriero.cli.commands import daemons

        return daemons.main(given)
    if first == "keep-agent":
        from arriero.cli import keeper

        return keeper.main()
    from arriero.cli.main import run

    code = run(given)
    if arguments is None:
        _leave(code)
    return code


def _leave(code: int) -> None:
    """End the process now: all is closed and flushed, and taking the interpreter apart costs 10 to 20 ms."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _version(*, as_json: bool) -> int:
    from arriero.contracts.version import API_VERSION, __version__

    text = f"arriero {__version__}"
    if as_json:
        python = ".".join(map(str, sys.version_info[:3]))
        text = f'{{"version": "{__version__}", "api_version": {API_VERSION}, "python": "{python}"}}'
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        sys.stdout = None  # Nothing is left to flush at the end.
    return 0


if __name__ == "__main__":
    sys.exit(main())
