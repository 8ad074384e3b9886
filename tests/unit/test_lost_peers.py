"""Is a peer that was lost waited for as long as that helps, and no longer?"""

import itertools

import pytest

from arriero.agent.fetch_types import FetchLimits
from arriero.agent.lost_peers import Wishes
from arriero.agent.progress import Job
from arriero.agent.retries import AttemptFailed, Retries, RetryLimits
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import PeerSource
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SeededEntropy

LIMITS = FetchLimits(retry=RetryLimits(attempts=50, base_s=0.0001, cap_s=0.001), peer_back_s=20.0)
CUT = ArrieroError(ErrorCode.DOWNLOAD_FAILED, "cut")


class _Ticking(SystemClock):
    """One for which a second passes at each look."""

    def __init__(self) -> None:
        self._seconds = itertools.count()

    def monotonic_s(self) -> float:
        """Return the next second."""
        return next(self._seconds)


class _Source:
    """Fails for ever; at some attempts somebody tells of peers."""

    def __init__(self, wishes: Wishes, told_at: range) -> None:
        self.attempts = 0
        self.rounds = 0
        self.clock = _Ticking()
        self._wishes = wishes
        self._told_at = told_at
        self.job = Job(
            download_id="d-1", model_ref="hf:o/r", clock=self.clock, interval_s=0.0,
            on_change=lambda _: None, started_unix=0.0,
        )  # fmt: skip

    async def obtained(self) -> str:
        """Return what comes of it."""
        return await self._wishes.outlasting(self._obtain, self.job, LIMITS, self.clock, SeededEntropy(7))

    async def _obtain(self) -> str:
        self.rounds += 1
        if self._wishes.peers and self._wishes.peers[0].url == "back":
            return self._wishes.peers[-1].url
        self._wishes.lose(self.job, "node attic", CUT)
        retries = Retries(LIMITS.retry, self.clock, SeededEntropy(7))
        return await retries.run(self._fail, self.job, what="looking up o/r")

    async def _fail(self) -> str:
        self.attempts += 1
        if self.attempts in self._told_at:
            self._wishes.tell([PeerSource(url="back" if len(self._told_at) == 1 else "cut", node="attic")])
        raise AttemptFailed("no network")


async def test_news_of_a_peer_are_worth_more_than_another_attempt() -> None:
    peers = [PeerSource(url="gone", node="attic"), PeerSource(url="other", node="cellar")]
    source = _Source(Wishes(peers), range(2, 3))
    assert await source.obtained() == "other"
    assert (source.attempts, source.rounds) == (2, 2)


async def test_a_peer_that_comes_and_goes_for_ever_is_given_up() -> None:
    source = _Source(Wishes(), range(1, 10**6))
    with pytest.raises(ArrieroError) as failed:
        await source.obtained()
    assert "node attic was lost" in failed.value.message and "no network" in failed.value.message
    assert source.rounds > 2


@pytest.mark.parametrize(
    ("lost", "error"),
    [
        (None, CUT),
        (ArrieroError(ErrorCode.MODEL_CORRUPTED), CUT),
        (CUT, ArrieroError(ErrorCode.INSUFFICIENT_DISK)),
    ],
)
async def test_nobody_is_waited_for_where_that_does_not_help(
    lost: ArrieroError | None, error: ArrieroError
) -> None:
    wishes, source = Wishes(), _Source(Wishes(), range(0))

    async def obtain() -> str:
        if lost is not None:
            wishes.lose(source.job, "node attic", lost)
        raise error

    with pytest.raises(ArrieroError) as failed:
        await wishes.outlasting(obtain, source.job, LIMITS, source.clock, SeededEntropy(7))
    assert failed.value is error
