"""How fast does a worker generate, as its requests showed?"""

from typing import Final

#: Weight of the newest request: the mean forgets half of what it knew within some three requests.
WEIGHT: Final = 0.2
#: Shorter answers tell more of chance than of the speed.
TOKENS_MIN: Final = 8


class Speed:
    """Tokens a second, as an exponential mean."""

    def __init__(self) -> None:
        #: 0: not measured yet.
        self.tokens_per_s = 0.0

    def finished(self, *, tokens: int, seconds: float) -> None:
        """Take one answer: the tokens after its first one, and how long they took."""
        if tokens < TOKENS_MIN or seconds <= 0:
            return
        measured = tokens / seconds
        before = self.tokens_per_s
        self.tokens_per_s = measured if before <= 0 else before + WEIGHT * (measured - before)
