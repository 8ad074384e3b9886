"""How does one deadline shrink over the hops, so that the innermost part gives up first?

The client sets the remaining milliseconds once (`X-Request-Deadline`, or the body's `timeout`);
each hop passes on what is left less a margin.  So the engine's request is closed first, then the
worker answers, then the orchestrator, and the client hears a proper REQUEST_TIMEOUT.

The margin is for the inner one's work to stop; the way there and back has no limit that is known.
So whoever has passed the work on waits for the word of it a while beyond its own deadline.
"""

from typing import Final

MARGIN_FRACTION: Final = 0.02
MARGIN_MIN_MS: Final = 20.0
MARGIN_MAX_MS: Final = 250.0
#: How long the word of the next hop is waited for when it is due: ways of some hundred ms, machines
#: that are busy.  Less than what a command waits for the orchestrator in its turn.
WORD_MS: Final = 1000.0
REMAINING_MS_MAX: Final = 86_400_000.0


def for_next_hop(remaining_ms: float) -> float:
    """Return what the next hop is given of `remaining_ms`, never below 1 ms."""
    margin = min(max(remaining_ms * MARGIN_FRACTION, MARGIN_MIN_MS), MARGIN_MAX_MS)
    return max(remaining_ms - margin, 1.0)


def tightest(*limits_ms: float | None) -> float | None:
    """Return the smallest limit that is given, None if none is: a deadline is never extended."""
    given = [limit for limit in limits_ms if limit is not None]
    return min(given, default=None)


def parse_header(text: str) -> float:
    """Return the milliseconds of an `X-Request-Deadline`.

    Raises ValueError if `text` is no number within 1 ms … one day.
    """
    value = float(text)
    if not 1.0 <= value <= REMAINING_MS_MAX:
        raise ValueError(f"{value} is not within 1 … {REMAINING_MS_MAX:.0f} ms")
    return value
