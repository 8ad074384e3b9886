"""Which models lie where a person points to?  Everything below that place is hostile input.

Nothing is followed out of a folder, nothing but regular files is opened, and what is walked through
has a limit.  Everything here blocks: call it in a thread.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from arriero.agent import claims
from arriero.agent.catalog_entry import CARD_NAME
from arriero.contracts import names, refs
from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.records import ImportRefusal, ModelFile, ModelRecord

#: A folder with more than this is not what its person meant.
ENTRIES_MAX: Final = 20_000
DEPTH_MAX: Final = 16
REFUSALS_MAX: Final = 1000
_SPLIT: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9 ._+-]")


@dataclass(frozen=True, slots=True)
class Piece:
    """One file of a model: where it really is, and what it is to be called."""

    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """One model to be imported."""

    #: Where it lies, for people.
    name: str
    model_ref: str
    pieces: tuple[Piece, ...]
    size_bytes: int
    #: What its card says, where it has one.
    card: tuple[ModelRecord, tuple[ModelFile, ...]] | None = None


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """What was found."""

    models: list[PlannedModel] = field(default_factory=list)
    refused: list[ImportRefusal] = field(default_factory=list)

    @property
    def size_bytes(self) -> int:
        """What is to be read in all."""
        return sum(model.size_bytes for model in self.models)

    def refuse(self, name: str, error: ArrieroError) -> None:
        """Note that something is no model of use."""
        if len(self.refused) < REFUSALS_MAX:
            self.refused.append(ImportRefusal(name=name, code=str(error.code), why=error.message))


def plan(path: str, model_ref: str | None) -> ImportPlan:
    """Return the models at `path`, a file or a folder; `model_ref` is what a single one is to be called.

    Raises INVALID_MODEL_PATH if there is nothing to import, INVALID_MODEL_REFERENCE, and
    INVALID_REQUEST where one reference is given for several models.
    """
    if model_ref is not None and isinstance(refs.parse(model_ref), refs.DemoRef):
        fail(ErrorCode.INVALID_MODEL_REFERENCE, "the demo model is in the package, it is not imported")
    if not path.startswith("/") or "\0" in path:
        fail(ErrorCode.INVALID_MODEL_PATH, f"{shown(path)} is not an absolute path")
    # Links are followed here alone: this place was named by a person.
    place = Path(os.path.normpath(path))
    try:
        mode = place.stat().st_mode
    except FileNotFoundError:
        _refuse(f"{shown(place.name)} does not exist")
    except (OSError, ValueError) as error:
        _refuse(f"{shown(place.name)} cannot be looked at: {_reason(error)}")
    if stat.S_ISDIR(mode):
        found = _Walk(place.resolve()).plan()
        if model_ref is not None and len(found.models) > 1:
            fail(
                ErrorCode.INVALID_REQUEST,
                f"one reference names one model, {shown(place.name)} holds {len(found.models)}",
                param="model_ref",
            )
        found.models[:] = [_called(model, model_ref) for model in found.models]
        return found
    if not stat.S_ISREG(mode):
        _refuse(f"{shown(place.name)} is no regular file and no folder")
    return ImportPlan([_called(_one_file(place), model_ref)])


def shown(name: str) -> str:
    """Return a name as it may be told: short, and of characters that JSON can hold."""
    return repr(name.encode("utf-8", "replace").decode()[:200])


def _called(model: PlannedModel, model_ref: str | None) -> PlannedModel:
    if model_ref is None:
        return model
    return PlannedModel(model.name, model_ref, model.pieces, model.size_bytes, model.card)


# --- One file ----------------------------------------------------------------------------------


def _one_file(place: Path) -> PlannedModel:
    match = _SPLIT.fullmatch(place.name)
    if match is not None and int(match["number"]) != 1:
        first = f"{match['stem']}-00001-of-{match['count']}.gguf"
        _refuse(f"{shown(place.name)} is a part of a split model: give the first one, {shown(first)}")
    return _model_of([place.with_name(name) for name in _part_names(place.name)], place.name)


def _part_names(name: str) -> list[str]:
    """Return the names of all parts of the model whose first part is `name`."""
    match = _SPLIT.fullmatch(name)
    if match is None:
        return [name]
    count = int(match["count"])
    if not 1 <= count <= claims.FILES_MAX:
        _refuse(f"{shown(name)} says it has {count} parts, at most {claims.FILES_MAX} can be")
    ending = name[-len(".gguf") :]
    return [f"{match['stem']}-{number:05d}-of-{match['count']}{ending}" for number in range(1, count + 1)]


def _model_of(paths: Sequence[Path], name: str, *, root: Path | None = None) -> PlannedModel:
    pieces = [Piece(_regular(path, root), _clean(path.name)) for path in paths]
    sizes = [piece.path.stat().st_size for piece in pieces]
    model_ref = paths[0].as_uri()
    refs.parse(model_ref)
    return PlannedModel(_text(name), model_ref, tuple(pieces), sum(sizes))


def _regular(path: Path, root: Path | None) -> Path:
    """Return where a file really is.  Raises INVALID_MODEL_PATH unless it is regular and below `root`."""
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        _refuse(f"{shown(path.name)} is missing")
    except (OSError, RuntimeError, ValueError) as error:
        _refuse(f"{shown(path.name)} cannot be looked at: {_reason(error)}")
    if root is not None and not real.is_relative_to(root):
        _refuse(f"{shown(path.name)} is a link out of the folder")
    if not stat.S_ISREG(mode):
        _refuse(f"{shown(path.name)} is no regular file")
    return real


def _clean(name: str) -> str:
    """Return a name as it may stand in our folder: plain, not hidden, ending in `.gguf`."""
    cleaned = _UNSAFE.sub("_", name).lstrip(". ") or "model"
    return cleaned if cleaned.lower().endswith(".gguf") else f"{cleaned[-200:]}.gguf"


# --- A folder ----------------------------------------------------------------------------------


class _Walk:
    """One pass through a folder and what is below it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._seen = 0
        self._plan = ImportPlan()

    def plan(self) -> ImportPlan:
        for folder in self._folders():
            names = sorted(self._names(folder))
            if CARD_NAME in names and self._take_card(folder):
                continue
            self._take_plain(folder, [name for name in names if name.lower().endswith(".gguf")])
        if not self._plan.models and not self._plan.refused:
            _refuse(
                f"{shown(self._root.name)} holds no model: no .gguf file, and no folder with a {CARD_NAME}"
            )
        return self._plan

    def _folders(self) -> Iterator[Path]:
        todo = [(self._root, 0)]
        while todo:
            folder, depth = todo.pop()
            yield folder
            try:
                with os.scandir(folder) as entries:
                    below = sorted(
                        entry.name
                        for entry in entries
                        if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
                    )
            except OSError:
                continue  # Told when its names were read.
            if below and depth == DEPTH_MAX:
                _refuse(f"{shown(self._root.name)} is more than {DEPTH_MAX} folders deep")
            todo += [(folder / name, depth + 1) for name in reversed(below)]

    def _names(self, folder: Path) -> list[str]:
        """Return the names of what is no folder; links to folders are not followed."""
        found = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self._seen += 1
                    if self._seen > ENTRIES_MAX:
                        _refuse(
                            f"{shown(self._root.name)} holds more than {ENTRIES_MAX} files: "
                            "give the folder of the models alone"
                        )
                    if not entry.name.startswith(".") and not entry.is_dir(follow_symlinks=False):
                        found.append(entry.name)
        except OSError as error:
            self._plan.refuse(
                self._name(folder),
                ArrieroError(ErrorCode.INVALID_MODEL_PATH, f"cannot be read: {_reason(error)}"),
            )
        return found

    def _take_card(self, folder: Path) -> bool:
        """Plan the model whose card lies here; False if the card is none of ours."""
        try:
            record, files = claims.record_of(claims.read_card(folder / CARD_NAME))
            if record.is_external:
                raise claims.Unbelievable("its card speaks of a file elsewhere")
            paths = [folder / file.name for file in files]
            model = _model_of(paths, self._name(folder), root=self._root)
        except claims.Unbelievable as error:
            if not names.is_model_id(folder.name):
                return False
            self._plan.refuse(self._name(folder), ArrieroError(ErrorCode.MODEL_CORRUPTED, str(error)))
        except ArrieroError as error:
            self._plan.refuse(self._name(folder), error)
        else:
            # The names are part of what the card's checksum is of.
            pieces = tuple(
                Piece(piece.path, file.name) for piece, file in zip(model.pieces, files, strict=True)
            )
            self._plan.models.append(
                PlannedModel(model.name, record.model_ref, pieces, model.size_bytes, (record, files))
            )
        return True

    def _take_plain(self, folder: Path, names: Sequence[str]) -> None:
        taken: set[str] = set()
        for name in names:
            match = _SPLIT.fullmatch(name)
            if match is not None and int(match["number"]) != 1:
                continue
            shown_name = self._name(folder / name)
            taken.add(name)
            try:
                parts = _part_names(name)
                taken.update(parts)
                paths = [folder / part for part in parts]
                self._plan.models.append(_model_of(paths, shown_name, root=self._root))
            except ArrieroError as error:
                self._plan.refuse(shown_name, error)
        for name in names:
            if name not in taken:
                self._plan.refuse(
                    self._name(folder / name),
                    ArrieroError(ErrorCode.INVALID_MODEL_PATH, "its model's first part is missing"),
                )

    def _name(self, path: Path) -> str:
        return _text(str(path.relative_to(self._root.parent)))


def _text(name: str) -> str:
    return name.encode("utf-8", "replace").decode()[:1000]


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or "not well formed"


def _refuse(why: str) -> NoReturn:
    raise ArrieroError(ErrorCode.INVALID_MODEL_PATH, why)
