"""Which memory limit does a process have from its cgroup, and did the kernel kill for it?

Reads version 1 and version 2 hierarchies.  A process without a memory cgroup, another operating
system, and files that cannot be read all answer "not known", never an error.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")
#: Version 1 writes this and the like for "no limit": everything above is none.
_NO_LIMIT_BYTES: Final = 1 << 60


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The tightest limit on a cgroup's way to the root, and what that level uses now."""

    limit_bytes: int
    usage_bytes: int


def memory_cgroup(pid: int, *, proc: Path = PROC) -> Path | None:
    """Return the folder of the memory cgroup that `pid` is in, None if there is none."""
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
        mounts = (proc / str(pid) / "mountinfo").read_text().splitlines()
    except OSError:
        return None
    paths: dict[str, str] = {}
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            paths["cgroup"] = path
        elif hierarchy == "0" and not controllers:
            paths["cgroup2"] = path
    # A hybrid system has both; the memory controller is then in version 1.
    for kind in ("cgroup", "cgroup2"):
        folder = _mounted(mounts, kind, paths[kind]) if kind in paths else None
        if folder is not None and _is_readable(folder, kind):
            return folder
    return None


def oom_kill_count(cgroup: Path) -> int:
    """Return how many processes the kernel killed for memory in `cgroup`; 0 where it is not told."""
    for name in ("memory.events", "memory.oom_control"):
        try:
            lines = (cgroup / name).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            word, _, number = line.partition(" ")
            if word == "oom_kill" and number.strip().isdecimal():
                return int(number)
    return 0


def memory_limit_and_usage(cgroup: Path, *, root: Path | None = None) -> MemoryLimit | None:
    """Return the tightest limit from `cgroup` up to the hierarchy's root, None if nothing limits.

    Tightest is what leaves least free.  Page cache counts as used in `usage_bytes` only as far as
    the kernel could not drop it.  `root` ends the walk; by default it ends where the files end.
    """
    tightest: MemoryLimit | None = None
    folder = cgroup
    while True:
        level = _level(folder)
        if level is not None and (tightest is None or _free(level) < _free(tightest)):
            tightest = level
        parent = folder.parent
        if folder == root or parent == folder or not _has_memory_files(parent):
            return tightest
        folder = parent


def _mounted(mounts: list[str], kind: str, path: str) -> Path | None:
    """Return where the hierarchy's `path` lies in the file system, by `mountinfo`."""
    for line in mounts:
        left, _, right = line.partition(" - ")
        left_fields, right_fields = left.split(), right.split()
        if len(left_fields) < 5 or len(right_fields) < 3 or right_fields[0] != kind:
            continue
        if kind == "cgroup" and "memory" not in right_fields[2].split(","):
            continue
        mount_root, mount_point = _plain(left_fields[3]), Path(_plain(left_fields[4]))
        # In a container the mount shows a part of the hierarchy, and paths are told from its root.
        if mount_root != "/" and (path == mount_root or path.startswith(f"{mount_root}/")):
            path = path[len(mount_root) :]
        folder = mount_point / path.lstrip("/")
        return folder if folder.is_dir() else mount_point
    return None


def _plain(field: str) -> str:
    """Return a path of `mountinfo`, where blanks and backslashes are three octal digits."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 8)), field)


def _is_readable(folder: Path, kind: str) -> bool:
    if kind == "cgroup":
        return (folder / "memory.limit_in_bytes").exists()
    # The root of version 2 has neither limit nor events; a process there is not limited.
    return (folder / "memory.current").exists() or (folder / "memory.events").exists()


def _has_memory_files(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("memory.limit_in_bytes", "memory.max"))


def _level(folder: Path) -> MemoryLimit | None:
    limit = _number(folder / "memory.max")
    usage = _number(folder / "memory.current")
    droppable = "inactive_file"
    if limit is None and usage is None:
        limit = _number(folder / "memory.limit_in_bytes")
        usage = _number(folder / "memory.usage_in_bytes")
        droppable = "total_inactive_file"
    if limit is None or limit >= _NO_LIMIT_BYTES:
        return None
    return MemoryLimit(limit, max(0, (usage or 0) - _statistic(folder, droppable)))


def _free(level: MemoryLimit) -> int:
    return level.limit_bytes - level.usage_bytes


def _number(file: Path) -> int | None:
    """Return the file's number; None for "max", for no such file and for anything else."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _statistic(folder: Path, name: str) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        word, _, number = line.partition(" ")
        if word == name and number.isdecimal():
            return int(number)
    return 0
