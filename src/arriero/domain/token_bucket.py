"""How long must who has taken so much wait, so that all together stay below a rate?"""


class TokenBucket:
    """A rate with a little room for bursts.  What is taken beyond it is a debt, waited for afterwards.

    So whoever takes need not know before how much it will be, and nobody is starved: the wait
    grows with what was taken.
    """

    def __init__(self, rate_per_s: float, burst: float) -> None:
        assert rate_per_s > 0 and burst >= 0, (rate_per_s, burst)
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._tokens = burst
        self._at_s: float | None = None

    def take(self, amount: float, now_s: float) -> float:
        """Take `amount` at a monotonic moment; return how long to wait before the next one."""
        assert amount >= 0, amount
        if self._at_s is not None:
            gained = max(now_s - self._at_s, 0.0) * self._rate_per_s
            self._tokens = min(self._tokens + gained, self._burst)
        self._at_s = now_s if self._at_s is None else max(now_s, self._at_s)
        self._tokens -= amount
        return max(-self._tokens / self._rate_per_s, 0.0)
