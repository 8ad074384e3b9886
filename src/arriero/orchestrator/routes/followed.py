"""How is work followed that tells its steps?  (`POST /v1/nodes` and what else changes a machine)

An event stream: each step as it is told, at the end what came of it, then `[DONE]`; or the error.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeAlias

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import NodeDone, NodeProgress, NodeStep
from arriero.runtime import logs, sse
from arriero.runtime.asgi import Receive, Scope, Send, SseResponse
from arriero.runtime.tasks import Changed

Tell: TypeAlias = Callable[[NodeStep], None]
Work: TypeAlias = Callable[[Tell], Awaitable[NodeDone]]

_ENCODE = msgspec.json.Encoder().encode


class Followed:
    """An ASGI application that does the work; cancelled when the client is gone or `stop` is set."""

    def __init__(self, work: Work, *, stop: asyncio.Event) -> None:
        self._work = work
        self._stop = stop
        self._log = logs.get("arriero.nodes")
        self._untold: list[NodeProgress] = []
        self._changed = Changed()
        self._error: ArrieroError | None = None
        self._is_over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do it and tell of it."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._run(), name="followed-work")
            await SseResponse(self._frames(), stop=self._stop)(scope, receive, send)
            task.cancel()

    async def _run(self) -> None:
        try:
            self._untold.append(await self._work(self._tell))
        except ArrieroError as error:
            self._log.warning("not done", code=str(error.code), why=error.message)
            self._error = error
        except Exception:  # noqa: BLE001  The edge: the client is told, the log has the traceback.
            self._log.exception("followed work failed")
            self._error = ArrieroError(ErrorCode.INTERNAL_ERROR)
        self._is_over = True
        self._changed.notify()

    def _tell(self, step: NodeStep) -> None:
        self._log.info(step.step, actor=step.actor, said=step.message)
        last = self._untold[-1] if self._untold else None
        if step.fraction is not None and isinstance(last, NodeStep) and last.step == step.step:
            # Of something that advances a slow reader needs the newest alone.
            self._untold.pop()
        self._untold.append(step)
        self._changed.notify()

    async def _frames(self) -> AsyncGenerator[bytes, None]:
        number = 0
        while True:
            while self._untold:
                number += 1
                yield sse.encode(_ENCODE(self._untold.pop(0)), number)
            if self._is_over:
                break
            await self._changed.wait()
        if self._error is not None:
            raise self._error
        yield sse.encode(sse.DONE, number + 1)
