"""What lies in `.partial/KEY` of a download, and how are its whole files gathered to be published?

They are moved or linked into `.partial/KEY/ready`; `ModelCatalog.publish` adds the card and renames
that folder to `MODELS_DIR/MODEL_ID` in one step.
"""

import hashlib
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from arriero.agent.catalog_entry import CARD_NAME, PARTIAL_DIR, CatalogEntry
from arriero.agent.fetch import FetchedFile
from arriero.agent.files import sync_folder
from arriero.contracts.records import ModelFile

_READY: Final = "ready"


class LinkInTheWay(OSError):
    """A folder of ours is a symlink: what is written would land elsewhere."""


def path_of(models_dir: Path, key: str) -> Path:
    """Return where the parts of a download are kept; the same for the same content or reference."""
    return models_dir / PARTIAL_DIR / hashlib.sha256(key.encode()).hexdigest()[:24]


def prepare(folder: Path) -> None:
    """Make the folder; undo a publication that a crash cut short.

    Raises OSError, also where a symlink stands in the way.
    """
    for step in (folder.parent, folder):
        step.mkdir(parents=True, exist_ok=True)
        if not stat.S_ISDIR(step.lstat().st_mode):
            raise LinkInTheWay(20, "is no folder of its own")
    ready = folder / _READY
    if ready.is_symlink():
        ready.unlink()
    if ready.is_dir():
        (ready / CARD_NAME).unlink(missing_ok=True)
        for path in ready.iterdir():
            path.replace(folder / f"{path.name}.part")
        ready.rmdir()


def has_bytes(folder: Path) -> bool:
    """Return whether anything of a download came; where nobody can say, it did."""
    try:
        parts = [*folder.glob("*.part"), *folder.glob(f"{_READY}/*")]
        # A sparse file may be as long as the model and hold nothing.
        return any(part.lstat().st_blocks for part in parts)
    except OSError:
        return True


def drop(folder: Path) -> None:
    """Remove what is left of a download; nothing if there is nothing."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def gather(folder: Path, fetched: Sequence[FetchedFile]) -> Path:
    """Move the whole files under their names into one folder, and return it."""
    ready = folder / _READY
    ready.mkdir()
    for file in fetched:
        file.path.replace(ready / file.name)
    sync_folder(ready)
    return ready


def link(folder: Path, entry: CatalogEntry) -> Path:
    """Link the files of an entry of our own into one folder, and return it; they take no room twice.

    Raises OSError where the disk has no hard links.
    """
    drop(folder)
    ready = folder / _READY
    ready.mkdir(parents=True)
    for file, path in zip(entry.files, entry.paths, strict=True):
        (ready / file.name).hardlink_to(path)
    sync_folder(ready)
    return ready


def describe(ready: Path, fetched: Sequence[FetchedFile]) -> list[ModelFile]:
    """Return the files as the card names them."""
    return [
        ModelFile(
            name=file.name,
            size_bytes=file.size_bytes,
            sha256=file.sha256,
            modified_ns=(ready / file.name).stat().st_mtime_ns,
        )
        for file in fetched
    ]
