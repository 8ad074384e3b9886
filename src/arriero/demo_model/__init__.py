"""Where is the demo model, and is it whole? A tiny language model that ships with the package."""

from pathlib import Path
from typing import Final

#: SHA-256 of the model file; `python -m tools.train_demo.export` writes it and the size below.
SHA256: Final[str] = "6eea75e1e1969fdec6e33f77eb8eecab5441fc196b57e228fbf386ffc8044494"
SIZE_BYTES: Final[int] = 968_128


def path() -> Path:
    """Return the path of the model file."""
    return Path(__file__).with_name("demo.gguf")
