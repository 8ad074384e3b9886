"""Which files of a repository does a reference mean?"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from arriero.contracts.errors import ErrorCode, fail
from arriero.contracts.refs import PICKLE_SUFFIXES, HfRef

PREFERRED_QUANTS: Final = ("Q4_K_M", "Q8_0")
#: Projectors are small, so the exact ones come first.
PREFERRED_PROJECTORS: Final = ("F16", "BF16", "F32", "Q8_0")
_SPLIT: Final = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.IGNORECASE)
_QUANT_IN_NAME: Final = re.compile(
    r"(?<![A-Za-z0-9])(UD-)?(I?Q\d+(_[A-Z0-9]+)*|T?Q\d+(_[A-Z0-9]+)*|BF16|F16|F32|FP16|MXFP4(_MOE)?)(?![A-Za-z0-9_])",
    re.IGNORECASE,
)
#: Beside the weights there may be files that are GGUF but no model of their own.
_NO_MODEL: Final = re.compile(r"(^|[/._-])(mmproj|imatrix)", re.IGNORECASE)
_PROJECTOR: Final = re.compile(r"(^|[/._-])mmproj", re.IGNORECASE)
_WORDS: Final = re.compile(r"[a-z0-9]+(?:\.[0-9]+)*")
_PARTS_MAX: Final = 1000
#: So many are told, and so many are compared with a name that is not there.
_TOLD_MAX: Final = 100
_SHOWN_MAX: Final = 40
_COMPARED_MAX: Final = 2000
_NEAR_MAX: Final = 3


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository."""

    path: str
    size_bytes: int | None
    sha256: str | None


def quant_of(path: str) -> str | None:
    """Return the quantisation that a file's name tells, upper case."""
    found = list(_QUANT_IN_NAME.finditer(path.rsplit("/", 1)[-1])) or list(_QUANT_IN_NAME.finditer(path))
    return found[-1][0].upper() if found else None


def choose(ref: HfRef, files: Sequence[HubFile]) -> list[HubFile]:
    """Return the files that `ref` means, the first to load first: all parts where a model is split.

    Without a path or a quantisation: Q4_K_M, else Q8_0, else the smallest.  Raises MODEL_NOT_FOUND
    (details: `available`, `near`) if there is none or a part is missing.
    """
    by_path = {file.path: file for file in files}
    if ref.path is not None:
        if ref.path not in by_path:
            _no_such_file(ref, files)
        return _whole(ref, [by_path[ref.path]], by_path, files)
    heads = [file for file in models_among(files) if is_head(file.path)]
    if not heads:
        _no_model(ref, files)
    if ref.quant is not None:
        found = _matching(ref.quant, heads)
        if not found:
            _no_such_quant(ref, files)
        return _whole(ref, found, by_path, files)
    for quant in PREFERRED_QUANTS:
        if found := _matching(quant, heads):
            return _whole(ref, found, by_path, files)
    return _whole(ref, sorted(heads, key=lambda head: _weight(head, by_path)), by_path, files)


def projector_for(model: HubFile, files: Sequence[HubFile]) -> HubFile | None:
    """Return the multimodal projector that belongs to `model`; None if there is none.

    The one nearest to it: in its folder before those in folders above, of its own name where a
    repository holds several models, F16 before BF16 before others.
    """
    if not model.path.lower().endswith(".gguf") or _NO_MODEL.search(model.path):
        return None
    model_folder = folder_of(model.path)
    model_words = _words(model.path)

    def rank(file: HubFile) -> tuple[int, int, int, str]:
        quant = quant_of(file.path) or ""
        known = PREFERRED_PROJECTORS
        return (
            -len(folder_of(file.path)),
            len(_words(file.path) - model_words),
            known.index(quant) if quant in known else len(known),
            file.path,
        )

    beside = [
        file
        for file in files
        if is_projector(file.path) and model_folder[: len(folder_of(file.path))] == folder_of(file.path)
    ]
    return min(beside, key=rank) if beside else None


def folder_of(path: str) -> tuple[str, ...]:
    """Return a file's folders; one for projectors alone does not count, it lies beside the models."""
    folders = tuple(path.split("/")[:-1])
    return folders[:-1] if folders and folders[-1].lower() in ("mmproj", "projector") else folders


def is_projector(path: str) -> bool:
    """Return whether a path names a multimodal projector."""
    return path.lower().endswith(".gguf") and _PROJECTOR.search(path) is not None


def is_head(path: str) -> bool:
    """Return whether a path names a whole model, or the first part of one."""
    match = _SPLIT.fullmatch(path)
    return match is None or int(match["part"]) == 1


def part_names(path: str) -> list[str]:
    """Return the names of all parts of the model whose first part `path` is; itself if it is whole.

    Empty where the name claims no part at all, or more than anybody makes.
    """
    match = _SPLIT.fullmatch(path)
    if match is None:
        return [path]
    count = int(match["parts"])
    if count > _PARTS_MAX:
        return []
    suffix = path[-len(".gguf") :]
    return [f"{match['stem']}-{part:05d}-of-{count:05d}{suffix}" for part in range(1, count + 1)]


