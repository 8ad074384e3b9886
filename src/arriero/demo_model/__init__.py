"""Where is the demo model, and is it whole? A tiny language model that ships with the package."""

from pathlib import Path
from typing import Final

#: SHA-256 of the model file; `python -m tools.train_demo.export` writes it and the size below.
SHA256: Final[str] = "b7946b9c51b66e3f58d25205b266c5193780cb0a899deccc572ce3a76709a3a7"
SIZE_BYTES: Final[int] = 968_128


def path() -> Path:
    """Return the path of the model file."""
    return Path(__file__).with_name("demo.gguf")
