"""Did the kernel kill for memory?  The proof is that the memory cgroup's count of it rose."""

from pathlib import Path

from arriero.runtime import cgroups


class OomWitness:
    """Watches the oom_kill count of one process's memory cgroup.

    `look` is called while the process lives, so that only its last moments count and a move to
    another cgroup is noticed; `has_proof` is asked after its end, when its cgroup is no longer told.
    """

    def __init__(self, pid: int, path: Path | None = None, count: int = 0) -> None:
        self._pid = pid
        self.path = path
        self.count = count
        if path is None:
            self.look()

    def look(self) -> None:
        """Note the cgroup and its count as they are now; nothing where there is no memory cgroup."""
        path = cgroups.memory_cgroup(self._pid)
        if path is not None:
            self.path = path
            self.count = cgroups.oom_kill_count(path)

    def has_proof(self) -> bool:
        """Return whether the count has risen since the last look."""
        return self.path is not None and cgroups.oom_kill_count(self.path) > self.count

    def discount(self, path: Path | None) -> None:
        """Somebody else in `path` was killed for memory: that rise proves nothing about us."""
        if path is not None and path == self.path:
            self.count += 1
