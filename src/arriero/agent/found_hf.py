"""Which models lie in the cache of huggingface_hub?

Its layout (`huggingface_hub.file_download.hf_hub_download`, and `utils/_shared_blobs.py` since 2.x):

    HUB/models--ORG--REPO/refs/main                       the commit that `main` named last
    HUB/models--ORG--REPO/snapshots/COMMIT/PATH           a link to ../../blobs/ETAG
    HUB/models--ORG--REPO/blobs/ETAG                      the file, or a link to the next line
    HUB/blobs/XX/XET_HASH                                 one file for all repositories that have it

ETAG is the sha256 for files in large storage, a git hash of 40 digits for others; XET_HASH is no
sha256, though it looks like one.  Without links (Windows, some file systems) the file itself lies in
`snapshots`.  HUB is HF_HUB_CACHE, else HUGGINGFACE_HUB_CACHE, else HF_HOME/hub, else
XDG_CACHE_HOME/huggingface/hub, else ~/.cache/huggingface/hub.  llama.cpp keeps its models here too
since 2026.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from arriero.agent.found_files import (
    Found,
    LyingFile,
    Root,
    file_ref,
    folder_in,
    found,
    is_folder,
    is_ref,
    roots,
    whole_models,
)
from arriero.agent.hub_choice import HubFile, choose, projector_for
from arriero.contracts.errors import ArrieroError
from arriero.contracts.refs import HfRef

SOURCE: Final = "hf-cache"
_REPO: Final = re.compile(r"models--([A-Za-z0-9][A-Za-z0-9._-]*)--([A-Za-z0-9][A-Za-z0-9._-]*)")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_SNAPSHOTS_MAX: Final = 50


def scan(env: Mapping[str, str], home: Path) -> Iterator[Found]:
    """Yield the models of the cache, those of the newest commit of a repository first."""
    for root in _roots(env, home):
        for entry in root.entries(root.path):
            match = _REPO.fullmatch(entry.name)
            if match and is_folder(entry):
                yield from _of_repo(root, Path(entry.path), f"{match[1]}/{match[2]}")


def by_name(env: Mapping[str, str], home: Path, ref: HfRef) -> Found | None:
    """Return the model that `ref` meant when the cache last saw its repository; None if it is not there."""
    for root in _roots(env, home):
        folder = root.path / f"models--{ref.repo.replace('/', '--')}"
        commit = ref.revision if ref.revision and _COMMIT.fullmatch(ref.revision) else None
        commit = commit or _commit_of(root, folder, ref.revision or "main")
        files = _of_snapshot(root, folder, commit) if commit else {}
        listed = [HubFile(name, file.size_bytes, file.sha256) for name, file in files.items()]
        try:
            chosen = choose(ref, listed)
        except ArrieroError:
            continue
        head = chosen[0].path
        projector = projector_for(chosen[0], listed)
        return found(
            SOURCE, f"{ref.repo}/{head}", _ref_of(ref.repo, head, commit or "", files[head].path),
            [files[file.path] for file in chosen],
            projector=files[projector.path] if projector is not None else None, revision=commit or "",
        )  # fmt: skip
    return None


def _roots(env: Mapping[str, str], home: Path) -> list[Root]:
    hf_home = folder_in(env, "HF_HOME", home)
    if hf_home is None:
        hf_home = (folder_in(env, "XDG_CACHE_HOME", home) or home / ".cache") / "huggingface"
    named = folder_in(env, "HF_HUB_CACHE", home) or folder_in(env, "HUGGINGFACE_HUB_CACHE", home)
    return roots([named or hf_home / "hub"])


def _of_repo(root: Root, folder: Path, repo: str) -> Iterator[Found]:
    seen: set[tuple[str, ...]] = set()
    for commit in _commits(root, folder):
        files = _of_snapshot(root, folder, commit)
        for names, projector in whole_models(files):
            parts = [files[name] for name in names]
            # The same file is part of many commits; it is told once.
            key = (*names, *(part.sha256 or str(part.path.resolve()) for part in parts))
            model = found(
                SOURCE, f"{repo}/{names[0]}", _ref_of(repo, names[0], commit, parts[0].path), parts,
                projector=files[projector] if projector is not None else None, revision=commit,
            )  # fmt: skip
            if model is not None and key not in seen:
                seen.add(key)
                yield model


def _ref_of(repo: str, name: str, commit: str, path: Path) -> str | None:
    text = f"hf:{repo}/{name}@{commit}"
    return text if is_ref(text) else file_ref(path)


def _commits(root: Root, folder: Path) -> list[str]:
    """Return the commits of which there are files: that of `main` first, then the newest."""
    snapshots = [
        entry
        for entry in root.entries(folder / "snapshots")
        if _COMMIT.fullmatch(entry.name) and is_folder(entry)
    ]
    main = _commit_of(root, folder, "main")

    def age(name: str) -> tuple[bool, float]:
        try:
            return name != main, -(folder / "snapshots" / name).stat().st_mtime
        except OSError:
            return True, 0.0

    return sorted((entry.name for entry in snapshots), key=age)[:_SNAPSHOTS_MAX]


def _commit_of(root: Root, folder: Path, revision: str) -> str | None:
    if ".." in revision.split("/") or revision.startswith("/"):
        return None
    commit = (root.text(folder / "refs" / revision) or b"").decode("ascii", "replace").strip()
    return commit if _COMMIT.fullmatch(commit) else None


def _of_snapshot(root: Root, folder: Path, commit: str) -> dict[str, LyingFile]:
    """Return the GGUF files of a commit by their paths in the repository."""
    snapshot = folder / "snapshots" / commit
    files: dict[str, LyingFile] = {}
    for path in root.files(snapshot):
        if path.suffix.lower() == ".gguf" and (size := root.size_of_gguf(path)) is not None:
            name = path.relative_to(snapshot).as_posix()
            files[name] = LyingFile(path, size, _told_sha256(path, folder / "blobs"))
    return files


def _told_sha256(path: Path, blobs: Path) -> str | None:
    """Return the sha256 that the name of the blob behind a link tells."""
    try:
        target = path.parent / path.readlink()
        is_blob = target.parent.resolve() == blobs.resolve()
    except (OSError, RuntimeError):
        return None
    return target.name if is_blob and _SHA256.fullmatch(target.name) else None
