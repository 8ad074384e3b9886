"""Does admission keep its slots, its queue and its promises to everybody who waits?"""

from hypothesis import given
from hypothesis import strategies as st

from arriero.contracts.errors import ErrorCode
from arriero.domain.admission import START, Admission, Refuse, Start, Wait


def test_starts_while_a_slot_is_free_then_queues_in_order() -> None:
    admission = Admission(slots=2, queue_max=2)
    decisions = [admission.arrive(name) for name in "abcd"]
    assert decisions == [START, START, Wait(1), Wait(2)]
    assert admission.positions() == {"c": 1, "d": 2}
    assert (admission.busy, admission.queued) == (2, 2)


def test_refuses_when_the_queue_is_full_and_says_the_numbers() -> None:
    admission = Admission(slots=1, queue_max=1)
    admission.arrive("a")
    admission.arrive("b")
    refused = admission.arrive("c")
    assert isinstance(refused, Refuse)
    assert refused.code is ErrorCode.QUEUE_FULL
    assert "1 slots" in refused.message and "the limit is 1" in refused.message


def test_refuses_who_may_not_wait_also_where_the_queue_is_full() -> None:
    admission = Admission(slots=1, queue_max=0)
    admission.arrive("a")
    refused = admission.arrive("b", may_queue=False)
    assert isinstance(refused, Refuse)
    assert refused.code is ErrorCode.ALL_SLOTS_BUSY


def test_refuses_an_id_that_is_inside_whether_it_computes_or_waits() -> None:
    admission = Admission(slots=1, queue_max=1)
    admission.arrive("a")
    admission.arrive("b")
    for name in "ab":
        refused = admission.arrive(name)
        assert isinstance(refused, Refuse)
        assert refused.code is ErrorCode.REQUEST_ID_IN_USE


def test_who_leaves_the_queue_starts_nobody_and_moves_the_others_up() -> None:
    admission = Admission(slots=1, queue_max=3)
    for name in "abcd":
        admission.arrive(name)
    assert admission.leave("b") is None
    assert admission.positions() == {"c": 1, "d": 2}
    assert admission.leave("a") == "c"
    assert admission.leave("a") is None


Step = tuple[str, int, bool]
_STEPS = st.lists(
    st.tuples(st.sampled_from(["arrive", "leave"]), st.integers(0, 9), st.booleans()), max_size=60
)


@given(slots=st.integers(1, 4), queue_max=st.integers(0, 4), steps=_STEPS)
def test_any_history_keeps_the_bounds_and_loses_nobody(slots: int, queue_max: int, steps: list[Step]) -> None:
    admission = Admission(slots=slots, queue_max=queue_max)
    computing: set[str] = set()
    waiting: list[str] = []
    for kind, number, may_queue in steps:
        name = f"r{number}"
        if kind == "arrive":
            decision = admission.arrive(name, may_queue=may_queue)
            if isinstance(decision, Start):
                assert not waiting, "nobody overtakes"
                computing.add(name)
            elif isinstance(decision, Wait):
                waiting.append(name)
                assert decision.position == len(waiting)
            else:
                assert name in computing or name in waiting or len(computing) == slots
        else:
            following = admission.leave(name)
            was_computing = name in computing
            computing.discard(name)
            if name in waiting:
                waiting.remove(name)
            assert following == (waiting[0] if was_computing and waiting else None)
            if following is not None:
                computing.add(waiting.pop(0))
        assert admission.busy == len(computing) <= slots
        assert admission.queued == len(waiting) <= queue_max
        assert admission.positions() == {name: place for place, name in enumerate(waiting, start=1)}
        assert not waiting or admission.busy == slots, "nobody waits while a slot is free"
        assert all(name in admission for name in (*computing, *waiting))
