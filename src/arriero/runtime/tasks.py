"""How are tasks started, told apart, and waited for by a moment instead of a second?"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")
Announce: TypeAlias = Callable[[T], None]
Serve: TypeAlias = Callable[[Announce[T]], Coroutine[Any, Any, None]]


class NeverReady(Exception):
    """A service ended before it announced that it is ready."""


async def start_ready(group: asyncio.TaskGroup, serve: Serve[T], *, name: str) -> T:
    """Start `serve(announce)` in `group` and return what it announces.

    Raises NeverReady if it ends first; if it fails first, the group fails with its error.
    """
    ready: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def announce(value: T) -> None:
        if not ready.done():
            ready.set_result(value)

    def ended(_: asyncio.Task[None]) -> None:
        if not ready.done():
            ready.set_exception(NeverReady(name))

    group.create_task(serve(announce), name=name).add_done_callback(ended)
    return await ready


class Changed:
    """A value's changes, for any number of waiters: nobody polls, nobody misses the last one."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake everybody who waits now."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Wait for the next `notify`.  Take the value first, without an `await` in between."""
        await self._event.wait()

    def next(self) -> asyncio.Event:
        """Return what the next `notify` sets, for whoever awaits something else first."""
        return self._event


class Moment(Generic[T]):
    """A named point that product code passes and a test can wait for; free where nobody listens."""

    def __init__(self) -> None:
        self._seen: asyncio.Queue[T] | None = None

    def mark(self, value: T) -> None:
        """Say that the point is passed."""
        if self._seen is not None:
            self._seen.put_nowait(value)

    async def listen(self) -> asyncio.Queue[T]:
        """Return the queue of what is marked from now on."""
        self._seen = asyncio.Queue()
        return self._seen
