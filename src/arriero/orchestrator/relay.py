"""How does a worker's answer reach the client?  (The token path.)

The request is built anew for the worker; the answer's bytes are passed on as they came, whole
events at a time, without being read: one send for each time something arrived.
"""

from dataclasses import replace
from typing import Final

import msgspec

from arriero.contracts import refs
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import TaskDownloading, TaskLoading
from arriero.contracts.requests import Place
from arriero.domain.placement import Wants, labels_of
from arriero.orchestrator.courier import (
    ERROR_BYTES_MAX,
    Counters,
    Courier,
    Refused,
    hop_headers,
    passed,
    silence_limit_s,
    splice_events,
)
from arriero.orchestrator.exchange import (
    Exchange,
    Exchanges,
    Outlet,
    read_body,
    remaining_ms,
    request_id,
)
from arriero.orchestrator.scheduler import Lease, Scheduler, Waiting
from arriero.orchestrator.upstream import Lost, Silent
from arriero.runtime import bodies, logs
from arriero.runtime.asgi import Headers, Receive, Scope, Send
from arriero.runtime.clock import Clock

#: Waits before a worker whose queue is full is asked again.
BUSY_DELAYS_S: Final = (1.0, 2.0, 4.0)
#: Workers a request may be lost on before its client hears of it.
LOSSES_MAX: Final = 1
#: Workers that refuse because they are leaving: our view lagged behind.
REFUSALS_MAX: Final = 4
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
#: Answered by a worker that takes nothing any more, or not yet.
LEAVING: Final = frozenset(
    {ErrorCode.NO_READY_WORKERS, ErrorCode.MODEL_LOADING, ErrorCode.WORKER_UNHEALTHY}
)  # fmt: skip


class OpenAiBody(msgspec.Struct, frozen=True):
    """What the orchestrator reads of an OpenAI request; the rest is the worker's."""

    model: str | None = None
    stream: bool | None = None
    timeout: float | None = None
    #: Workers take no notice of it: the body goes on as it came.
    arriero: Place | None = None


class Tries:
    """How often one request was turned away, and whether it may be tried again."""

    def __init__(self) -> None:
        #: Workers that it is not given to again.
        self.excluded: set[str] = set()
        self._losses = 0
        self._full = 0
        self._refusals = 0

    def may_follow_loss(self, worker_id: str) -> bool:
        """Note that a worker broke off before it told anything; return whether another may try."""
        self._losses += 1
        self.excluded.add(worker_id)
        return self._losses <= LOSSES_MAX

    def after_refusal(self, worker_id: str, error: ArrieroError) -> float | None:
        """Return after how many seconds to try again after a worker refused; None: not at all."""
        if error.code is ErrorCode.QUEUE_FULL and self._full < len(BUSY_DELAYS_S):
            self._full += 1
            return BUSY_DELAYS_S[self._full - 1]
        if error.code in LEAVING and self._refusals < REFUSALS_MAX:
            self._refusals += 1
            self.excluded.add(worker_id)
            return 0.0
        if error.code is ErrorCode.WORKER_LOST and self.may_follow_loss(worker_id):
            return 0.0
        return None


def stalled(lease: Lease, silent: Silent) -> ArrieroError:
    """Return the error of a worker that brings no byte any more."""
    return ArrieroError(
        ErrorCode.STREAM_STALLED,
        f"worker {lease.worker_id} sent no byte for {silent.silence_s:g} s",
        worker_id=lease.worker_id,
        limit_s=silent.silence_s,
    )


class Relay:
    """Answers the OpenAI routes."""

    def __init__(
        self,
        scheduler: Scheduler,
        courier: Courier,
        exchanges: Exchanges,
        counters: Counters,
        clock: Clock,
        *,
        stall_s: float,
    ) -> None:
        self._scheduler = scheduler
        self._courier = courier
        self._exchanges = exchanges
        self._counters = counters
        self._clock = clock
        self._stall_s = silence_limit_s(stall_s)
        self._log = logs.get("arriero.relay")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request on one of the OpenAI routes."""
        outlet = Outlet(send, scope["path"])
        self._counters.requests += 1
        try:
            body = await read_body(receive)
            asked = bodies.decode(body, OpenAiBody)
            exchange = Exchange(receive, remaining_ms(scope, asked.timeout))
            call = _Call(self, scope, asked, body, exchange, outlet)
            await self._exchanges.run(exchange, call.serve)
            if exchange.is_gone:
                self._counters.cancelled += 1
        except ArrieroError as error:
            self._counters.failures += 1
            self._log.info("request failed", code=str(error.code), request_id=request_id(scope))
            await outlet.fail(error)
        except Exception:  # noqa: BLE001  The edge: the client is told, the log has the traceback.
            self._log.exception("request failed", request_id=request_id(scope))
            await outlet.fail(ArrieroError(ErrorCode.INTERNAL_ERROR))

    # --- One request, used by `_Call` ----------------------------------------------------

    async def pass_on(self, call: "_Call", lease: Lease) -> None:
        """Relay one worker's answer.  Raises Lost, Refused, Silent."""
        accept = "text/event-stream" if call.is_stream else "application/json"
        connection, head = await self._courier.bring(
            lease.address,
            "POST",
            call.path,
            headers=hop_headers(call.exchange, call.request_id, accept=accept),
            body=call.body,
        )
        try:
            if head.status >= 300:
                raise Refused(head, await connection.read_all(ERROR_BYTES_MAX))
            served_by: Headers = [
                (b"x-arriero-node", lease.node.encode()),
                (b"x-arriero-worker", lease.worker_id.encode()),
            ]
            if call.is_stream and head.get(b"content-type").startswith(b"text/event-stream"):
                if call.outlet.is_started:
                    await call.outlet.comment(f"[orchestrator] worker={lease.worker_id} node={lease.node}")
                else:
                    await call.outlet.start_stream(served_by)
                await splice_events(
                    connection, call.outlet, stall_s=self._stall_s, counters=self._counters, is_retryable=True
                )
                return
            content = await connection.read_all(ANSWER_BYTES_MAX)
            self._counters.bytes_relayed += len(content)
            await call.outlet.whole(head.status, [*passed(head, length=False), *served_by], content)
        finally:
            connection.release()

    @property
    def clock(self) -> Clock:
        """What waits are measured with."""
        return self._clock

    @property
    def scheduler(self) -> Scheduler:
        """Who chooses the worker."""
        return self._scheduler

    @property
    def counters(self) -> Counters:
        """What was counted so far."""
        return self._counters


