"""How does a worker do?  Its state stream tells at once; health checks tell whether it lives.

Both renew the worker's lease: `X-Arriero-Lease` names the agent that watches it.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import WorkerHealth
from arriero.contracts.states import WorkerState
from arriero.runtime.clock import Clock
from arriero.runtime.http import Http, Peer

LEASE_HEADER: Final = "X-Arriero-Lease"
#: While a worker starts or loads, its state is looked at so often where it has no state stream.
LOADING_POLL_S: Final = 0.2
#: The state stream beats at least once a second.
STREAM_SILENCE_S: Final = 10.0
HEALTH_TIMEOUT_MIN_S: Final = 2.0
HEALTH_TIMEOUT_MAX_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class WatchLimits:
    """How often a worker is asked, and how many failures in a row condemn it."""

    interval_s: float
    failures_max: int

    @property
    def timeout_s(self) -> float:
        """Limit of one check."""
        return min(max(self.interval_s, HEALTH_TIMEOUT_MIN_S), HEALTH_TIMEOUT_MAX_S)


class WorkerWatch:
    """Watches one worker whose HTTP server answers.

    `on_health` is told each news and raises INVALID_STATE_TRANSITION for a state no arrow leads
    to, which counts as a failed check.  `on_unhealthy` is told once, after too many failures.
    """

    def __init__(
        self,
        *,
        http: Http,
        url: str,
        token: str,
        lease: str,
        limits: WatchLimits,
        clock: Clock,
        on_health: Callable[[WorkerHealth], None],
        on_unhealthy: Callable[[ArrieroError], None],
    ) -> None:
        self._peer: Peer = http.peer(url, token)
        self._headers = {LEASE_HEADER: lease}
        self._limits = limits
        self._clock = clock
        self._on_health = on_health
        self._on_unhealthy = on_unhealthy
        self._state = WorkerState.STARTING
        self._is_streaming = False
        #: How many news the stream brought: a check that was overtaken by one has old news.
        self._news = 0

    async def run(self) -> None:
        """Watch until cancelled, or until the worker is condemned."""
        async with asyncio.TaskGroup() as group:
            stream = group.create_task(self._follow(), name="worker-state")
            await self._check_for_ever()
            stream.cancel()

    async def ask(self) -> WorkerHealth:
        """Return the worker's health now.  Raises HEALTH_CHECK_ERROR, or what it answered."""
        return await self._peer.call(
            "GET",
            "/v1/health",
            answer=WorkerHealth,
            headers=self._headers,
            timeout_s=self._limits.timeout_s,
            unreachable=ErrorCode.HEALTH_CHECK_ERROR,
        )

    async def _check_for_ever(self) -> None:
        failures = 0
        while True:
            news = self._news
            try:
                health = await self.ask()
                if news == self._news:
                    self._tell(health)
                failures = 0
            except ArrieroError as error:
                failures += 1
                if failures >= self._limits.failures_max:
                    self._on_unhealthy(error)
                    return
            is_quick = not self._is_streaming and self._state in (WorkerState.STARTING, WorkerState.LOADING)
            interval_s = self._limits.interval_s
            await self._clock.sleep_s(
                min(LOADING_POLL_S, interval_s) if is_quick and not failures else interval_s
            )

    async def _follow(self) -> None:
        """Hold the state stream; come back when it breaks.  A worker without one is only polled."""
        while True:
            try:
                await self._read_stream()
            except ArrieroError as error:
                if error.code is ErrorCode.NOT_FOUND:
                    return
            finally:
                self._is_streaming = False
            await self._clock.sleep_s(min(LOADING_POLL_S, self._limits.interval_s))

    async def _read_stream(self) -> None:
        events = self._peer.events(
            "/v1/state",
            headers=self._headers,
            silence_s=STREAM_SILENCE_S,
            unreachable=ErrorCode.HEALTH_CHECK_ERROR,
        )
        async with contextlib.aclosing(events):
            async for event in events:
                if event.comment is not None or event.is_done:
                    continue
                try:
                    health = msgspec.json.decode(event.data, type=WorkerHealth)
                except msgspec.DecodeError as error:
                    raise ArrieroError(ErrorCode.WORKER_UNHEALTHY, "a state that is none of ours") from error
                self._is_streaming = True
                self._news += 1
                self._tell(health)

    def _tell(self, health: WorkerHealth) -> None:
        self._on_health(health)
        self._state = health.state
