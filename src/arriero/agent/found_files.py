"""What do all programs' folders have in common: walked within bounds, read only, links kept inside?"""

import itertools
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

import msgspec

from arriero.agent.files import is_text
from arriero.agent.hub_choice import (
    HubFile,
    folder_of,
    is_head,
    is_projector,
    models_among,
    part_names,
    projector_for,
)
from arriero.contracts import refs
from arriero.contracts.errors import ArrieroError

T = TypeVar("T")
GGUF_MAGIC: Final = b"GGUF"
#: So many entries of folders are looked at for one program, so many models told.
ENTRIES_MAX: Final = 50_000
MODELS_MAX: Final = 2000
DEPTH_MAX: Final = 8
NOTE_BYTES_MAX: Final = 1024 * 1024
#: So many projectors of one folder are weighed for a model.
_PROJECTORS_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class Found:
    """A model that another program keeps on this machine.  Only its first bytes have been read."""

    #: "hf-cache", "ollama", "lm-studio" or "llama.cpp".
    source: str
    #: What that program calls it.
    name: str
    model_ref: str
    #: The one to load first comes first, a projector last.
    paths: tuple[Path, ...]
    sizes: tuple[int, ...]
    #: What that program says of them; None where it says nothing.  Nobody has checked.
    sha256s: tuple[str | None, ...]
    #: The commit of the Hub that the files are of; empty where nobody knows.
    revision: str = ""
    #: Name of the multimodal projector among the files; empty if there is none.
    projector: str = ""

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class LyingFile:
    """One GGUF file, found by its path within a model's folder."""

    path: Path
    size_bytes: int
    sha256: str | None = None


@dataclass(slots=True)
class Budget:
    """How many more entries of folders one scan may look at."""

    entries: int = ENTRIES_MAX

    def take(self) -> bool:
        """Count one entry; return whether it may be looked at."""
        self.entries -= 1
        return self.entries >= 0


@dataclass(frozen=True, slots=True)
class Root:
    """One folder of a program; nothing outside of it is looked at, whatever links say."""

    path: Path
    budget: Budget = field(default_factory=Budget)

    def size_of_gguf(self, path: Path) -> int | None:
        """Return a file's size; None unless it is a readable GGUF file that really lies in this folder."""
        return self._read(path, lambda file, size: size if os.read(file, 4) == GGUF_MAGIC else None)

    def note(self, path: Path, kind: type[T]) -> T | None:
        """Return what a small JSON file of this folder holds; None if it cannot be read as `kind`."""
        content = self.text(path)
        try:
            return msgspec.json.decode(content, type=kind) if content is not None else None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return None

    def text(self, path: Path) -> bytes | None:
        """Return the content of a small file of this folder."""

        def read(file: int, size: int) -> bytes | None:
            return os.read(file, NOTE_BYTES_MAX) if size <= NOTE_BYTES_MAX else None

        return self._read(path, read)

    def files(self, below: Path, depth: int = DEPTH_MAX) -> Iterator[Path]:
        """Yield files and links below a folder, by name; folders behind links are not entered."""
        for entry in self.entries(below):
            if is_folder(entry):
                if depth > 1:
                    yield from self.files(Path(entry.path), depth - 1)
            else:
                yield Path(entry.path)

    def entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """Return what lies in a folder, by name; nothing if it cannot be read."""
        found: list[os.DirEntry[str]] = []
        try:
            if not folder.resolve(strict=True).is_relative_to(self.path):
                return []
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not self.budget.take():
                        break
                    if entry.name.isprintable():
                        found.append(entry)
        except (OSError, ValueError, RuntimeError):
            pass  # No such folder, no right to it, or links in a circle: there is nothing to find here.
        return sorted(found, key=lambda entry: entry.name)

    def _read(self, path: Path, look: Callable[[int, int], T | None]) -> T | None:
        try:
            real = path.resolve(strict=True)
            # Looked at before it is opened: opening a device may do something.
            if not real.is_relative_to(self.path) or not stat.S_ISREG(real.lstat().st_mode):
                return None
            file = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                state = os.fstat(file)
                return look(file, state.st_size) if stat.S_ISREG(state.st_mode) else None
            finally:
                os.close(file)
        except (OSError, ValueError, RuntimeError):
            return None


def roots(candidates: Sequence[Path | None]) -> list[Root]:
    """Return those folders that exist, each once, links to them followed.

    One whose path is no text is left out: no catalog could tell where its models are.
    """
    found: dict[Path, Root] = {}
    for path in candidates:
        try:
            real = path.resolve(strict=True) if path is not None and path.is_absolute() else None
            if real is not None and real.is_dir() and is_text(real):
                found.setdefault(real, Root(real))
        except (OSError, ValueError, RuntimeError):
            continue
    return list(found.values())


def folder_in(env: Mapping[str, str], name: str, home: Path) -> Path | None:
    """Return the folder that an environment variable names; None if it is not set or not absolute."""
    return folder_named(env.get(name, ""), home)


def folder_named(text: str, home: Path) -> Path | None:
    """Return the folder that a text names, `~` being `home`; None if it is not absolute."""
    text = text.strip()
    if text == "~" or text.startswith("~/"):
        return home / text[2:]
    return Path(text) if text.startswith("/") and "\0" not in text else None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder itself, not a link to one."""
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def file_ref(path: Path) -> str | None:
    """Return the `file://` reference of a file; None where its name cannot be written as one."""
    try:
        text = "file://" + quote(str(path))
        return text if refs.parse(text) == refs.FileRef(str(path)) else None
    except (ArrieroError, UnicodeEncodeError):
        return None


def is_ref(text: str) -> bool:
    """Return whether a text is a well formed reference."""
    try:
        refs.parse(text)
    except ArrieroError:
        return False
    return True


def whole_models(files: Mapping[str, LyingFile]) -> Iterator[tuple[list[str], str | None]]:
    """Yield the names of each whole model's parts, and of its projector, among files by their names."""
    listed = [HubFile(name, file.size_bytes, file.sha256) for name, file in files.items()]
    projectors: dict[tuple[str, ...], list[HubFile]] = {}
    for file in listed:
        if is_projector(file.path):
            projectors.setdefault(folder_of(file.path), []).append(file)
    for head in models_among(listed):
        names = part_names(head.path) if is_head(head.path) else []
        if names and all(name in files for name in names):
            folder = folder_of(head.path)
            above = (projectors.get(folder[:depth], []) for depth in range(len(folder) + 1))
            near = itertools.chain.from_iterable(there[:_PROJECTORS_MAX] for there in above)
            projector = projector_for(head, list(near))
            yield names, projector.path if projector is not None else None


def found(
    source: str, name: str, model_ref: str | None, parts: Sequence[LyingFile], *,
    projector: LyingFile | None = None, revision: str = "",
) -> Found | None:  # fmt: skip
    """Return a model made of these files; None without a reference, so that calls can be chained."""
    if model_ref is None:
        return None
    files = [*parts, *([projector] if projector is not None else [])]
    return Found(
        source=source,
        name=name,
        model_ref=model_ref,
        paths=tuple(file.path for file in files),
        sizes=tuple(file.size_bytes for file in files),
        sha256s=tuple(file.sha256 for file in files),
        revision=revision,
        projector=projector.path.name if projector is not None else "",
    )
