"""For how long does a download wait for a machine that was lost while the model came from it?

Its bytes are kept, and where there is no internet nobody else has the rest.  After a cut the way to a
machine is another one: whoever knows the ways tells them anew, see `Wishes.tell`.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from arriero.agent.fetch_types import FetchLimits
from arriero.agent.progress import Job
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import PEERS_MAX, PeerSource
from arriero.domain import backoff
from arriero.domain.attempts import Progress
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy

T = TypeVar("T")

#: With these the next source may still have the model.
ELSEWHERE: Final = frozenset(
    {
        ErrorCode.DOWNLOAD_FAILED,
        ErrorCode.DOWNLOAD_TIMEOUT,
        ErrorCode.MODEL_CORRUPTED,
        ErrorCode.MODEL_NOT_FOUND,
        ErrorCode.MODEL_ACCESS_DENIED,
    }
)
#: With these it was not the model that failed but the way to it: another agent at the same port refuses.
_LOST: Final = frozenset(
    {ErrorCode.DOWNLOAD_FAILED, ErrorCode.DOWNLOAD_TIMEOUT, ErrorCode.MODEL_ACCESS_DENIED}
)


async def _unheard(_: str) -> None:
    """Tell nobody."""


class _PeersTold(Exception):
    """Other ways to peers are known now: they are worth more than another attempt where this one failed."""


class Wishes:
    """What a download was asked for with, besides its reference; of peers it may hear more while it runs.

    `lost`: whom the model came from when the agent before us ended.
    """

    def __init__(self, peers: Sequence[PeerSource] = (), *, lost: str = "") -> None:
        self.peers = tuple(peers)
        #: Who was lost while the model came from it, for people: "node attic".  Empty: nobody.
        self.lost = lost
        #: Told, for people, whom the model is about to come from; kept for the agent after us.
        self.before_peer: Callable[[str], Awaitable[None]] = _unheard
        self._told = asyncio.Event()
        #: Whatever is told now, the round that runs goes on to its end.
        self._is_last = False

    def tell(self, peers: Sequence[PeerSource]) -> None:
        """Take where peers are now; those that are not named stay as they were."""
        named = {peer.node for peer in peers}
        self.peers = (*peers, *(peer for peer in self.peers if peer.node not in named))[:PEERS_MAX]
        self._told.set()

    def lose(self, job: Job, source: str, error: ArrieroError) -> None:
        """Take note that a peer failed in the middle, if it is one that may come back."""
        if error.code in _LOST:
            self.lost = source
            job.wants_peers = True

    async def outlasting(
        self,
        obtain: Callable[[], Awaitable[T]],
        job: Job,
        limits: FetchLimits,
        clock: Clock,
        entropy: Entropy,
    ) -> T:
        """Return what `obtain` returns, called again while a peer that was lost may come back.

        It is waited for as long as `limits.peer_back_s` after the last progress.  Raises what `obtain`
        does; where a peer was lost, the error tells of that as well.
        """
        tries = 0
        last_s: float | None = None
        progress = Progress(0, limits.progress_bytes, anew_max=limits.retry.attempts)
        job.before_retry = self._look
        while True:
            self._told.clear()
            failed: ArrieroError | None = None
            try:
                return await obtain()
            except _PeersTold:
                pass
            except ArrieroError as error:
                if not self.lost or error.code not in ELSEWHERE:
                    raise
                failed = error
            now_s = clock.monotonic_s()
            if progress.look(job.frame.bytes_downloaded) or last_s is None:
                tries, last_s = 0, now_s
            left_s = last_s + limits.peer_back_s - now_s
            self._is_last = left_s <= 0
            if failed is None:
                continue
            if self._is_last:
                raise self._both(failed, limits.peer_back_s) from failed
            tries += 1
            # The pauses grow on from those between attempts; the last one ends with the patience.
            attempt = limits.retry.attempts + tries
            pause_s = backoff.delay_s(attempt, entropy.chance(), limits.retry.base_s, limits.retry.cap_s)
            await self._news(job, min(pause_s, left_s))

    async def _news(self, job: Job, limit_s: float) -> None:
        """Wait until somebody tells of peers, but not longer than the limit."""
        job.waiting(f"{self.lost} was lost in the middle: waits for it", limit_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._told.wait()

    def _look(self) -> None:
        if self._told.is_set() and not self._is_last:
            raise _PeersTold

    def _both(self, error: ArrieroError, patience_s: float) -> ArrieroError:
        """Return an error that tells of the peer that was lost, and why its source did not do either."""
        return ArrieroError(
            error.code,
            f"{self.lost} was lost while the model came from it, and did not come back within "
            f"{patience_s:g} s; elsewhere: {error.message}",
            **{**error.details, "lost": self.lost},
        )
