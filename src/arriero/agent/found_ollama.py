"""Which models has Ollama pulled?

Its layout (ollama, `manifest/paths.go` and `server/layer.go`):

    MODELS/manifests/HOST/NAMESPACE/NAME/TAG    JSON: layers with mediaType, digest "sha256:HEX", size
    MODELS/blobs/sha256-HEX                     a layer; one that is still fetched ends in -partial…

The weights are the layer of the type `…image.model`, a projector that of `…image.projector`.  MODELS
is OLLAMA_MODELS, else ~/.ollama/models; the Linux service has /usr/share/ollama/.ollama/models.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from arriero.agent.found_files import Found, LyingFile, Root, file_ref, folder_in, found, roots

SOURCE: Final = "ollama"
_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
_MODEL: Final = "application/vnd.ollama.image.model"
_PROJECTOR: Final = "application/vnd.ollama.image.projector"
#: HOST/NAMESPACE/NAME/TAG.
_MANIFEST_DEPTH: Final = 4
#: What people leave out when they name a model.
_USUAL: Final = ("registry.ollama.ai", "library")


class _Layer(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str = ""
    digest: str = ""
    size: int = -1


class _Manifest(msgspec.Struct, frozen=True):
    layers: list[_Layer] = []


def scan(env: Mapping[str, str], home: Path, system: Path) -> Iterator[Found]:
    """Yield the models that are whole; one that has several tags is told once, with all its names."""
    own = folder_in(env, "OLLAMA_MODELS", home) or home / ".ollama/models"
    for root in roots([own, system / "usr/share/ollama/.ollama/models"]):
        by_paths: dict[tuple[Path, ...], Found] = {}
        for model in _of_root(root):
            other = by_paths.get(model.paths)
            names = f"{other.name}, {model.name}" if other is not None else model.name
            by_paths[model.paths] = dataclasses.replace(model, name=names)
        yield from by_paths.values()


def _of_root(root: Root) -> Iterator[Found]:
    manifests = root.path / "manifests"
    for path in root.files(manifests, _MANIFEST_DEPTH):
        names = path.relative_to(manifests).parts
        manifest = root.note(path, _Manifest) if len(names) == _MANIFEST_DEPTH else None
        if manifest is None:
            continue
        weights = [_blob(root, layer) for layer in manifest.layers if layer.media_type == _MODEL]
        projectors = [_blob(root, layer) for layer in manifest.layers if layer.media_type == _PROJECTOR]
        # Several layers of weights are no parts that llama.cpp could put together.
        if len(weights) != 1 or weights[0] is None or None in projectors:
            continue
        model = found(
            SOURCE, _name(names), file_ref(weights[0].path), [weights[0]],
            projector=projectors[0] if projectors else None,
        )  # fmt: skip
        if model is not None:
            yield model


def _blob(root: Root, layer: _Layer) -> LyingFile | None:
    match = _DIGEST.fullmatch(layer.digest)
    if match is None:
        return None
    path = root.path / "blobs" / f"sha256-{match[1]}"
    size = root.size_of_gguf(path)
    return LyingFile(path, size, match[1]) if size is not None and size == layer.size else None


def _name(names: tuple[str, ...]) -> str:
    *place, name, tag = names
    if place[0] == _USUAL[0]:
        place = place[1:]
        place = [] if place == [_USUAL[1]] else place
    return f"{'/'.join([*place, name])}:{tag}"
