"""Does a cap hold over any time, for any takers, and waste nothing?"""

from hypothesis import given
from hypothesis import strategies as st

from arriero.domain.token_bucket import TokenBucket

TAKES = st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 5)), min_size=1, max_size=60)


@given(st.floats(1, 1e9), st.floats(0, 1e6), TAKES)
def test_never_more_than_the_rate_and_one_burst(
    rate: float, burst: float, takes: list[tuple[float, float]]
) -> None:
    """Everybody waits as told and then dawdles a little; the last one's wait is over at the end."""
    bucket, now_s, taken = TokenBucket(rate, burst), 100.0, 0.0
    for amount, dawdle_s in takes:
        wait_s = bucket.take(amount, now_s)
        taken += amount
        assert taken <= (rate * (now_s + wait_s - 100.0) + burst) * (1 + 1e-6) + 1e-3
        now_s += wait_s + dawdle_s


@given(st.floats(1, 1e9), st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_many_at_the_same_moment_share_the_rate(rate: float, amounts: list[float]) -> None:
    bucket = TokenBucket(rate, 0.0)
    waits = [bucket.take(amount, 5.0) for amount in amounts]
    assert waits == sorted(waits)
    assert abs(waits[-1] * rate - sum(amounts)) <= 1e-6 * sum(amounts) + 1e-6


def test_rest_is_not_saved_beyond_the_burst() -> None:
    bucket = TokenBucket(10.0, 5.0)
    assert bucket.take(5.0, 0.0) == 0.0
    assert bucket.take(5.0, 1000.0) == 0.0
    assert bucket.take(5.0, 1000.0) == 0.5


def test_a_clock_that_stands_or_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(10.0, 0.0)
    assert bucket.take(10.0, 50.0) == 1.0
    assert bucket.take(10.0, 40.0) == 2.0
    assert bucket.take(0.0, 50.0) == 2.0
