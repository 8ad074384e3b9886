"""Which format has a model's file, and can it be believed?

By its first bytes, not by its name: a pickle called `model.gguf` is still one.  Pickles are programs:
loading one runs it.  No engine is ever given one.
"""

from pathlib import Path
from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.engines import gguf, safetensors
from arriero.engines.base import ModelFacts
from arriero.engines.model_file import opened

_ZIP: Final = (b"PK\x03\x04", b"PK\x05\x06")
#: Protocols 2 to 5 begin so; older ones are texts, known by their first operations.
_PICKLES: Final = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_OLD_PICKLES: Final = (
    b"}q\x00",
    b"]q\x00",
    b"(dp",
    b"(lp",
    b"(ip",
    b"ccopy_reg\n",
    b"c__builtin__\n",
    b"cos\n",
    b"cposix\n",
    b"ctorch",
)
#: Old PyTorch files are tar archives of pickles.
_TAR_MAGIC_AT: Final = 257


def inspect_model(path: Path) -> ModelFacts:
    """Return the facts of the model in `path`, its first part where it is split.

    Raises INVALID_MODEL_PATH (no such file, not a file, no rights) and MODEL_CORRUPTED (what is
    wrong, and where; also for pickles and for what is no model at all).
    """
    if format_of(path) == "safetensors":
        return safetensors.inspect(path)
    return gguf.inspect(path)


def refuse_all_but_gguf(path: Path, engine: str) -> None:
    """Raise BACKEND_UNAVAILABLE if `path` is a model that `engine` does not read.

    Raises also as `format_of` does.
    """
    if format_of(path) == "safetensors":
        raise ArrieroError(
            ErrorCode.BACKEND_UNAVAILABLE,
            f"the engine {engine} reads GGUF, and no engine here reads safetensors: "
            "use a GGUF build of the model",
            format="safetensors",
            engine=engine,
        )


def format_of(path: Path) -> str:
    """Return `gguf` or `safetensors`; what is neither counts as a broken file of what its name says.

    Raises INVALID_MODEL_PATH, and MODEL_CORRUPTED for pickles.
    """
    with opened(path) as file:
        head = file.read_at(0, _TAR_MAGIC_AT + 5)
        if head.startswith(b"GGUF"):
            return "gguf"
        if safetensors.is_safetensors(head, file.size_bytes):
            return "safetensors"
        if what := _pickle(head):
            raise ArrieroError(
                ErrorCode.MODEL_CORRUPTED,
                f"{file.name}: {what}; pickles run code when they are loaded and are never used: "
                "take a GGUF or safetensors file",
                file=file.name,
            )
    return "safetensors" if path.suffix.lower() == ".safetensors" else "gguf"


def _pickle(head: bytes) -> str | None:
    """Return what kind of pickle begins so, None if it is none."""
    if head.startswith(_ZIP):
        return "a zip archive, as PyTorch puts its pickles in"
    if head[_TAR_MAGIC_AT:] == b"ustar":
        return "a tar archive, as PyTorch put its pickles in"
    if head.startswith((*_PICKLES, *_OLD_PICKLES)):
        return "a Python pickle"
    return None
