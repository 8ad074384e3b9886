"""How do other programs lay out their models?  Written down as their own code does it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

COMMIT = "c" * 40


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def hf_cache(
    hub: Path, repo: str, files: Mapping[str, bytes], *, commit: str = COMMIT, ref: str | None = "main"
) -> Path:
    """Write a repository as huggingface_hub does; return the snapshot's folder."""
    folder = hub / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for name, content in files.items():
        blob = folder / "blobs" / sha256(content)
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("../" * (2 + name.count("/"))) / "blobs" / blob.name)
    if ref is not None:
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


def ollama(models: Path, name: str, weights: bytes, projector: bytes | None = None) -> Path:
    """Write a model as Ollama does; `name` is HOST/NAMESPACE/NAME/TAG.  Return its manifest."""
    layers = [_layer(models, "model", weights), _layer(models, "license", b"MIT")]
    if projector is not None:
        layers.append(_layer(models, "projector", projector))
    manifest = models / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "config": layers[1], "layers": layers}))
    return manifest


def _layer(models: Path, kind: str, content: bytes) -> dict[str, object]:
    digest = sha256(content)
    blob = models / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    media_type = f"application/vnd.ollama.image.{kind}"
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}


def llama_cpp(
    cache: Path, repo: str, name: str, content: bytes, *, projector: tuple[str, bytes] | None = None,
    tag: str = "latest", is_old: bool = False,
) -> Path:  # fmt: skip
    """Write a model as llama.cpp's `-hf` did; return its file."""
    cache.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, object] = {}
    for key, file in (("ggufFile", (name, content)), ("mmprojFile", projector)):
        if file is not None:
            told = {"sha256": sha256(file[1]), "size": len(file[1])}
            manifest[key] = {"rfilename": file[0], "size": len(file[1]), "lfs": told}
            (cache / f"{repo}_{file[0]}".replace("/", "_")).write_bytes(file[1])
    (cache / f"manifest={repo.replace('/', '_' if is_old else '=')}={tag}.json").write_text(
        json.dumps(manifest)
    )
    return cache / f"{repo}_{name}".replace("/", "_")
