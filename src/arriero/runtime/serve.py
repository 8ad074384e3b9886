"""How does a daemon bind its port, say that it answers, and end in good time?"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import uvicorn

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.runtime.asgi import AsgiApp

PORTS_TRIED_MAX: Final = 200


def bind(host: str, port: int, *, tries: int = 1) -> socket.socket:
    """Return a listening socket on `port` (0: a free one), or on the first free of `tries` ports from it.

    Raises PORT_IN_USE if all are taken, INVALID_SETTINGS if the address is not this machine's.
    """
    last = min(port + tries, 65536)
    for candidate in range(port, last) if port else [0]:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, candidate))
            # Listening at once: two daemons that bind at the same time cannot both succeed.
            sock.listen(2048)
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRINUSE:
                continue
            raise ArrieroError(
                ErrorCode.INVALID_SETTINGS,
                f"cannot listen on {host}:{candidate}: {error.strerror}",
                host=host,
            ) from error
        sock.setblocking(False)
        return sock
    ports = f"{port}" if tries == 1 else f"{port} to {last - 1}"
    raise ArrieroError(ErrorCode.PORT_IN_USE, f"port {ports} on {host} is taken", host=host, port=port)


def url_of(sock: socket.socket) -> str:
    """Return the http address of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own, telling when it answers."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the daemon."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then tell."""
        await super().startup(sockets)
        if self.started:
            await self._on_started()


async def serve(
    app: AsgiApp,
    sock: socket.socket,
    *,
    stop: asyncio.Event,
    on_started: Callable[[], Awaitable[None]],
    grace_s: float,
) -> None:
    """Serve `app` on `sock` until `stop` is set; then finish open requests within `grace_s`.

    `on_started` runs once requests are answered.  Closes `sock`.
    """
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )
    server = _Server(config, on_started)

    async def stopper() -> None:
        await stop.wait()
        server.should_exit = True

    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(stopper(), name="http-stop")
            await server.serve(sockets=[sock])
            task.cancel()
    finally:
        sock.close()
