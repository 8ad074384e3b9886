"""Is a wait bounded, growing and never surprised by what a server writes?"""

import email.utils

from hypothesis import given
from hypothesis import strategies as st

from arriero.domain.backoff import CAP_S, RETRY_AFTER_MAX_S, delay_s, retry_after_s

CHANCES = st.floats(0.0, 1.0, exclude_max=True)
ATTEMPTS = st.integers(1, 10_000)


@given(ATTEMPTS, CHANCES)
def test_a_delay_is_within_zero_and_the_cap(attempt: int, chance: float) -> None:
    assert 0.0 <= delay_s(attempt, chance) <= CAP_S


@given(ATTEMPTS, CHANCES)
def test_more_attempts_never_wait_less_by_the_same_chance(attempt: int, chance: float) -> None:
    assert delay_s(attempt, chance) <= delay_s(attempt + 1, chance)


@given(ATTEMPTS, CHANCES, CHANCES)
def test_a_delay_follows_its_chance(attempt: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert delay_s(attempt, low) <= delay_s(attempt, high)


def test_the_limits_double_up_to_the_cap() -> None:
    assert [delay_s(attempt, 0.5) for attempt in (1, 2, 3)] == [0.05, 0.1, 0.2]
    assert delay_s(30, 0.5) == 15.0
    assert delay_s(3, 0.5, base_s=1.0, cap_s=2.0) == 1.0


@given(st.text())
def test_any_header_gives_none_or_a_bounded_wait(header: str) -> None:
    wait_s = retry_after_s(header, 1_700_000_000.0)
    assert wait_s is None or 0.0 <= wait_s <= RETRY_AFTER_MAX_S


@given(st.floats(0, 4_000_000_000), st.floats(0, 4_000_000_000))
def test_a_date_is_counted_from_now(when_unix: float, now_unix: float) -> None:
    wait_s = retry_after_s(email.utils.formatdate(int(when_unix), usegmt=True), now_unix)
    assert wait_s == min(max(int(when_unix) - now_unix, 0.0), RETRY_AFTER_MAX_S)


def test_seconds_and_nonsense() -> None:
    assert retry_after_s("7", 0.0) == 7.0
    assert retry_after_s(" 0 ", 0.0) == 0.0
    assert retry_after_s("9" * 400, 0.0) == RETRY_AFTER_MAX_S
    for nonsense in ("-1", "soon", "", "１２", "Thu, 99 Foo 2024"):
        assert retry_after_s(nonsense, 0.0) is None
    assert retry_after_s(None, 0.0) is None