class _Call:
    """One OpenAI request, over as many workers as it takes."""

    def __init__(
        self, relay: Relay, scope: Scope, asked: OpenAiBody, body: bytes, exchange: Exchange, outlet: Outlet
    ) -> None:
        if not asked.model:
            raise ArrieroError(ErrorCode.INVALID_REQUEST, "model: required", param="model")
        _parse_ref(asked.model)
        self._relay = relay
        self.path: str = scope["path"]
        self.request_id = request_id(scope)
        self._wants = _wants(asked.model, asked.arriero)
        self.is_stream = bool(asked.stream)
        self.body = body
        self.exchange = exchange
        self.outlet = outlet
        self._tries = Tries()
        self._held: list[str] = []

    async def serve(self) -> None:
        """Answer it.  Raises the error that the client is to hear."""
        while True:
            wants = self._wants
            if self._tries.excluded:
                wants = replace(wants, excluded=frozenset(self._tries.excluded))
            scheduler = self._relay.scheduler
            lease = scheduler.try_lease(wants) or await scheduler.lease(wants, self._say)
            with lease:
                try:
                    await self._relay.pass_on(self, lease)
                except Silent as silent:
                    raise stalled(lease, silent) from silent
                except Lost as lost:
                    if self.outlet.has_data or not self._tries.may_follow_loss(lease.worker_id):
                        raise await scheduler.lost(lease, lost.why) from lost
                    await self._narrate(f"{lease.worker_id} on {lease.node} broke off ({lost.why}): again")
                    wait_s = 0.0
                except Refused as refused:
                    again_s = self._tries.after_refusal(lease.worker_id, refused.error)
                    if again_s is None:
                        await self._pass_refusal(refused)
                        return
                    wait_s = again_s
                else:
                    if not self.outlet.is_ended:
                        await self.outlet.end()
                    return
            self._relay.counters.retries += 1
            await self._relay.clock.sleep_s(wait_s)

    async def _pass_refusal(self, refused: Refused) -> None:
        if self.outlet.is_started:
            raise refused.error
        self._relay.counters.failures += 1
        await self.outlet.whole(refused.head.status, passed(refused.head, length=False), refused.content)

    async def _say(self, step: Waiting | None) -> None:
        """Tell a waiting client of a step; hold back until it is certain that the request is right.

        Once the first byte is out an error has no status of its own any more.
        """
        if not self.is_stream:
            return
        if step is None:
            await self.outlet.comment("beat")
            return
        text = f"[{step.actor}] {step.message}"
        is_waiting = isinstance(step, TaskLoading) or (
            isinstance(step, TaskDownloading) and step.bytes_downloaded > 0
        )
        if not self.outlet.is_started and not is_waiting:
            self._held.append(text)
            return
        for line in self._held:
            await self.outlet.comment(line)
        self._held.clear()
        if isinstance(step, TaskLoading):
            await self.outlet.comment(f"loading fraction={step.fraction:.2f}")
        elif isinstance(step, TaskDownloading):
            total = step.bytes_total if step.bytes_total is not None else "unknown"
            await self.outlet.comment(f"downloading bytes={step.bytes_downloaded} total={total}")
        else:
            await self.outlet.comment(text)

    async def _narrate(self, text: str) -> None:
        if self.is_stream and self.outlet.is_started:
            await self.outlet.comment(f"[orchestrator] {text}")


def _wants(model: str, place: Place | None) -> Wants:
    if place is None:
        return Wants(model)
    return Wants(model, place.node, place.backend, place.device, labels=labels_of(place.labels))


def _parse_ref(model: str) -> None:
    try:
        refs.parse(model)
    except ArrieroError as error:
        error.details.setdefault("param", "model")
        raise
