"""How is an agent held, and found again when it, its machine or the way to it was gone?

Its event stream is held open: as long as beats come the node is there.  One `NodeLink` a node.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import AgentEvent, AgentSnapshot, WorkerChanged
from arriero.contracts.fence import number_in, silent_s_in
from arriero.contracts.records import Capabilities, RunRecord, WorkerRecord
from arriero.contracts.version import API_VERSION, __version__
from arriero.domain import backoff
from arriero.domain.worker_states import WORKERS
from arriero.orchestrator.nodes import Node, NodeRegistry
from arriero.orchestrator.reach import Line, Reach
from arriero.runtime import logs
from arriero.runtime.attention import Attention
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy
from arriero.runtime.http import error_of

LOOK_EVERY_S: Final = 0.1
RETRY_S_MAX: Final = 1.0
#: An agent that is gone from a machine that is there gets so long to come back by itself.
AGENT_BACK_S: Final = 10.0
_EVENTS: Final = msgspec.json.Decoder(AgentEvent)
#: Trying again soon does not help: a person has to do something.
_LASTING: Final = frozenset(
    {
        ErrorCode.VERSION_MISMATCH,
        ErrorCode.SSH_AUTH_FAILED,
        ErrorCode.SSH_KEY_UNUSABLE,
        ErrorCode.SSH_HOST_KEY_CHANGED,
        ErrorCode.SSH_HOST_KEY_UNKNOWN,
        ErrorCode.LEASE_SUPERSEDED,
        ErrorCode.INVALID_SETTINGS,
        ErrorCode.INTERNAL_ERROR,
    }
)
#: The agent that was known is not there, or another answers at its port: its run file tells which.
_AGENT_GONE: Final = frozenset({ErrorCode.NOT_RUNNING, ErrorCode.NODE_UNREACHABLE, ErrorCode.INVALID_API_KEY})
LASTING_RETRY_S: Final = 5.0
#: The share of `node_timeout_s` after which a silent node is missed.  The silence begins with the last
#: beat, which may have come right before the cut, and its news has to reach whoever asks: so the whole of
#: it is the most that it takes.
MISSED_SHARE: Final = 0.95

#: Has the agent on a node's machine started; raises what keeps it from it.
Revive = Callable[[Line], Awaitable[None]]


class _Speaker(msgspec.Struct):
    """As much of a machine's capabilities as any version tells."""

    name: str = ""
    version: str = ""


class _Told(msgspec.Struct):
    """As much of an event."""

    capabilities: _Speaker = msgspec.field(default_factory=_Speaker)


