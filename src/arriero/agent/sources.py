"""What does a model reference that is not the Hub's lead to: which file, or which address?"""

import os
import re
import stat
from pathlib import Path
from typing import Final, NoReturn
from urllib.parse import unquote, urlsplit

from arriero.agent.fetch import RemoteFile
from arriero.agent.files import is_text
from arriero.agent.hub_choice import is_head, part_names
from arriero.contracts import names
from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.refs import FileRef, HttpsRef

#: Formats that run code when they are loaded: never fetched, never loaded.
PICKLE_SUFFIXES: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9 ._+-]")
NAME_LENGTH_MAX: Final = 120


def safe_name(url: str) -> str:
    """Return a file name made from an address: no separators, no leading dot, ends in `.gguf`."""
    last = unquote(urlsplit(url).path).rsplit("/", 1)[-1]
    cleaned = _UNSAFE.sub("_", last).lstrip("._- ")[-NAME_LENGTH_MAX:].lstrip("._- ")
    if not cleaned.lower().endswith(".gguf"):
        cleaned = (cleaned or "model") + ".gguf"
    return cleaned


def remote_file(ref: HttpsRef) -> RemoteFile:
    """Return what is to be fetched for a plain address.

    Raises INVALID_MODEL_REFERENCE if the name is one of a pickle format.
    """
    last = unquote(urlsplit(ref.url).path).rsplit("/", 1)[-1]
    _refuse_pickle(last)
    return RemoteFile(safe_name(ref.url), ref.url)


def local_files(ref: FileRef) -> list[Path]:
    """Return the file that `ref` names, and after the first part of a split model the others beside it.

    Parts that are missing are not told: the header says whether they have to be there.  Blocks and
    raises as `local_file` does.
    """
    first = local_file(ref)
    names = part_names(first.name) if is_head(first.name) else []
    others = [first.with_name(name) for name in names[1:]]
    return [first, *others] if all(map(_is_file, others)) else [first]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def local_file(ref: FileRef) -> Path:
    """Return the file that `ref` names, links followed.  Blocks for a moment: call it in a thread.

    Raises INVALID_MODEL_PATH if it is missing, no regular file, or may not be read, and
    INVALID_MODEL_REFERENCE for pickle formats.
    """
    path = Path(ref.path)
    name = path.name
    _refuse_pickle(name)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        _refuse_path(name, "does not exist")
    except (OSError, ValueError) as error:
        _refuse_path(name, f"cannot be looked at: {getattr(error, 'strerror', None) or 'not well formed'}")
    if not stat.S_ISREG(mode):
        _refuse_path(name, "is a folder" if stat.S_ISDIR(mode) else "is no regular file")
    if not os.access(path, os.R_OK):
        _refuse_path(name, "may not be read")
    resolved = path.resolve()
    names.file_name(resolved.name)  # A link may lead to a name that the catalog cannot tell.
    if not is_text(resolved):
        _refuse_path(name, "lies in a folder whose name is no UTF-8")
    return resolved


def _refuse_pickle(name: str) -> None:
    suffix = Path(name).suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        fail(
            ErrorCode.INVALID_MODEL_REFERENCE,
            f"{name[:80]!r}: {suffix} files are pickles, which run code when loaded; use a .gguf file",
            accepted=".gguf",
        )


def _refuse_path(name: str, why: str) -> NoReturn:
    raise ArrieroError(ErrorCode.INVALID_MODEL_PATH, f"{name[:120] or '/'} {why}", name=name[:120])
