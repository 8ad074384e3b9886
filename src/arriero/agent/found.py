"""stub"""

from dataclasses import dataclass
from pathlib import Path
from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Found:
    source: str
    name: str
    model_ref: str
    paths: tuple[Path, ...]
    size_bytes: int
    sha256s: tuple[str | None, ...]
    revision: str = ""


def by_content(
    env: Mapping[str, str], home: Path, sha256s: Sequence[str], sizes: Sequence[int | None]
) -> Found | None:
    return None
