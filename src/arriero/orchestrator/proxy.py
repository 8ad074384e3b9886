"""How does any request reach a worker or an agent, wherever it lives?  (`/v1/workers/ID/proxy/…`)"""

from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.orchestrator.courier import (
    Counters,
    Courier,
    hop_headers,
    passed,
    silence_limit_s,
    splice_events,
    splice_plain,
)
from arriero.orchestrator.exchange import (
    Exchange,
    Exchanges,
    Outlet,
    header,
    read_body,
    remaining_ms,
    request_id,
)
from arriero.orchestrator.upstream import Address, Connection, Head, Lost, Silent
from arriero.runtime.asgi import Headers, Receive, Scope, Send

WORKER_CODES: Final = (ErrorCode.HEALTH_CHECK_ERROR, ErrorCode.WORKER_LOST)
UNAUTHORIZED: Final = 401
AGENT_CODES: Final = (ErrorCode.NODE_UNREACHABLE, ErrorCode.NODE_UNREACHABLE)


class Proxy:
    """Passes any request on to a worker or an agent, and the answer back."""

    def __init__(self, courier: Courier, exchanges: Exchanges, counters: Counters, *, stall_s: float) -> None:
        self._courier = courier
        self._exchanges = exchanges
        self._counters = counters
        self._stall_s = silence_limit_s(stall_s)

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send, *, address: Address, target: str, added: Headers,
        codes: tuple[ErrorCode, ErrorCode] = WORKER_CODES,
    ) -> None:  # fmt: skip
        """Pass one request on to `address` as `target`; `added` goes onto the answer's headers.

        `codes` name another side that cannot be reached, and one that breaks off.
        """
        outlet = Outlet(send, scope["path"])
        try:
            body = await read_body(receive)
            exchange = Exchange(receive, remaining_ms(scope))

            async def serve() -> None:
                await self._serve(scope, exchange, outlet, address, target, body, added, codes)

            await self._exchanges.run(exchange, serve)
        except ArrieroError as error:
            await outlet.fail(error, added)

    async def _serve(
        self, scope: Scope, exchange: Exchange, outlet: Outlet, address: Address, target: str, body: bytes,
        added: Headers, codes: tuple[ErrorCode, ErrorCode],
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
                if head.status == UNAUTHORIZED and codes is AGENT_CODES:
                    # The key is ours: it is another agent by now, and we are about to know it.
                    raise ArrieroError(codes[0], "another agent answers there since a moment ago")
                await self._answer(connection, head, outlet, added)
            finally:
                connection.release()
        except Lost as lost:
            if outlet.is_started and not outlet.is_stream:
                # A plain body cannot tell of its own end: the connection closes instead.
                return
            code = codes[0] if lost.is_unreachable else codes[1]
            raise ArrieroError(code, f"the other side broke off: {lost.why}") from lost
        except Silent as silent:
            raise ArrieroError(ErrorCode.STREAM_STALLED, str(silent), limit_s=silent.silence_s) from silent

    async def _answer(self, connection: Connection, head: Head, outlet: Outlet, added: Headers) -> None:
        is_events = head.get(b"content-type").startswith(b"text/event-stream")
        await outlet.start(head.status, [*passed(head, length=not is_events), *added])
        outlet.is_stream = is_events
        if is_events:
            await splice_events(connection, outlet, stall_s=self._stall_s, counters=self._counters)
        else:
            await splice_plain(connection, outlet, self._counters)
        await outlet.end()
