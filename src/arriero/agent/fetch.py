"""How does one remote file come to this disk whole, over as many connections as it takes?

The bytes go to a `Partial`; they are hashed on the way.  A later attempt asks for the rest alone,
where the server can prove that it is the rest of the same file.  One attempt is in `fetch_attempt`,
what a server may answer in `fetch_http`, the disk in `partial`.
"""

from dataclasses import replace
from pathlib import Path

import aiohttp

from arriero.agent.budget import Budget, Reservation
from arriero.agent.fetch_attempt import Attempt
from arriero.agent.fetch_http import Origin
from arriero.agent.fetch_types import FetchedFile, FetchLimits, FetchWatch, RemoteFile
from arriero.agent.fetch_writer import Writer
from arriero.agent.partial import Mark, Partial
from arriero.agent.retries import AttemptFailed, FailureKind, Retries
from arriero.domain.attempts import Progress
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy

__all__ = ["FetchLimits", "FetchWatch", "FetchedFile", "Fetcher", "RemoteFile"]


class Fetcher:
    """Fetches files.  `session` must not decompress; `budget` is shared by all fetches of an agent."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        clock: Clock,
        entropy: Entropy,
        limits: FetchLimits,
        budget: Budget | None = None,
    ) -> None:
        self._session = session
        self._clock = clock
        self._entropy = entropy
        self._limits = limits
        self._budget = budget or Budget(clock, limits.rate_bytes_per_s)
        self._retries = Retries(limits.retry, clock, entropy)

    async def fetch(
        self, remote: RemoteFile, folder: Path, watch: FetchWatch, *, later_bytes: int = 0
    ) -> FetchedFile:
        """Bring `remote` into `folder`, whole and verified, going on where an earlier fetch stopped.

        `later_bytes` will be fetched after it by the same download: they must have room as well.
        Raises MODEL_NOT_FOUND, MODEL_ACCESS_DENIED, INSUFFICIENT_DISK at once; DOWNLOAD_FAILED,
        DOWNLOAD_TIMEOUT, MODEL_CORRUPTED after the last attempt.  What came is kept, but for wrong bytes.
        """
        if remote.size_bytes is not None and remote.size_bytes <= 0:
            # No model has no bytes: a source that says so does not know.
            remote = replace(remote, size_bytes=None)
        wanted = Mark(url=remote.url, size_bytes=remote.size_bytes, sha256=remote.sha256)

        def checked(read_bytes: int) -> None:
            watch.verifying()
            watch.advance(read_bytes, remote.size_bytes)

        partial = await Partial.open(folder, remote.name, wanted, self._limits.part_bytes, checked)
        reservation = self._budget.reserve(folder, later_bytes)
        origin = Origin(self._session, self._clock, self._limits, remote)
        progress = Progress(
            partial.parts.done_bytes, self._limits.progress_bytes, anew_max=self._limits.retry.attempts
        )
        try:
            await reservation.measure()
            if remote.size_bytes is not None:
                # Where the source told the size, nobody needs to be asked to know that it does not fit.
                reservation.note(remote.size_bytes - partial.parts.done_bytes)
                reservation.check()
            return await self._retries.run(
                lambda: self._attempt(origin, partial, reservation, watch),
                watch,
                what=f"fetching {remote.name}",
                has_progressed=lambda: progress.look(partial.parts.done_bytes),
            )
        finally:
            reservation.release()
            await partial.close()

    async def _attempt(
        self, origin: Origin, partial: Partial, reservation: Reservation, watch: FetchWatch
    ) -> FetchedFile:
        remote = origin.remote
        watch.downloading()
        if not partial.parts.is_whole:
            origin.forget_target()
            await Attempt(
                origin,
                partial,
                Writer(partial, reservation, self._limits, watch.advance),
                budget=self._budget,
                reservation=reservation,
                limits=self._limits,
                clock=self._clock,
                entropy=self._entropy,
            ).run()
        watch.verifying()
        sha256 = await partial.finish()
        expected = remote.sha256 or partial.mark.sha256
        if expected is not None and sha256 != expected:
            await partial.restart(Mark())
            watch.advance(0, remote.size_bytes)
            raise AttemptFailed(
                f"the checksum of {remote.name} is {sha256[:12]}…, it should be {expected[:12]}…",
                FailureKind.CORRUPTED,
            )
        return FetchedFile(remote.name, partial.path, partial.parts.done_bytes, sha256)
