"""How is work that reads many files answered: at once when it is done, or followed as events?

A client that sends `Accept: text/event-stream` gets `CheckFrame`s, then the same answer that JSON
would have been, then `[DONE]`; when it goes away the work is cancelled.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final, cast

import msgspec
from litestar import Request
from litestar.types import ASGIApp

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import CheckFrame
from arriero.runtime import sse
from arriero.runtime.asgi import BEAT_S, Receive, Scope, Send, SseResponse
from arriero.runtime.clock import Clock, SystemClock
from arriero.runtime.tasks import Changed

#: Told by the work: what is being read, the bytes read so far and those there are in all.
Tell = Callable[[str, int, int], None]
Work = Callable[[Tell], Awaitable[object]]
#: Between two frames of the same file.
INTERVAL_S: Final = 0.1

_log = logging.getLogger("arriero.http")


async def watched(
    request: Request[Any, Any, Any],
    work: Work,
    *,
    stop: asyncio.Event | None = None,
    beat_s: float = BEAT_S,
    clock: Clock | None = None,
) -> ASGIApp:
    """Return the answer of a route whose work is `work(tell)`.

    What can be refused is refused before this is called, so that it has its status in both forms;
    in the JSON form that goes for what the work raises as well.
    """
    if sse.CONTENT_TYPE in request.headers.get("accept", ""):
        return cast("ASGIApp", _Followed(work, stop, beat_s, clock or SystemClock()))
    return cast("ASGIApp", _Json(msgspec.json.encode(await work(lambda *_: None))))


class _Json:
    """An ASGI application that sends an answer that is there."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(self._body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self._body})


class _Followed:
    """An ASGI application that does the work and tells how far it is."""

    def __init__(self, work: Work, stop: asyncio.Event | None, beat_s: float, clock: Clock) -> None:
        self._work = work
        self._stop = stop
        self._beat_s = beat_s
        self._clock = clock
        self._changed = Changed()
        self._frame: CheckFrame | None = None
        self._told_s = 0.0
        self._answer: bytes | None = None
        self._error: ArrieroError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do it; cancelled when the client is gone or `stop` is set."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._run(), name="watched-work")
            await SseResponse(self._frames(), beat_s=self._beat_s, stop=self._stop)(scope, receive, send)
            task.cancel()

    async def _run(self) -> None:
        try:
            self._answer = msgspec.json.encode(await self._work(self._tell))
        except ArrieroError as error:
            self._error = error
        except Exception:  # noqa: BLE001  The edge: the client is told, the log has the traceback.
            _log.exception("watched work failed")
            self._error = ArrieroError(ErrorCode.INTERNAL_ERROR)
        self._changed.notify()

    def _tell(self, what: str, bytes_read: int, bytes_total: int) -> None:
        now_s = self._clock.monotonic_s()
        before, self._frame = (
            self._frame,
            CheckFrame(what=what, bytes_read=bytes_read, bytes_total=bytes_total),
        )
        is_news = before is None or before.what != what or bytes_read >= bytes_total
        if is_news or now_s - self._told_s >= INTERVAL_S:
            self._told_s = now_s
            self._changed.notify()

    async def _frames(self) -> AsyncGenerator[bytes, None]:
        number = 0
        last: CheckFrame | None = None
        while True:
            # The end is looked at first: what was told before it is then sent, too.
            is_over = self._answer is not None or self._error is not None
            if self._frame is not None and self._frame is not last:
                last = self._frame
                number += 1
                yield sse.encode(msgspec.json.encode(last), number)
            elif not is_over:
                await self._changed.wait()
            if is_over:
                break
        if self._error is not None:
            raise self._error
        assert self._answer is not None, "the work is over"
        yield sse.encode(self._answer, number + 1)
        yield sse.encode(sse.DONE, number + 2)
