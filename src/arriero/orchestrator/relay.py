"""How does a worker's answer reach the client?  (The token path.)

The request is built anew for the worker; the answer's bytes are passed on as they came, whole
events at a time, without being read: one send for each time something arrived.
"""

from typing import Final

import msgspec

from arriero.contracts import refs
from arriero.contracts.errors import ArrieroError, ErrorCode, ErrorResponse, from_body
from arriero.contracts.events import TaskDownloading, TaskLoading
from arriero.domain.placement import Wants
from arriero.orchestrator.exchange import (
    Exchange,
    Exchanges,
    Outlet,
    header,
    read_body,
    remaining_ms,
    request_id,
)
from arriero.orchestrator.scheduler import Lease, Scheduler, Waiting
from arriero.orchestrator.upstream import Address, Connection, Head, Lost, Silent, Upstreams, request_bytes
from arriero.runtime import logs
from arriero.runtime.asgi import BEAT_S, Headers, Receive, Scope, Send
from arriero.runtime.clock import Clock

#: Waits before a worker whose queue is full is asked again.
BUSY_DELAYS_S: Final = (1.0, 2.0, 4.0)
#: Workers a request may be lost on before its client hears of it.
LOSSES_MAX: Final = 1
#: Workers that refuse because they are leaving: our view lagged behind.
REFUSALS_MAX: Final = 4
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
ERROR_BYTES_MAX: Final = 1024 * 1024
EVENT_BYTES_MAX: Final = 16 * 1024 * 1024
_EVENT_END: Final = b"\n\n"
#: Answered by a worker that takes nothing any more, or not yet.
LEAVING: Final = frozenset(
    {ErrorCode.NO_READY_WORKERS, ErrorCode.MODEL_LOADING, ErrorCode.WORKER_UNHEALTHY}
)  # fmt: skip
_PASSED_HEADERS: Final = frozenset(
    {
        b"content-type", b"content-length", b"content-range", b"accept-ranges", b"cache-control",
        b"retry-after", b"x-accel-buffering", b"location", b"allow", b"etag",
    }
)  # fmt: skip


class OpenAiBody(msgspec.Struct, frozen=True):
    """What the orchestrator reads of an OpenAI request; the rest is the worker's."""

    model: str | None = None
    stream: bool | None = None
    timeout: float | None = None


_BODY: Final = msgspec.json.Decoder(OpenAiBody)


class Refused(Exception):
    """A worker answered with an error before the first byte."""

    def __init__(self, head: Head, content: bytes) -> None:
        self.head = head
        self.content = content
        try:
            self.error = from_body(msgspec.json.decode(content, type=ErrorResponse).error)
        except msgspec.DecodeError:
            self.error = ArrieroError(
                ErrorCode.INTERNAL_ERROR, f"a worker answered with status {head.status}", status=head.status
            )
        super().__init__(str(self.error))


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


class Counters:
    """Plain integers, exported when somebody asks."""

    def __init__(self) -> None:
        self.requests = 0
        self.failures = 0
        self.cancelled = 0
        self.bytes_relayed = 0
        self.retries = 0


class Courier:
    """Brings one request to one worker."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    async def bring(
        self, address: Address, method: str, target: str, *, headers: list[tuple[str, str]], body: bytes
    ) -> tuple[Connection, Head]:
        """Send a request; return the connection and the answer's head.  Release or abort it afterwards.

        Raises Lost if no answer comes.
        """
        request = request_bytes(method, target, address, headers, body)
        is_new = False
        while True:
            connection = await self._upstreams.open(address, is_new=is_new)
            try:
                connection.send(request, is_bodiless=method == "HEAD")
                return connection, await connection.head()
            except Lost:
                connection.abort()
                # A kept connection may have been closed by the other side just now.
                if not connection.is_reused:
                    raise
                is_new = True
            except BaseException:
                connection.abort()
                raise


def hop_headers(exchange: Exchange, request_id_: str, *, accept: str) -> list[tuple[str, str]]:
    """Return the headers that every request to a worker carries."""
    found = [("content-type", "application/json"), ("accept", accept), ("x-request-id", request_id_)]
    left_ms = exchange.next_hop_ms()
    if left_ms is not None:
        found.append(("x-request-deadline", f"{left_ms:.0f}"))
    return found


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
        # The worker's own rule comes first; ours is for a worker that cannot speak any more.
        self._stall_s = stall_s * 1.1 + 1
        self._log = logs.get("arriero.relay")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request on one of the OpenAI routes."""
        outlet = Outlet(send, scope["path"])
        self._counters.requests += 1
        try:
            body = await read_body(receive)
            asked = _decode(body)
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
            await call.outlet.whole(head.status, [*_passed(head, length=False), *served_by], content)
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
        self.model = asked.model
        self.is_stream = bool(asked.stream)
        self.body = body
        self.exchange = exchange
        self.outlet = outlet
        self._tries = Tries()
        self._held: list[str] = []

    async def serve(self) -> None:
        """Answer it.  Raises the error that the client is to hear."""
        while True:
            wants = Wants(self.model, excluded=frozenset(self._tries.excluded))
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
        await self.outlet.whole(refused.head.status, _passed(refused.head, length=False), refused.content)

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


