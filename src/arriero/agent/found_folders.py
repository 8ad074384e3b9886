"""Which models lie in the folders of LM Studio and of llama.cpp?

LM Studio (lmstudio-js `findLMStudioHome`, lms `importCmd.ts`): MODELS/ORG/REPO/FILE.gguf.  MODELS is
`downloadsFolder` of its settings.json, else HOME/models, where HOME is what ~/.lmstudio-home-pointer
holds, else ~/.cache/lm-studio, else ~/.lmstudio.  It tells no checksums.

llama.cpp until 2026 (`common/arg.cpp`, `fs_get_cache_directory`): CACHE/ORG_REPO_FILE.gguf, slashes
in FILE as underscores, and beside them manifest=ORG=REPO=TAG.json (older: manifest=ORG_REPO=TAG.json)
with what the Hub said of a model's file and its projector.  CACHE is LLAMA_CACHE, else
XDG_CACHE_HOME/llama.cpp, else ~/.cache/llama.cpp; on macOS ~/Library/Caches/llama.cpp.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from arriero.agent.found_files import (
    Found,
    LyingFile,
    Root,
    file_ref,
    folder_in,
    folder_named,
    found,
    roots,
    whole_models,
)
from arriero.agent.hub_choice import is_projector

LM_STUDIO: Final = "lm-studio"
LLAMA_CPP: Final = "llama.cpp"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class _LmStudioSettings(msgspec.Struct, frozen=True, rename="camel"):
    downloads_folder: str = ""


class _LargeFile(msgspec.Struct, frozen=True):
    sha256: str = ""
    size: int = -1


class _ManifestFile(msgspec.Struct, frozen=True):
    rfilename: str = ""
    lfs: _LargeFile | None = None


class _Manifest(msgspec.Struct, frozen=True, rename="camel"):
    gguf_file: _ManifestFile | None = None
    mmproj_file: _ManifestFile | None = None


def scan_lm_studio(env: Mapping[str, str], home: Path) -> Iterator[Found]:
    """Yield the models in LM Studio's folders."""
    for root in roots(_lm_studio_folders(env, home)):
        files: dict[str, LyingFile] = {}
        for path in root.files(root.path):
            if path.suffix.lower() == ".gguf" and (size := root.size_of_gguf(path)) is not None:
                files[path.relative_to(root.path).as_posix()] = LyingFile(path, size)
        for names, projector in whole_models(files):
            parts = [files[name] for name in names]
            model = found(
                LM_STUDIO, names[0], file_ref(parts[0].path), parts,
                projector=files[projector] if projector is not None else None,
            )  # fmt: skip
            if model is not None:
                yield model


def scan_llama_cpp(env: Mapping[str, str], home: Path) -> Iterator[Found]:
    """Yield the models in llama.cpp's own cache."""
    own = folder_in(env, "LLAMA_CACHE", home)
    caches = folder_in(env, "XDG_CACHE_HOME", home) or home / ".cache"
    folders = [own] if own is not None else [caches / "llama.cpp", home / "Library/Caches/llama.cpp"]
    for root in roots(folders):
        files: dict[str, LyingFile] = {}
        manifests: list[Path] = []
        for path in root.files(root.path, depth=1):
            if path.name.startswith("manifest=") and path.suffix == ".json":
                manifests.append(path)
            elif path.suffix.lower() == ".gguf" and (size := root.size_of_gguf(path)) is not None:
                files[path.name] = LyingFile(path, size)
        projectors = _read_manifests(root, manifests, files)
        # Models of all repositories lie beside each other: only a manifest tells whose a projector is.
        models = {name: file for name, file in files.items() if not is_projector(name)}
        for names, _ in whole_models(models):
            parts = [files[name] for name in names]
            projector = projectors.get(names[0])
            model = found(LLAMA_CPP, names[0], file_ref(parts[0].path), parts, projector=projector)
            if model is not None:
                yield model


def _lm_studio_folders(env: Mapping[str, str], home: Path) -> list[Path | None]:
    config = folder_in(env, "XDG_CONFIG_HOME", home) or home / ".config"
    folders: list[Path | None] = []
    for place in (config / "LM Studio", home / "Library/Application Support/LM Studio"):
        for root in roots([place]):
            settings = root.note(root.path / "settings.json", _LmStudioSettings)
            folders.append(folder_named(settings.downloads_folder, home) if settings is not None else None)
    for root in roots([home]):
        pointer = root.text(root.path / ".lmstudio-home-pointer") or b""
        pointed = folder_named(pointer.decode("utf-8", "replace"), home)
        folders.append(pointed / "models" if pointed is not None else None)
    return [*folders, home / ".cache/lm-studio/models", home / ".lmstudio/models"]


def _read_manifests(root: Root, manifests: list[Path], files: dict[str, LyingFile]) -> dict[str, LyingFile]:
    """Note the checksums that manifests tell in `files`; return projectors by the names of their models."""
    projectors: dict[str, LyingFile] = {}
    for path in manifests:
        manifest = root.note(path, _Manifest)
        # manifest=ORG=REPO=TAG.json or manifest=ORG_REPO=TAG.json: the tag is no part of a file's name.
        prefix = "_".join(path.stem.split("=")[1:-1])
        if manifest is None or not prefix:
            continue
        names = []
        for told in (manifest.gguf_file, manifest.mmproj_file):
            name = f"{prefix}_{told.rfilename.replace('/', '_')}" if told is not None else ""
            file = files.get(name)
            names.append(name if file is not None else None)
            if file is None or told is None or told.lfs is None or told.lfs.size != file.size_bytes:
                continue
            if _SHA256.fullmatch(told.lfs.sha256):
                files[name] = LyingFile(file.path, file.size_bytes, told.lfs.sha256)
        model, projector = names
        if model is not None and projector is not None:
            projectors[model] = files[projector]
    return projectors
