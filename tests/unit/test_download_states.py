"""Do the arrows of a download say what the design says?"""

import itertools

import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.states import DownloadState as S
from arriero.domain.download_states import DOWNLOADS


def test_the_usual_way_and_the_way_of_a_second_fetch() -> None:
    way = [S.QUEUED, S.DOWNLOADING, S.VERIFYING, S.DOWNLOADING, S.VERIFYING, S.COMPLETE]
    for before, after in itertools.pairwise(way):
        DOWNLOADS.check(before, after)


def test_final_states_have_no_arrow() -> None:
    assert DOWNLOADS.final == {S.COMPLETE, S.FAILED, S.CANCELLED}


@pytest.mark.parametrize(
    ("before", "after"),
    [(S.DOWNLOADING, S.QUEUED), (S.DOWNLOADING, S.COMPLETE), (S.COMPLETE, S.FAILED), (S.QUEUED, S.QUEUED)],
)
def test_other_arrows_raise(before: S, after: S) -> None:
    with pytest.raises(ArrieroError) as refused:
        DOWNLOADS.check(before, after)
    assert refused.value.code is ErrorCode.INVALID_STATE_TRANSITION


def test_every_running_state_may_fail_or_be_cancelled() -> None:
    for state in set(S) - DOWNLOADS.final:
        assert {S.FAILED, S.CANCELLED} <= DOWNLOADS.arrows[state]
