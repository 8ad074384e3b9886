"""Where is the demo model, and is it whole? A tiny language model that ships with the package."""

from pathlib import Path
from typing import Final

#: SHA-256 of the model file; `python -m tools.train_demo.export` writes it and the size below.
SHA256: Final[str] = "dfa13774bd938bb2825d4fe38c2561b002bee4a6f33dd087c3121cb030716595"
SIZE_BYTES: Final[int] = 968_128


def path() -> Path:
    """Return the path of the model file."""
    return Path(__file__).with_name("demo.gguf")
