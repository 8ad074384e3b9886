"""Which bytes of a file are there, which are asked for next, and over how many connections?

A file is cut into parts of one size; each part is filled from its beginning, by one connection at a
time.  So a count for each part says everything, and a cut costs no byte that came.
"""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

#: The end of a file whose length nobody has told.
OPEN_END: Final = 1 << 62


class Run(NamedTuple):
    """Bytes from `start` up to, not with, `end`."""

    start: int
    end: int


class Parts:
    """The bytes of one file that are there."""

    def __init__(self, part_bytes: int, size_bytes: int | None = None) -> None:
        assert part_bytes > 0, part_bytes
        self.part_bytes = part_bytes
        self.size_bytes = size_bytes
        self.done_bytes = 0
        self._filled: dict[int, int] = {}
        #: All parts before this one are full.
        self._full_before = 0

    @property
    def prefix_bytes(self) -> int:
        """How many bytes from the very first on are there without a hole."""
        full = self._full_before
        return full * self.part_bytes + self._filled.get(full, 0)

    @property
    def is_whole(self) -> bool:
        """Whether every byte is there; False as long as the length is not known."""
        return self.done_bytes == self.size_bytes

    def filled(self, part: int) -> int:
        """Return how many bytes of a part are there, from its beginning."""
        return self._filled.get(part, 0)

    def is_full(self, part: int) -> bool:
        """Return whether a part lacks nothing."""
        return self.filled(part) >= self._length(part)

    def add(self, offset: int, count: int) -> None:
        """Note that `count` bytes from `offset` on are there now: the next ones of their part, no others."""
        assert count > 0, count
        part = offset // self.part_bytes
        filled = self.filled(part)
        assert offset == part * self.part_bytes + filled, f"part {part} goes on at {filled}, not {offset}"
        assert filled + count <= self._length(part), f"{count} bytes at {offset} are beyond their part"
        self._filled[part] = filled + count
        self.done_bytes += count
        while self._filled.get(self._full_before) == self.part_bytes:
            self._full_before += 1

    def missing(self) -> list[Run]:
        """Return the runs that are not there, in order; the last one ends at `OPEN_END` if need be."""
        end = OPEN_END if self.size_bytes is None else self.size_bytes
        runs: list[Run] = []
        start = 0
        for part in sorted(self._filled):
            begin = part * self.part_bytes
            if start < begin:
                runs.append(Run(start, begin))
            start = begin + self._filled[part]
        if start < end:
            runs.append(Run(start, end))
        return runs

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Iterate over the parts that have bytes: number and count, in order."""
        return iter(sorted(self._filled.items()))

    def _length(self, part: int) -> int:
        if self.size_bytes is None:
            return self.part_bytes
        return min(self.part_bytes, max(self.size_bytes - part * self.part_bytes, 0))


class Missing:
    """The runs that no connection has asked for yet."""

    def __init__(self, runs: Iterable[Run], part_bytes: int) -> None:
        self._runs = sorted(runs)
        self._part_bytes = part_bytes

    @property
    def bytes(self) -> int:
        """How many bytes that are."""
        return sum(run.end - run.start for run in self._runs)

    def take(self, bytes_max: int) -> Run | None:
        """Take the first bytes, up to `bytes_max` but never less than the rest of a part.

        What is taken ends where a part ends: nobody else comes to fill the same one.
        """
        if not self._runs:
            return None
        run = self._runs.pop(0)
        whole_parts_end = (run.start + bytes_max) // self._part_bytes * self._part_bytes
        this_part_end = (run.start // self._part_bytes + 1) * self._part_bytes
        end = min(run.end, max(whole_parts_end, this_part_end))
        if end < run.end:
            self._runs.insert(0, Run(end, run.end))
        return Run(run.start, end)

    def give_back(self, run: Run) -> None:
        """Return what was taken and did not come."""
        if run.start < run.end:
            self._runs.append(run)
            self._runs.sort()

    def end_at(self, size_bytes: int) -> None:
        """Forget what lies beyond the end of the file, now that it is known."""
        self._runs = [
            Run(run.start, min(run.end, size_bytes)) for run in self._runs if run.start < size_bytes
        ]


def connections_for(missing_bytes: int, connections_max: int, part_bytes: int) -> int:
    """Return how many connections are worth their while: one for each two parts, at least one."""
    return max(1, min(connections_max, missing_bytes // (2 * part_bytes)))


def range_bytes(missing_bytes: int, connections: int, part_bytes: int, range_bytes_max: int) -> int:
    """Return how many bytes one request asks for.

    Many while much is missing, so that requests are few; fewer towards the end, so that all
    connections end together.  One connection alone asks for everything.
    """
    if connections <= 1:
        return missing_bytes
    return max(part_bytes, min(range_bytes_max, missing_bytes // (2 * connections)))
