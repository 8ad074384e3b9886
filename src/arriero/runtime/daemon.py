"""How does a daemon's process live?  One loop, one stop event, signals that set it."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

import uvloop


def run(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `main(stop)` to its end on uvloop; SIGTERM and SIGINT set `stop`.

    A second signal changes nothing: ending has its own limits.
    """

    async def supervised() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    uvloop.run(supervised())
