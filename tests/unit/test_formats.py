"""Is a model's format known by its bytes, and is a pickle refused whatever it is called?"""

import asyncio
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import psutil
import pytest

from arriero import demo_model
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines import formats, registry
from arriero.engines.base import EngineSpec

SAFETENSORS = (2).to_bytes(8, "little") + b"{}"


class Program:
    """What loading it would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("loaded",)


def pickles() -> dict[str, bytes]:
    archive, tape = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps({}))
    with tarfile.open(fileobj=tape, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    return {
        "zip": archive.getvalue(),
        "tar": tape.getvalue(),
        **{f"protocol {number}": pickle.dumps({"a": Program()}, number) for number in range(6)},
        "old program": pickle.dumps(Program(), 0),
    }


@pytest.mark.parametrize("kind", pickles())
@pytest.mark.parametrize("name", ["m.gguf", "m.safetensors", "m.bin", "m"])
def test_a_pickle_is_refused_under_any_name(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pickles()[kind])
    with pytest.raises(ArrieroError) as caught:
        formats.inspect_model(path)
    assert caught.value.code is ErrorCode.MODEL_CORRUPTED
    assert caught.value.message.startswith(f"{name}: a ")
    assert "pickles run code when they are loaded" in caught.value.message


def test_formats_are_known_by_their_bytes(tmp_path: Path) -> None:
    model = tmp_path / "m.bin"
    model.write_bytes(demo_model.path().read_bytes())
    assert formats.inspect_model(model).format == "gguf"
    model.write_bytes(SAFETENSORS)
    assert formats.inspect_model(model).format == "safetensors"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("m.gguf", b"", "the file is empty"),
        ("m.gguf", b"<html>not found</html>", "not a GGUF file: it begins with b'<htm'"),
        ("m", b"\x7fELF" + bytes(100), "not a GGUF file"),
        ("m.safetensors", b"<html>not found</html>", "a header of"),
        ("m.SAFETENSORS", b"{}", "2 bytes are no safetensors file"),
    ],
)
def test_what_is_no_model_is_a_broken_one_of_what_its_name_says(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ArrieroError) as caught:
        formats.inspect_model(path)
    assert caught.value.code is ErrorCode.MODEL_CORRUPTED
    assert says in caught.value.message


def test_llama_cpp_is_given_no_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(SAFETENSORS)
    kind = registry.kind("llamacpp")
    spec = EngineSpec(path, run_dir=tmp_path / "run")

    async def load() -> None:
        async for _ in kind.create().load(spec):
            pass

    for ask in (
        lambda: kind.inspect(path),
        lambda: asyncio.run(kind.estimate(spec)),
        lambda: asyncio.run(load()),
    ):
        with pytest.raises(ArrieroError) as caught:
            ask()
        assert caught.value.code is ErrorCode.BACKEND_UNAVAILABLE
        assert "no engine here reads safetensors: use a GGUF build" in caught.value.message
    assert not (tmp_path / "run").exists()
    assert not psutil.Process().children()
