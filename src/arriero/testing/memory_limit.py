"""How is a process given a memory limit of its own, on a kernel with cgroups v1 or v2?  Needs root."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_V1: Final = Path("/sys/fs/cgroup/memory")
_V2: Final = Path("/sys/fs/cgroup")
MIB: Final = 1024 * 1024
#: Takes 1 MiB for each line it reads, and says so.
_BALLAST: Final = """
import sys
open(sys.argv[1] + "/cgroup.procs", "w").write("0")
print(flush=True)
kept = []
for line in sys.stdin:
    kept.append(bytearray(1024 * 1024))
    print(flush=True)
"""


class MemoryLimit:
    """A memory cgroup of our own, without a limit at first."""

    def __init__(self, path: Path, *, is_v1: bool) -> None:
        self.path = path
        self._is_v1 = is_v1

    @property
    def join_command(self) -> list[str]:
        """A command that puts itself into the cgroup and becomes the command given after it."""
        return ["/bin/sh", "-c", f'echo 0 > "{self.path}/cgroup.procs" && exec "$@"', "sh"]

    def set_mib(self, limit_mib: int) -> None:
        """Set the limit; where more is used already, as near to it as the kernel can reclaim."""
        size = limit_mib * MIB
        if self._is_v1:
            self._set_v1(size)
        else:
            (self.path / "memory.swap.max").write_text("0")
            (self.path / "memory.max").write_text(str(size))

    def _set_v1(self, size: int) -> None:
        # Without the second limit the kernel would swap instead, where there is swap.
        for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
            path = self.path / name
            if path.exists():
                for step in (0, 2, 4, 8, 16, 32, 64):
                    try:
                        path.write_text(str(size + step * MIB))
                        break
                    except OSError:
                        continue

    @property
    def used_mib(self) -> int:
        """Memory used by the processes in it, page cache included."""
        name = "memory.usage_in_bytes" if self._is_v1 else "memory.current"
        return int((self.path / name).read_text()) // MIB

    @property
    def oom_kills(self) -> int:
        """How many processes in it the kernel killed for memory."""
        name = "memory.oom_control" if self._is_v1 else "memory.events"
        for line in (self.path / name).read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill":
                return int(value)
        return 0

    def pids(self) -> list[int]:
        """Return the processes in it."""
        return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]

    @contextlib.contextmanager
    def filled(self, most_mib: int) -> Iterator[int]:
        """Have another process in the cgroup take memory until the kernel kills one, `most_mib` at most.

        Yields how much was taken; it is kept while the `with` lasts.
        """
        before = self.oom_kills
        with subprocess.Popen(
            [sys.executable, "-c", _BALLAST, str(self.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as ballast:
            assert ballast.stdin is not None
            assert ballast.stdout is not None
            try:
                taken = 0
                # An empty answer: it was itself the kernel's victim.
                while ballast.stdout.readline() and taken < most_mib and self.oom_kills == before:
                    ballast.stdin.write(b"\n")
                    ballast.stdin.flush()
                    taken += 1
                yield taken
            finally:
                ballast.kill()


def offer(pid: int) -> None:
    """Have the kernel choose `pid` first when memory is short."""
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def can_limit() -> bool:
    """Return whether this process may make memory cgroups here."""
    if os.geteuid() != 0:
        return False
    try:
        with memory_limit("can"):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def memory_limit(name: str) -> Iterator[MemoryLimit]:
    """Make a memory cgroup below our own; removed at the end, when its processes are gone.

    Raises OSError where that is not allowed.
    """
    parent, is_v1 = _parent()
    path = parent / f"arriero-{name}-{os.getpid()}-{time.monotonic_ns()}"
    path.mkdir()
    try:
        # A kernel that offers v2 without the memory controller is no use.
        if not (path / ("memory.limit_in_bytes" if is_v1 else "memory.max")).exists():
            raise OSError("the memory controller is not delegated to this cgroup")
        yield MemoryLimit(path, is_v1=is_v1)
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            path.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _parent() -> tuple[Path, bool]:
    """Return the memory cgroup this process is in, and whether it is of v1."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, inside = line.split(":", 2)
        if "memory" in controllers.split(","):
            for base in (_V1 / inside.lstrip("/"), _V1):
                if (base / "memory.limit_in_bytes").exists():
                    return base, True
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            # Processes may live in leaves alone: a sibling of ours, then, not a child.
            own = _V2 / line[3:].lstrip("/")
            return (own.parent if own != _V2 else own), False
    raise OSError("there is no memory cgroup here")
