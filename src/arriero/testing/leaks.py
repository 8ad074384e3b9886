"""What did a pool leave behind?  Processes, listening sockets and files, known by its state folder.

    before = belongings(home)
    …
    assert left_behind(home, before) == []

Works for children of anybody: a process belongs to a pool when its environment says so.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

#: Zombies whose parent is pid 1 may take seconds to go.
PATIENCE_S: Final = 30.0
#: Files below `run/` that stay on purpose: the locks are held, not removed.
_STAYING: Final = frozenset({".lock"})


def processes(home: Path) -> list[psutil.Process]:
    """Return the living processes whose environment names `home` as their state folder."""
    wanted = str(home)
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("ARRIERO_HOME") == wanted:
                found.append(process)
        except psutil.Error:
            continue
    return found


def belongings(home: Path, *, socket_dirs: Path | None = None) -> frozenset[str]:
    """Return, as text, what a pool holds now: its processes, what they listen on, its run files.

    `socket_dirs`: the folder of its engines' sockets, where it has one of its own.
    """
    return frozenset(_belongings(home, socket_dirs))


def left_behind(
    home: Path,
    before: frozenset[str] = frozenset(),
    *,
    socket_dirs: Path | None = None,
    patience_s: float = PATIENCE_S,
) -> list[str]:
    """Return what a pool holds that it did not hold `before`; waits `patience_s` for it to go."""
    deadline = time.monotonic() + patience_s
    while True:
        left = belongings(home, socket_dirs=socket_dirs) - before
        if not left or time.monotonic() >= deadline:
            return sorted(left)
        time.sleep(0.05)


def _belongings(home: Path, socket_dirs: Path | None) -> Iterator[str]:
    for process in processes(home):
        try:
            yield f"process {process.pid} {' '.join(process.cmdline())[:160]}"
            for connection in process.net_connections("all"):
                if connection.status == psutil.CONN_LISTEN and connection.laddr:
                    yield f"socket {connection.laddr.ip}:{connection.laddr.port} of {process.pid}"
        except psutil.Error:
            continue
    for path in sorted((home / "run").rglob("*")) if (home / "run").is_dir() else []:
        if path.is_file() and path.suffix not in _STAYING:
            yield f"file {path.relative_to(home)}"
    for path in sorted(socket_dirs.iterdir()) if socket_dirs is not None and socket_dirs.is_dir() else []:
        yield f"socket folder {path.name}"
