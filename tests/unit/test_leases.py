"""Does a node ever answer two, or somebody from before a cut, whatever order they come in?"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.fence import FENCE_NUMBER_MAX, Fence, holder_id
from arriero.domain.leases import NEVER, Granted, Lease, Refused, may_ask, may_hold, next_number

A, B = "a" * 16, "b" * 16
SILENCE_S = 3.0
FENCES = st.builds(Fence, st.sampled_from([A, B, "c" * 16]), st.integers(1, 12))
SILENT = st.floats(0, 10)


@given(FENCES)
def test_a_header_says_what_was_said(fence: Fence) -> None:
    assert Fence.parse(str(fence)) == fence


@pytest.mark.parametrize(
    "header",
    ["", A, f"{A}:", f"{A}:0", f"{A}:-1", f"{A}:01", f"{A}: 1", f"{A}:1\n", f"{A[1:]}:1", f"{A}a:1", f"{A.upper()}:1",
     f"{A}:{FENCE_NUMBER_MAX + 1}", f"{A}:{'9' * 5000}", f"{A}:1:1", f"{A}:١", f"{'g' * 16}:1"],
)  # fmt: skip
def test_what_is_no_header(header: str) -> None:
    with pytest.raises(ArrieroError) as refused:
        Fence.parse(header)
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert len(refused.value.message) < 300


def test_the_bounds_of_a_header() -> None:
    assert Fence.parse(f"{A}:{FENCE_NUMBER_MAX}").number == FENCE_NUMBER_MAX
    assert Fence.parse(f"{holder_id('0123456789abcdef0123')}:1").holder == "0123456789abcdef"


@given(st.lists(st.tuples(FENCES, SILENT)))
def test_numbers_only_rise_and_nobody_is_pushed_aside(opened: list[tuple[Fence, float]]) -> None:
    held = NEVER
    for asked, silent_s in opened:
        lease = Lease(held, silent_s)
        decision = may_hold(lease, asked, silence_max_s=SILENCE_S)
        if isinstance(decision, Refused):
            continue
        assert asked.number >= held.number
        if asked != held:
            assert decision.is_new and asked.number > held.number
            assert asked.holder == held.holder or held == NEVER or silent_s >= SILENCE_S
        held = asked


@given(FENCES, FENCES, SILENT)
def test_the_holder_is_answered_or_who_may_follow_and_never_under_an_old_number(
    held: Fence, asked: Fence, silent_s: float
) -> None:
    answer = may_ask(Lease(held, silent_s), asked, silence_max_s=SILENCE_S)
    of_holder = asked.holder == held.holder and asked.number >= held.number
    of_next = asked.number > held.number and silent_s >= SILENCE_S
    assert isinstance(answer, Granted) == (of_holder or of_next)


@given(FENCES, SILENT)
def test_the_same_holder_comes_back_at_once(held: Fence, silent_s: float) -> None:
    lease = Lease(held, silent_s)
    assert may_hold(lease, held, silence_max_s=SILENCE_S) == Granted()
    again = Fence(held.holder, next_number(held.number))
    assert may_hold(lease, again, silence_max_s=SILENCE_S) == Granted(is_new=True)


@given(FENCES, st.integers(0, 20))
def test_another_holder_has_a_number_after_one_refusal(held: Fence, own: int) -> None:
    asked = Fence("d" * 16, next_number(own, held.number))
    assert isinstance(may_hold(Lease(held, SILENCE_S - 0.1), asked, silence_max_s=SILENCE_S), Refused)
    assert may_hold(Lease(held, SILENCE_S), asked, silence_max_s=SILENCE_S) == Granted(is_new=True)


@given(FENCES, SILENT)
def test_a_node_that_nobody_has_held_takes_anybody(asked: Fence, silent_s: float) -> None:
    assert may_hold(Lease(NEVER, silent_s), asked, silence_max_s=SILENCE_S) == Granted(is_new=True)
    assert may_ask(Lease(NEVER, silent_s), asked, silence_max_s=SILENCE_S) == Granted()


def test_numbers_end_somewhere() -> None:
    assert next_number(0) == 1 and next_number(5, 3) == 6 and next_number(3, 5) == 6
    assert next_number(FENCE_NUMBER_MAX - 1) == FENCE_NUMBER_MAX
    with pytest.raises(OverflowError):
        next_number(FENCE_NUMBER_MAX)
