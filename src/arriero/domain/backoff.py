"""How long is to be waited before the next attempt?"""

import email.utils
from typing import Final

BASE_S: Final = 0.1
CAP_S: Final = 30.0
#: A server's `Retry-After` is believed up to here; a longer one is as good as a refusal.
RETRY_AFTER_MAX_S: Final = 300.0


def delay_s(attempt: int, chance: float, base_s: float = BASE_S, cap_s: float = CAP_S) -> float:
    """Return the wait before the attempt that follows number `attempt` (the first is 1).

    Full jitter: anything from 0 to `base_s` doubled with each attempt, never more than `cap_s`, so
    that many who failed together do not come back together.  `chance` is in [0, 1).
    """
    assert attempt >= 1 and 0.0 <= chance < 1.0, (attempt, chance)
    # 2**1024 is beyond a float; the cap is reached long before.
    return chance * min(cap_s, base_s * 2.0 ** min(attempt - 1, 64))


def retry_after_s(header: str | None, now_unix: float) -> float | None:
    """Return how long a `Retry-After` header asks to wait; None if there is none or it says nothing.

    It holds seconds or a date; a date that is past means 0.  Never more than `RETRY_AFTER_MAX_S`.
    """
    if header is None:
        return None
    text = header.strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:9]), RETRY_AFTER_MAX_S)
    try:
        when = email.utils.parsedate_to_datetime(text)
        asked_s = when.timestamp() - now_unix
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return min(max(asked_s, 0.0), RETRY_AFTER_MAX_S)
