"""When is a program that crashed started again by its keeper?

At once if it ran well, later and later if it ends again and again; never not at all: what stops it may
be mended by somebody who does not know of the keeper.
"""

from dataclasses import dataclass
from typing import Final

#: A program that lived so long has run well.
WELL_S: Final = 60.0
FIRST_DELAY_S: Final = 1.0
DELAY_MAX_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Keeping:
    """How often in a row a program ended early."""

    early_ends: int = 0

    def ended(self, lived_s: float) -> "Keeping":
        """Return what is known after one more end."""
        return Keeping(1 if lived_s >= WELL_S else self.early_ends + 1)

    @property
    def delay_s(self) -> float:
        """How long is waited before the next start."""
        if self.early_ends <= 1:
            return 0.0
        # 2**1024 is beyond a float; the limit is reached long before.
        return min(DELAY_MAX_S, FIRST_DELAY_S * 2.0 ** min(self.early_ends - 2, 64))