async def splice_events(
    connection: Connection, outlet: Outlet, *, stall_s: float, counters: Counters, is_retryable: bool = False
) -> None:
    """Pass an event stream on to its end, whole events only; a beat goes out while nothing comes.

    Raises Lost if it breaks off (then no half event was sent), Silent after `stall_s` without a byte.
    Where `is_retryable`, an error event WORKER_LOST before any data counts as Lost.
    """
    connection.beat(BEAT_S)
    held = b""
    while True:
        chunk = await connection.read(stall_s=stall_s)
        if chunk is None:
            await outlet.write(b": beat\n\n")
            continue
        if chunk == b"":
            if held:
                raise Lost("the stream ended within an event")
            return
        if held:
            chunk = held + chunk
            held = b""
        if not chunk.endswith(_EVENT_END):
            cut = chunk.rfind(_EVENT_END)
            cut = 0 if cut < 0 else cut + len(_EVENT_END)
            chunk, held = chunk[:cut], chunk[cut:]
            if len(held) > EVENT_BYTES_MAX:
                raise Lost(f"an event is larger than {EVENT_BYTES_MAX} bytes")
            if not chunk:
                continue
        if not outlet.has_data and b"data:" in chunk:
            if is_retryable and b"event: error" in chunk and b'"WORKER_LOST"' in chunk:
                raise Lost("its engine died")
            outlet.has_data = True
        counters.bytes_relayed += len(chunk)
        await outlet.write(chunk)


async def splice_plain(connection: Connection, outlet: Outlet, counters: Counters) -> None:
    """Pass a body on as it comes.  Raises Lost if it breaks off."""
    while True:
        chunk = await connection.read()
        if chunk == b"":
            return
        if chunk is not None:
            counters.bytes_relayed += len(chunk)
            await outlet.write(chunk)


class Proxy:
    """Passes any request on to a worker or an agent, and the answer back."""

    def __init__(self, courier: Courier, exchanges: Exchanges, counters: Counters, *, stall_s: float) -> None:
        self._courier = courier
        self._exchanges = exchanges
        self._counters = counters
        self._stall_s = stall_s * 1.1 + 1

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send, *, address: Address, target: str, added: Headers
    ) -> None:
        """Pass one request on to `address` as `target`; `added` goes onto the answer's headers."""
        outlet = Outlet(send, scope["path"])
        try:
            body = await read_body(receive)
            exchange = Exchange(receive, remaining_ms(scope))

            async def serve() -> None:
                await self._serve(scope, exchange, outlet, address, target, body, added)

            await self._exchanges.run(exchange, serve)
        except ArrieroError as error:
            await outlet.fail(error, added)

    async def _serve(
        self, scope: Scope, exchange: Exchange, outlet: Outlet, address: Address, target: str, body: bytes,
        added: Headers,
    ) -> None:  # fmt: skip
        headers = hop_headers(exchange, request_id(scope), accept=header(scope, b"accept") or "*/*")
        for name in ("content-type", "last-event-id", "range"):
            given = header(scope, name.encode())
            if given:
                headers = [pair for pair in headers if pair[0] != name]
                headers.append((name, given))
        try:
            connection, head = await self._courier.bring(
                address, scope["method"], target, headers=headers, body=body
            )
            try:
                await self._answer(connection, head, outlet, added)
            finally:
                connection.release()
        except Lost as lost:
            if outlet.is_started and not outlet.is_stream:
                # A plain body cannot tell of its own end: the connection closes instead.
                return
            code = ErrorCode.HEALTH_CHECK_ERROR if lost.is_unreachable else ErrorCode.WORKER_LOST
            raise ArrieroError(code, f"the other side broke off: {lost.why}") from lost
        except Silent as silent:
            raise ArrieroError(ErrorCode.STREAM_STALLED, str(silent), limit_s=silent.silence_s) from silent

    async def _answer(self, connection: Connection, head: Head, outlet: Outlet, added: Headers) -> None:
        is_events = head.get(b"content-type").startswith(b"text/event-stream")
        await outlet.start(head.status, [*_passed(head, length=not is_events), *added])
        outlet.is_stream = is_events
        if is_events:
            await splice_events(connection, outlet, stall_s=self._stall_s, counters=self._counters)
        else:
            await splice_plain(connection, outlet, self._counters)
        await outlet.end()


def _passed(head: Head, *, length: bool) -> Headers:
    return [
        (name, value)
        for name, value in head.headers
        if name in _PASSED_HEADERS and (length or name != b"content-length")
    ]


def _decode(body: bytes) -> OpenAiBody:
    try:
        return _BODY.decode(body)
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at ")
        field = where.strip("`$.") or None
        raise ArrieroError(
            ErrorCode.INVALID_REQUEST, f"{field or 'the body'}: {reason}"[:500], param=field
        ) from error
    except msgspec.DecodeError as error:
        raise ArrieroError(ErrorCode.INVALID_REQUEST, f"the body is no JSON: {error}"[:300]) from error


def _parse_ref(model: str) -> None:
    try:
        refs.parse(model)
    except ArrieroError as error:
        error.details.setdefault("param", "model")
        raise
