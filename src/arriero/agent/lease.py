"""Which orchestrator holds this machine, and is this request still one of its?  (`NodeLease`)

The rules are in `domain.leases`.  The newest number is written down before it counts, so that an
agent that comes back refuses what the one before has refused.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final, NoReturn

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.fence import FENCE_HEADER, Fence
from arriero.contracts.requests import FenceBody
from arriero.domain import leases
from arriero.domain.leases import Lease, Refused
from arriero.runtime import logs, state_dir
from arriero.runtime.asgi import AsgiApp, Receive, Scope, Send
from arriero.runtime.clock import Clock
from arriero.runtime.http import Peer
from arriero.runtime.tasks import Changed

EVENTS_PATH: Final = "/v1/events"
#: Where the holder of an event stream stands in its request's scope.
SCOPE_KEY: Final = "arriero.holding"
#: Where the number of any request stands that came under one.
FENCE_KEY: Final = "arriero.fence"
#: Workers have so long to hear of a new number before its holder is answered; those that do not answer
#: are told later.
TELL_ALL_S: Final = 0.5
TELL_TIMEOUT_S: Final = 2.0
TELL_AGAIN_S: Final = 0.2
#: JSON has no infinity.
SILENT_TOLD_MAX_S: Final = 1e9
_HEADER: Final = FENCE_HEADER.lower().encode()


class LeaseRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of the lease in the state folder."""

    fence: Fence
    since: float


class Holding:
    """One event stream of the holder."""

    def __init__(self) -> None:
        self._error: ArrieroError | None = None

    def check(self) -> None:
        """Raise LEASE_SUPERSEDED once a newer one has taken its place."""
        if self._error is not None:
            raise self._error

    def end(self, error: ArrieroError) -> None:
        """Let `check` raise from now on."""
        self._error = error


