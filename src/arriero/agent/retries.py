"""What failed in each attempt of a download, when is the next one, and which error is it in the end?"""

import enum
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.domain import backoff
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy

T = TypeVar("T")


class FailureKind(enum.StrEnum):
    """What it was that went wrong with an attempt."""

    #: No byte, and no answer, for too long.
    STALLED = "stalled"
    #: All bytes came, and they are the wrong ones.
    CORRUPTED = "corrupted"
    #: Refused, cut, an answer that makes no sense.
    BROKEN = "broken"


class AttemptFailed(Exception):
    """An attempt failed in a way in which the next one may not.  `reason` is for people."""

    def __init__(
        self, reason: str, kind: FailureKind = FailureKind.BROKEN, retry_after_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class RetryLimits:
    """How often and how soon."""

    attempts: int = 6
    base_s: float = backoff.BASE_S
    cap_s: float = backoff.CAP_S


class RetryWatch(Protocol):
    """Who is told of attempts."""

    def attempting(self, attempt: int) -> None:
        """An attempt begins; the first is 1."""
        ...

    def waiting(self, reason: str, delay_s: float) -> None:
        """The attempt failed, the next one begins after `delay_s`."""
        ...


class Retries:
    """Attempts with full jitter between them."""

    def __init__(self, limits: RetryLimits, clock: Clock, entropy: Entropy) -> None:
        self._limits = limits
        self._clock = clock
        self._entropy = entropy

    async def run(
        self,
        attempt: Callable[[], Awaitable[T]],
        watch: RetryWatch,
        *,
        what: str,
        has_progressed: Callable[[], bool] = lambda: False,
    ) -> T:
        """Return what `attempt` returns in the end.

        An attempt that `has_progressed` counts as the first one again.  Raises DOWNLOAD_TIMEOUT if
        all attempts stalled, MODEL_CORRUPTED if the last one brought wrong bytes, DOWNLOAD_FAILED
        otherwise (details: `attempts`), and at once whatever else `attempt` raises.
        """
        told: list[dict[str, Any]] = []
        kinds: list[FailureKind] = []
        while True:
            watch.attempting(len(told) + 1)
            try:
                return await attempt()
            except AttemptFailed as failure:
                if has_progressed():
                    told.clear()
                    kinds.clear()
                kinds.append(failure.kind)
                entry: dict[str, Any] = {"attempt": len(kinds), "reason": failure.reason, "delay_s": None}
                told.append(entry)
                if len(kinds) >= self._limits.attempts:
                    raise _verdict(what, kinds, told) from failure
                wait_s = self._delay_s(len(kinds), failure)
                entry["delay_s"] = round(wait_s, 3)
            watch.waiting(told[-1]["reason"], wait_s)
            await self._clock.sleep_s(wait_s)

    def _delay_s(self, attempt: int, failure: AttemptFailed) -> float:
        jittered_s = backoff.delay_s(attempt, self._entropy.chance(), self._limits.base_s, self._limits.cap_s)
        return max(jittered_s, failure.retry_after_s or 0.0)


def _verdict(what: str, kinds: list[FailureKind], told: list[dict[str, Any]]) -> ArrieroError:
    if kinds[-1] is FailureKind.CORRUPTED:
        code = ErrorCode.MODEL_CORRUPTED
    elif all(kind is FailureKind.STALLED for kind in kinds):
        code = ErrorCode.DOWNLOAD_TIMEOUT
    else:
        code = ErrorCode.DOWNLOAD_FAILED
    return ArrieroError(
        code, f"{what}: {told[-1]['reason']} (attempt {len(told)} of {len(told)})", attempts=told
    )
