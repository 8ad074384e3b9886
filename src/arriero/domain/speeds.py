"""How fast is each node with each model, as its requests showed?"""

from typing import Final

#: Weight of the newest request: the mean forgets half of what it knew within some three requests.
WEIGHT: Final = 0.2
#: Shorter answers tell of the prompt and the way, not of the speed.
TOKENS_MIN: Final = 8


class Speeds:
    """Tokens a second by model and node, as exponential means; kept in memory alone."""

    def __init__(self) -> None:
        self._by_model: dict[str, dict[str, float]] = {}

    def finished(self, node: str, model_ref: str, *, tokens: int, duration_ms: float) -> float | None:
        """Take one finished request; return the mean now, None if it was too short to tell."""
        if tokens < TOKENS_MIN or duration_ms <= 0:
            return None
        measured = tokens * 1000.0 / duration_ms
        nodes = self._by_model.setdefault(model_ref, {})
        before = nodes.get(node)
        nodes[node] = measured if before is None else before + WEIGHT * (measured - before)
        return nodes[node]

    def of(self, model_ref: str) -> dict[str, float]:
        """Return the nodes that computed with a model, with their speeds."""
        return self._by_model.get(model_ref, {})
