"""How far is a download, how fast is it, and who waits for news of it?

Readers see the present state, never a backlog: a slow reader misses steps between, not the end.
"""

from collections import deque
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Final

from arriero.contracts.errors import ArrieroError
from arriero.contracts.events import DownloadFrame
from arriero.contracts.records import DownloadRecord
from arriero.contracts.states import DownloadState
from arriero.domain.download_states import DOWNLOADS
from arriero.runtime.clock import Clock
from arriero.runtime.tasks import Changed

#: Speed is what came within this time.
SPEED_WINDOW_S: Final = 5.0


class SpeedMeter:
    """Bytes per second over the last few seconds, from totals told now and then."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def add(self, now_s: float, total_bytes: int) -> None:
        """Say that `total_bytes` were there at `now_s`; a total that fell begins anew."""
        if self._points and total_bytes < self._points[-1][1]:
            self._points.clear()
        self._points.append((now_s, total_bytes))
        while len(self._points) > 2 and now_s - self._points[0][0] > SPEED_WINDOW_S:
            self._points.popleft()

    def rate_bytes_per_s(self) -> float:
        """Return the rate, 0 until there are two points in time."""
        if len(self._points) < 2:
            return 0.0
        (first_s, first_bytes), (last_s, last_bytes) = self._points[0], self._points[-1]
        return (last_bytes - first_bytes) / (last_s - first_s) if last_s > first_s else 0.0


class Job:
    """One download as it is seen from outside.  Changed by its own task alone."""

    def __init__(
        self,
        *,
        download_id: str,
        model_ref: str,
        clock: Clock,
        interval_s: float,
        on_change: Callable[[DownloadRecord], None],
        started_unix: float,
    ) -> None:
        self.download_id = download_id
        self.model_ref = model_ref
        self.state = DownloadState.QUEUED
        self.error: ArrieroError | None = None
        self.local_path: str | None = None
        #: Where the bytes come from, for people; told with the next frame.
        self.source = ""
        #: Who asked for it and did not leave; kept in the order in which they came.
        self.holders: dict[str, None] = {}
        #: Where its parts are kept, once there are any.
        self.folder: Path | None = None
        #: Told to whoever knows where peers are: one was lost, and others, or the way to it, are welcome.
        self.wants_peers = False
        #: Called before each attempt but the first; what it raises ends them.
        self.before_retry: Callable[[], None] = lambda: None
        self._clock = clock
        self._interval_s = interval_s
        self._on_change = on_change
        self.started_unix = started_unix
        self._told_s = clock.monotonic_s()
        self._bytes = 0
        self._bytes_total: int | None = None
        self._attempt = 1
        self._retry: tuple[str, float] | None = None
        self._speed = SpeedMeter()
        self._changed = Changed()
        #: The frames told so far; the number of the present one.
        self._number = 1
        self.frame = self._make_frame()

    @property
    def is_final(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in DOWNLOADS.final

    def record(self) -> DownloadRecord:
        """Return the present state as lists and events tell it."""
        return DownloadRecord(
            download_id=self.download_id,
            model_ref=self.model_ref,
            state=self.state,
            bytes_downloaded=self._bytes,
            bytes_total=self._bytes_total,
            speed_mbps=self.frame.speed_mbps,
            eta_s=self.frame.eta_s,
            attempt=self._attempt,
            started_unix=self.started_unix,
            error=self.error.body() if self.error else None,
            holders=len(self.holders),
            source=self.source,
            retry_reason=self.frame.retry_reason,
            retry_in_s=self.frame.retry_in_s,
            wants_peers=self.wants_peers,
        )

    async def frames(self, after: int = 0) -> AsyncGenerator[tuple[int, DownloadFrame], None]:
        """Yield the present frame with its number, then each change; ends after a final one.

        Frames up to the number `after` are left out; one that was never told leaves none out.
        """
        if after > self._number:
            after = 0
        while True:
            number, frame = self._number, self.frame
            if number > after:
                after = number
                yield number, frame
            if frame.stage in DOWNLOADS.final:
                return
            if number == self._number:
                await self._changed.wait()

    async def wait_final(self) -> None:
        """Return once the state is final."""
        while not self.is_final:
            await self._changed.wait()

    # --- Told by the job's task ---------------------------------------------------------------

    def go(self, state: DownloadState) -> None:
        """Take an arrow.  Raises INVALID_STATE_TRANSITION if there is none."""
        DOWNLOADS.check(self.state, state)
        self.state = state
        self._tell()

    def downloading(self) -> None:
        """Be in the state `downloading`, if not already."""
        if self.state is not DownloadState.DOWNLOADING:
            # What was read before says nothing of how fast the line is.
            self._speed = SpeedMeter()
            self.go(DownloadState.DOWNLOADING)

    def verifying(self) -> None:
        """Be in the state `verifying`, if not already."""
        if self.state is not DownloadState.VERIFYING:
            self.go(DownloadState.VERIFYING)

    def finish(self, state: DownloadState, error: ArrieroError | None = None) -> None:
        """End, once: a download that has ended stays as it is."""
        if not self.is_final:
            self.error = error
            self._retry = None
            self.go(state)

    def attempting(self, attempt: int) -> None:
        """An attempt begins.  Raises what `before_retry` does."""
        if attempt > 1:
            self.before_retry()
        is_news = attempt != self._attempt or self._retry is not None
        self._attempt = attempt
        self._retry = None
        if is_news:
            self._tell()

    def waiting(self, reason: str, delay_s: float) -> None:
        """An attempt failed; the next one begins after `delay_s`."""
        self._retry = (reason, delay_s)
        self._tell()

    def advance(self, downloaded_bytes: int, total_bytes: int | None) -> None:
        """So much is there.  Readers hear of it at most once an interval."""
        now_s = self._clock.monotonic_s()
        self._speed.add(now_s, downloaded_bytes)
        is_news = total_bytes != self._bytes_total
        self._bytes = downloaded_bytes
        self._bytes_total = total_bytes
        if is_news or now_s - self._told_s >= self._interval_s:
            self._tell()

    def _tell(self) -> None:
        self._told_s = self._clock.monotonic_s()
        self._number += 1
        self.frame = self._make_frame()
        self._changed.notify()
        self._on_change(self.record())

    def _make_frame(self) -> DownloadFrame:
        rate = self._speed.rate_bytes_per_s() if self.state is DownloadState.DOWNLOADING else 0.0
        left = None if self._bytes_total is None else max(self._bytes_total - self._bytes, 0)
        retry_reason, retry_in_s = self._retry or (None, None)
        return DownloadFrame(
            stage=self.state,
            bytes_downloaded=self._bytes,
            bytes_total=self._bytes_total,
            # Megabits, as networks are measured.
            speed_mbps=round(rate * 8 / 1_000_000, 3),
            eta_s=round(left / rate, 1) if left is not None and rate > 0 else None,
            download_id=self.download_id,
            attempt=self._attempt,
            retry_reason=retry_reason,
            retry_in_s=None if retry_in_s is None else round(retry_in_s, 3),
            local_path=self.local_path,
            source=self.source,
        )
