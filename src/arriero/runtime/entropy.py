"""Where does chance come from?"""

import random
import secrets
from typing import Protocol


class Entropy(Protocol):
    """Chance, handed in through constructors."""

    def chance(self) -> float:
        """Return a number in [0, 1)."""
        ...

    def hex(self, digits: int) -> str:
        """Return so many random hex digits, fit for a secret."""
        ...


class SystemEntropy:
    """The machine's randomness."""

    def chance(self) -> float:
        """Return a number in [0, 1)."""
        return random.random()

    def hex(self, digits: int) -> str:
        """Return so many random hex digits, fit for a secret."""
        return secrets.token_hex((digits + 1) // 2)[:digits]


class SeededEntropy:
    """The same chance each time, for tests."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self) -> float:
        """Return a number in [0, 1)."""
        return self._random.random()

    def hex(self, digits: int) -> str:
        """Return so many hex digits."""
        return f"{self._random.getrandbits(digits * 4):0{digits}x}"