class NodeLease:
    """The lease of this machine.  `on_taken` is told when another stream has taken the place of one."""

    def __init__(
        self, path: Path, clock: Clock, *, silence_max_s: float, on_taken: Callable[[], None]
    ) -> None:
        self._on_taken = on_taken
        self._path = path
        self._clock = clock
        self._silence_max_s = silence_max_s
        self._log = logs.get("arriero.agent.lease")
        record = state_dir.read(path, LeaseRecord)
        self._fence = leases.NEVER if record is None else record.fence
        self._since_unix = 0.0 if record is None else record.since
        #: The stream that is open; None: none is, since `_left_s`.
        self._holding: Holding | None = None
        # A holder that the agent before had gets its time to come back.
        self._left_s = clock.monotonic_s()
        self._taking = asyncio.Lock()
        #: The newest number that each worker has confirmed.
        self._told: dict[str, int] = {}
        self._heard = Changed()
        self._changed = Changed()

    @property
    def number(self) -> int:
        """The newest number; 0: nobody has held this machine yet."""
        return self._fence.number

    def _lease(self) -> Lease:
        is_open = self._holding is not None
        return Lease(self._fence, 0.0 if is_open else self._clock.monotonic_s() - self._left_s)

    # --- Requests ------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def hold(self, asked: Fence) -> AsyncIterator[Holding]:
        """Hold this machine for as long as the event stream is open.

        What the holder had open before ends, and the workers know of a new number before the stream
        begins, but for those that do not answer.  Raises LEASE_SUPERSEDED.
        """
        async with self._taking:
            decision = leases.may_hold(self._lease(), asked, silence_max_s=self._silence_max_s)
            if isinstance(decision, Refused):
                self._refuse(decision, asked)
            if decision.is_new:
                await self._write(asked)
            holding, before = Holding(), self._holding
            self._holding = holding
            if decision.is_new:
                self._fence, self._since_unix = asked, self._clock.wall_s()
            if before is not None:
                before.end(self._superseded("a newer connection holds the node", asked))
        try:
            self._on_taken()
            if decision.is_new:
                self._changed.notify()
                self._log.info("lease_taken", holder=asked.holder, number=asked.number)
                await self._all_told()
            yield holding
        finally:
            if self._holding is holding:
                self._holding = None
                self._left_s = self._clock.monotonic_s()

    def check(self, asked: Fence) -> None:
        """Raise LEASE_SUPERSEDED for a request of who does not hold this machine (any more)."""
        decision = leases.may_ask(self._lease(), asked, silence_max_s=self._silence_max_s)
        if isinstance(decision, Refused):
            self._refuse(decision, asked)

    def release(self) -> None:
        """Let the next holder come at once: the present one has said that it goes."""
        self._holding = None
        self._left_s = -math.inf

    def silent_s(self, holder: str) -> float:
        """Return for how long a holder has not held this machine; 0: it does, infinity: it will not."""
        return self._lease().silent_s if holder == self._fence.holder else math.inf

    def _refuse(self, refused: Refused, asked: Fence) -> NoReturn:
        raise self._superseded(refused.why, asked)

    def _superseded(self, why: str, asked: Fence) -> ArrieroError:
        return ArrieroError(
            ErrorCode.LEASE_SUPERSEDED,
            f"{why}: number {self._fence.number} of {self._fence.holder}, asked with {asked.number}",
            holder=self._fence.holder,
            number=self._fence.number,
            since_unix=self._since_unix,
            silent_s=round(min(self._lease().silent_s, SILENT_TOLD_MAX_S), 3),
        )

    async def _write(self, fence: Fence) -> None:
        record = LeaseRecord(fence=fence, since=self._clock.wall_s())
        try:
            await asyncio.to_thread(state_dir.write, self._path, record)
        except OSError as error:
            # A full disk must not take a machine away whose workers are well.
            self._log.warning("lease_not_written", number=fence.number, reason=error.strerror)

    # --- Workers -------------------------------------------------------------------------

    async def keep_told(self, worker_id: str, peer: Peer) -> None:
        """Tell a worker of every new number, again until it has heard; never ends by itself."""
        with self._listed(worker_id):
            while True:
                number = self.number
                if number == self._told[worker_id]:
                    await self._changed.wait()
                elif await self._tell(peer, number):
                    self._told[worker_id] = number
                    self._heard.notify()
                else:
                    await self._clock.sleep_s(TELL_AGAIN_S)

    @contextlib.contextmanager
    def _listed(self, worker_id: str) -> Iterator[None]:
        self._told[worker_id] = 0
        try:
            yield
        finally:
            del self._told[worker_id]
            self._heard.notify()

    @staticmethod
    async def _tell(peer: Peer, number: int) -> bool:
        try:
            await peer.call(
                "POST",
                "/v1/admin/fence",
                body=FenceBody(number=number),
                timeout_s=TELL_TIMEOUT_S,
                unreachable=ErrorCode.HEALTH_CHECK_ERROR,
            )
        except ArrieroError as error:
            # Whether it still lives, its health checks decide; one of an older version knows no numbers.
            return error.code is ErrorCode.NOT_FOUND
        return True

    async def _all_told(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TELL_ALL_S):
                while any(told < self.number for told in self._told.values()):
                    await self._heard.wait()


class Leased:
    """ASGI middleware: requests with a fencing number are answered if it is the newest.

    Those without one are of this machine, and pass.
    """

    def __init__(self, app: AsgiApp, lease: NodeLease) -> None:
        self._app = app
        self._lease = lease

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request.  Raises LEASE_SUPERSEDED, INVALID_REQUEST."""
        fence = fence_of(scope)
        if fence is None:
            await self._app(scope, receive, send)
        elif scope["path"] == EVENTS_PATH:
            async with self._lease.hold(fence) as holding:
                scope[SCOPE_KEY] = holding
                await self._app(scope, receive, send)
        else:
            self._lease.check(fence)
            scope[FENCE_KEY] = fence
            await self._app(scope, receive, send)


def fence_of(scope: Scope) -> Fence | None:
    """Return the number that a request came under.  Raises INVALID_REQUEST if it is not well formed."""
    given = [value for name, value in scope["headers"] if name == _HEADER]
    if not given:
        return None
    if len(given) > 1:
        fail(ErrorCode.INVALID_REQUEST, f"{FENCE_HEADER} is given twice", param=FENCE_HEADER)
    return Fence.parse(given[0].decode("latin-1"))
