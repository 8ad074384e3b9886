"""Which models go, so that so much room is made?

Those that were used longest ago go first; what was never used counts from when it was added.  A
protected model never goes.  Files may be shared (hard links): their bytes are free only once every
link is gone, and a model whose going frees nothing stays.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FileLinks:
    """One file: which one it really is, and by how many names it is known in all."""

    key: tuple[int, int]
    size_bytes: int
    links: int = 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model as the choice sees it."""

    model_id: str
    added_unix: float
    files: tuple[FileLinks, ...]
    #: 0: never.
    last_used_unix: float = 0.0
    #: Loaded or loading, pinned, or not ours.
    is_protected: bool = False

    @property
    def age_key(self) -> tuple[float, str]:
        """The smaller, the sooner it goes."""
        return self.last_used_unix or self.added_unix, self.model_id


@dataclass(frozen=True, slots=True)
class Choice:
    """Which models go, the least recently used first, and how much that frees."""

    model_ids: tuple[str, ...]
    freed_bytes: int


def freed_by(removed: Iterable[Candidate]) -> int:
    """Return the bytes that are free once all of `removed` are gone."""
    links: Counter[FileLinks] = Counter(file for candidate in removed for file in candidate.files)
    return sum(file.size_bytes for file, gone in links.items() if gone >= file.links)


def choose(candidates: Iterable[Candidate], free_bytes: int) -> Choice:
    """Return the models that go so that `free_bytes` are freed; all that may go where that is less."""
    gone: Counter[FileLinks] = Counter()
    chosen: list[Candidate] = []
    freed = 0
    for candidate in sorted(candidates, key=lambda one: one.age_key):
        if freed >= free_bytes:
            break
        if candidate.is_protected:
            continue
        chosen.append(candidate)
        for file in candidate.files:
            gone[file] += 1
            if gone[file] == file.links:
                freed += file.size_bytes
    useful = [
        one for one in chosen if any(gone[file] >= file.links and file.size_bytes for file in one.files)
    ]
    return Choice(tuple(candidate.model_id for candidate in useful), freed)