class NodeLink:
    """Holds one node's agent; `run` never ends by itself.

    `name`: the node's, where it is known before its agent has told it.  `revive` starts an agent that
    does not come back by itself.  A node is silent only in time that is none of `attention`'s away.
    """

    def __init__(
        self,
        registry: NodeRegistry,
        reach: Reach,
        clock: Clock,
        entropy: Entropy,
        *,
        attention: Attention,
        node_timeout_s: float,
        connect_timeout_s: float,
        name: str | None = None,
        revive: Revive | None = None,
    ) -> None:
        self._registry = registry
        self._reach = reach
        self._clock = clock
        self._entropy = entropy
        self._attention = attention
        self._missed_s = MISSED_SHARE * node_timeout_s
        self._first_s = max(connect_timeout_s, self._missed_s)
        self._name = name
        self._revive = revive
        self._log = logs.get("arriero.nodes")
        self._node: Node | None = registry.find(name) if name is not None else None
        self._last_heard_s = self._listened_s()
        self._was_held = False
        self._error: ArrieroError | None = None

    async def run(self) -> None:
        """Find the agent and hold it, again and again."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hold_forever(), name=f"hold-{self._name or 'local'}")
            group.create_task(self._watch_silence(), name=f"silence-{self._name or 'local'}")

    def _is_first(self) -> bool:
        """Return whether the machine is being reached for the first time, and nothing failed yet."""
        return not self._was_held and self._error is None

    def _listened_s(self) -> float:
        """Return a time that stands still while this process does."""
        return self._clock.monotonic_s() - self._attention.away_s()

    async def _hold_forever(self) -> None:
        attempt = 0
        told = ""
        try:
            while True:
                started_s = self._listened_s()
                is_our_own = False
                try:
                    await self._hold_once()
                    error = ArrieroError(ErrorCode.NODE_UNREACHABLE, "the agent ended its events")
                except ArrieroError as caught:
                    error = caught
                    is_our_own = error.code is ErrorCode.STATE_DIR_UNUSABLE
                except Exception as caught:  # noqa: BLE001  The edge: other nodes' links go on.
                    is_our_own = True
                    error = ArrieroError(ErrorCode.INTERNAL_ERROR, f"its link failed: {caught!r}")
                    if error.message != told:
                        self._log.exception("link failed", node=self._name)
                if is_our_own:
                    # It is not the node that fails: whatever is wrong here, the next line is made anew.
                    await self._reach.drop()
                if error.code is ErrorCode.NOT_RUNNING and self._name is None:
                    # Nobody ever said that this machine has one.
                    attempt = 0
                    await self._clock.sleep_s(LOOK_EVERY_S)
                    continue
                self._error = error
                if error.code is ErrorCode.LEASE_SUPERSEDED and not self._is_pushed_aside(error):
                    await self._reach.drop(above=number_in(error.details))
                attempt = 1 if self._last_heard_s > started_s else attempt + 1
                if error.message != told:
                    self._log.warning(
                        "agent not held", node=self._name, code=str(error.code), why=error.message
                    )
                    told = error.message
                if error.code in _LASTING and self._node is not None:
                    self._registry.unreachable(self._node, error)
                    # A holder that is silent may be about to be gone.
                    await self._clock.sleep_s(RETRY_S_MAX if silent_s_in(error.details) else LASTING_RETRY_S)
                    continue
                delay_s = backoff.delay_s(attempt, self._entropy.chance(), cap_s=RETRY_S_MAX)
                await self._clock.sleep_s(max(delay_s, 0.02))
        finally:
            await self._reach.drop()

    def _is_pushed_aside(self, error: ArrieroError) -> bool:
        """Return whether somebody holds it now who took it from us.

        It may be one with our own id, from a copy of our database: taking the node back at once, the two
        would cancel each other's streams for ever.  The old number is asked with until that one is silent.
        """
        return self._was_held and silent_s_in(error.details) == 0

    async def _hold_once(self) -> None:
        line = await self._reach.line()
        failed: ArrieroError | None = None

        async def hold() -> None:
            nonlocal failed
            try:
                await self._find_and_hold(line)
            except ArrieroError as error:
                failed = error

        async with asyncio.TaskGroup() as group:
            held = group.create_task(hold(), name="line-held")
            # What is lost on the way is noticed there before the agent's silence tells.
            gone = group.create_task(line.connection.closed(), name="line-closed")
            await asyncio.wait((held, gone), return_when=asyncio.FIRST_COMPLETED)
            # A line that was gone before we began fails at once: the watch has to begin to see it.
            await asyncio.sleep(0)
            is_gone = gone.done()
            held.cancel()
            gone.cancel()
        if is_gone:
            why = ArrieroError(ErrorCode.NODE_UNREACHABLE, f"connection gone: {gone.result()}")
            self._log.info("connection gone", node=self._name, why=gone.result())
            if self._node is not None:
                # Nothing leads to its workers until the next one: they are no choice meanwhile.
                self._registry.unreachable(self._node, why)
            await self._reach.drop()
            failed = failed or why
        if failed is not None:
            raise failed

    async def _find_and_hold(self, line: Line) -> None:
        """Hold the agent over one line; one that is gone may come back, and is started again if not."""
        gone_since_s = self._listened_s()
        while True:
            try:
                record = await self._reach.agent(line)
                await self._hold(line, record)
                return
            except ArrieroError as error:
                is_agent_gone = error.code in _AGENT_GONE
                is_way_gone = line.is_gone or self._last_heard_s > gone_since_s
                if not is_agent_gone or self._revive is None or is_way_gone:
                    raise
                # What left no run file was told to end, maybe with the orchestrator before, and so did
                # its keeper.
                has_ended = error.code is ErrorCode.NOT_RUNNING and self._is_first()
                if has_ended or self._listened_s() - gone_since_s >= AGENT_BACK_S:
                    await self._revive(line)
                    gone_since_s = self._listened_s()
                self._error = error
            await self._clock.sleep_s(LOOK_EVERY_S)

    async def _hold(self, line: Line, record: RunRecord) -> None:
        """Read one agent's events to their end.  Raises NODE_UNREACHABLE, VERSION_MISMATCH…"""
        await line.open(record.url)
        node: Node | None = None
        events = line.peer(record.url, record.token).events("/v1/events", silence_s=self._missed_s)
        try:
            async for event in events:
                if event.event == "error":
                    # The agent's last word on this stream, such as LEASE_SUPERSEDED.
                    raise error_of(200, event.data.encode())
                if event.comment is None and event.data:
                    node = await self._take(event.data, node, line, record)
                self._last_heard_s = self._listened_s()
        except ArrieroError as error:
            if error.code is ErrorCode.NODE_UNREACHABLE and node is None:
                await line.check(record.url)
            raise
        finally:
            await events.aclose()
            with contextlib.suppress(ArrieroError):
                await line.shut(record.url)

    async def _take(self, data: str, node: Node | None, line: Line, record: RunRecord) -> Node:
        try:
            event = _EVENTS.decode(data)
        except msgspec.DecodeError as error:
            told = node.capabilities if node is not None else _speaker(data, record)
            raise self._unfit(told, f"sent an event that is none of ours: {error}") from error
        if isinstance(event, AgentSnapshot):
            return await self._joined(event, line, record)
        if node is None:
            raise self._unfit(_speaker(data, record), "began its events without a snapshot")
        if isinstance(event, WorkerChanged):
            await self._lead(line, event.worker)
        self._registry.heard(node, event)
        return node

    async def _joined(self, snapshot: AgentSnapshot, line: Line, record: RunRecord) -> Node:
        has = snapshot.capabilities
        if has.api_version != API_VERSION or has.version != __version__:
            raise self._unfit(has)
        for worker in snapshot.workers:
            await self._lead(line, worker)
        # From now on, and not after the answer to the question below: else it is missed for the time before.
        self._last_heard_s = self._listened_s()
        node = self._registry.joined(snapshot, line, record, name=self._name)
        if self._node is not None and self._node is not node:
            why = ArrieroError(ErrorCode.NODE_UNREACHABLE, f"its agent is called {node.name} now")
            self._registry.unreachable(self._node, why)
        self._node = node
        self._was_held = True
        self._error = None
        with contextlib.suppress(ArrieroError):
            started_s = self._clock.monotonic_s()
            peer = line.peer(record.url, record.token)
            # Its beats wait meanwhile.
            await peer.call("GET", "/v1/health", timeout_s=self._missed_s / 2)
            node.latency_ms = (self._clock.monotonic_s() - started_s) * 1000
        return node

    def _unfit(self, has: Capabilities, why: str = "") -> ArrieroError:
        """Return that the agent cannot be worked with, `why`: beyond its version; have its node listed."""
        name = self._name or has.name
        if self._node is None and name:
            self._node = self._registry.unfit(has)
        whose = f"the agent of {name or 'this machine'}"
        return ArrieroError(
            ErrorCode.VERSION_MISMATCH,
            f"{whose} is arriero {has.version}, the orchestrator is {__version__}"
            + (f"; it {why}" if why else ""),
            node=name,
            agent_version=has.version,
            orchestrator_version=__version__,
            suggested_action=f"arriero nodes upgrade {name}"
            if self._name is not None
            else "restart the agent: `arriero down`, then `arriero up`",
        )

    async def _lead(self, line: Line, worker: WorkerRecord) -> None:
        """Have a local end that leads to a live worker, none to one that is gone."""
        if not worker.url:
            return
        if worker.state in WORKERS.final:
            await line.shut(worker.url, worker.worker_id)
        else:
            await line.open(worker.url, worker.worker_id)

    async def _watch_silence(self) -> None:
        while True:
            silence_s = self._listened_s() - self._last_heard_s
            # Nobody misses a machine yet that is connected to for the first time: a slow one takes its time.
            limit_s = self._first_s if self._is_first() else self._missed_s
            if self._node is not None and silence_s >= limit_s:
                silent = ArrieroError(
                    ErrorCode.NODE_UNREACHABLE, f"silent for {self._missed_s:.3g} s", node=self._node.name
                )
                self._registry.unreachable(self._node, self._error or silent)
            # That it failed may be known sooner.
            due_s = min(limit_s - silence_s, self._missed_s)
            await self._clock.sleep_s(due_s if due_s > 0 else min(0.5, self._missed_s))


def _speaker(data: str, record: RunRecord) -> Capabilities:
    """Return who sent an event that cannot be read; its version stands in its run file in any case."""
    speaker = _Speaker()
    with contextlib.suppress(msgspec.DecodeError):
        speaker = msgspec.json.decode(data, type=_Told).capabilities
    return Capabilities(
        name=speaker.name, version=speaker.version or record.version, api_version=0, backends=[], devices=[],
        engines={}, ram_mb=0, ram_free_mb=0, disk_free_mb=0, cpu_cores=0, os="", arch="",
    )  # fmt: skip