def models_among(files: Iterable[HubFile]) -> list[HubFile]:
    """Return the GGUF files that are models, or parts of some."""
    return [f for f in files if f.path.lower().endswith(".gguf") and not _NO_MODEL.search(f.path)]


def quants_available(files: Sequence[HubFile]) -> list[str]:
    """Return the quantisations there are, or the names of files that tell none."""
    return sorted({quant_of(file.path) or file.path for file in models_among(files) if is_head(file.path)})


def _matching(quant: str, heads: Sequence[HubFile]) -> list[HubFile]:
    """Return files whose path holds `quant` as a word of its own; the shortest name first."""
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
    found = [head for head in heads if word.search(head.path.rsplit("/", 1)[-1])]
    found = found or [head for head in heads if word.search(head.path)]
    return sorted(found, key=lambda head: (len(head.path), head.path))


def _whole(
    ref: HfRef, heads: Sequence[HubFile], by_path: Mapping[str, HubFile], files: Sequence[HubFile]
) -> list[HubFile]:
    """Return all parts of the first of `heads` that is complete."""
    for head in heads:
        names = part_names(head.path)
        if names and all(name in by_path for name in names):
            return [by_path[name] for name in names]
    names = part_names(heads[0].path)
    missing = sum(name not in by_path for name in names)
    why = f"lacks {missing} of the {len(names)} parts" if names else "claims a senseless number of parts"
    advice = "Whoever made the repository has to complete it; look for another one of this model."
    _not_there(ref, f"{why} of {heads[0].path}", quants_available(files), [], advice)


def _weight(head: HubFile, by_path: Mapping[str, HubFile]) -> tuple[int, str]:
    parts = [by_path[name] for name in part_names(head.path) if name in by_path]
    # Unknown sizes are taken for large: a known small file is the safer choice.
    return sum(2**62 if part.size_bytes is None else part.size_bytes for part in parts), head.path


def _words(path: str) -> set[str]:
    """Return the words of a file's name that tell which model it is of."""
    name = _QUANT_IN_NAME.sub(" ", path.rsplit("/", 1)[-1].lower().removesuffix(".gguf"))
    return set(_WORDS.findall(name)) - {"mmproj", "model", "gguf"}


# --- What is not there -----------------------------------------------------------------------


def _no_such_quant(ref: HfRef, files: Sequence[HubFile]) -> NoReturn:
    assert ref.quant is not None
    available = quants_available(files)
    _not_there(ref, f"has no quantisation {ref.quant}", available, _near(ref.quant.upper(), available))


def _no_such_file(ref: HfRef, files: Sequence[HubFile]) -> NoReturn:
    assert ref.path is not None
    suffix = "." + ref.path.rsplit(".", 1)[-1].lower()
    paths = [file.path for file in files if file.path.lower().endswith(suffix)]
    available = quants_available(files) if suffix == ".gguf" else paths
    if not available:
        _no_model(ref, files)
    name = ref.path.rsplit("/", 1)[-1].lower()
    elsewhere = [path for path in paths if path.rsplit("/", 1)[-1].lower() == name]
    near = list(dict.fromkeys([*elsewhere, *_near(ref.path, paths)]))[:_NEAR_MAX]
    _not_there(ref, f"has no file {ref.path}", available, near)


def _near(wanted: str, there: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(wanted, there[:_COMPARED_MAX], n=_NEAR_MAX, cutoff=0.6)


def _not_there(ref: HfRef, why: str, available: Sequence[str], near: list[str], advice: str = "") -> NoReturn:
    meant = f" (near: {', '.join(near)})" if near else ""
    more = f" and {len(available) - _SHOWN_MAX} more" if len(available) > _SHOWN_MAX else ""
    fail(
        ErrorCode.MODEL_NOT_FOUND,
        f"{ref.repo} {why}{meant}; it has {', '.join(available[:_SHOWN_MAX])}{more}",
        available=list(available[:_TOLD_MAX]),
        near=near,
        suggested_action=advice or "Ask for one of those that it has.",
    )


def _no_model(ref: HfRef, files: Sequence[HubFile]) -> NoReturn:
    """Say what a repository without a GGUF model holds, and what is likely to help."""
    suffixes = {"." + file.path.rsplit(".", 1)[-1].lower() for file in files if "." in file.path}
    name = ref.repo.rsplit("/", 1)[-1]
    advice = f"Look for a repository named {name}-GGUF: others may have converted this model."
    pickles = sorted(suffixes.intersection(PICKLE_SUFFIXES))
    if not files:
        what, advice = "is empty", "Check the name and the revision."
    elif ".safetensors" in suffixes:
        what = "holds no GGUF file at all, but safetensors, which llama.cpp does not run"
    elif pickles:
        what = f"holds no GGUF file at all, but pickles ({', '.join(pickles)}), which run code when loaded"
        what += " and are refused"
    elif any(is_projector(file.path) for file in files):
        what = "holds no GGUF file at all but a multimodal projector, which is no model of its own"
    else:
        what = "holds no GGUF file at all"
    wanted = f" (wanted: {ref.path})" if ref.path else ""
    at = f" at revision {ref.revision}" if ref.revision else ""
    fail(
        ErrorCode.MODEL_NOT_FOUND,
        f"{ref.repo}{at} {what}{wanted}",
        available=[],
        near=[],
        suggested_action=advice,
    )
