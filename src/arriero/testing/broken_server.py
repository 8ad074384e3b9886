"""Which ways of being broken can a server play?

    python -m arriero.testing.broken_server MODE [--after N]

One small HTTP server that stands in for a registry, a worker or an agent, broken in
exactly one way; the good parts in a test are real ones.  Its first line on stdout is
`READY <url>`; it ends when its stdin is closed.  `GET /_seen` tells the requests it got.
"""

import argparse
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

WORKER_ID: Final = "w-00000000b0b0"
HEAD_BYTES_MAX: Final = 65_536
BODY_BYTES_MAX: Final = 10_000_000
SSE_HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


class ConnectionEnded(Exception):
    """The other side is gone."""


@dataclass(slots=True)
class Broken:
    """What the server plays, and what it has been asked."""

    mode: str
    url: str = ""
    #: So many good frames, or good answers, before the fault.
    after: int = 3
    seen: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, request: "Request") -> int:
        """Keep a request; return how many with this path came before it."""
        with self.lock:
            before = sum(1 for known in self.seen if known["path"] == request.path)
            self.seen.append(
                {
                    "method": request.method,
                    "path": request.path,
                    "range": request.headers.get("range", ""),
                    "at_s": time.monotonic(),
                }
            )
            return before


@dataclass(frozen=True, slots=True)
class Request:
    """One request, read whole."""

    connection: socket.socket
    method: str
    path: str
    headers: dict[str, str]
    #: How many requests with the same path came before.
    before: int = 0

    def send(self, content: bytes) -> None:
        """Send bytes as they are.  Raises ConnectionEnded."""
        try:
            self.connection.sendall(content)
        except OSError as error:
            raise ConnectionEnded from error

    def answer(self, status: int, content: bytes, *, kind: str = "application/json", extra: str = "") -> None:
        """Send a whole answer."""
        head = (
            f"HTTP/1.1 {status} Played\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n"
            f"{extra}Connection: close\r\n\r\n"
        )
        self.send(head.encode() + (b"" if self.method == "HEAD" else content))

    def answer_json(self, status: int, value: object) -> None:
        """Send a whole JSON answer."""
        self.answer(status, json.dumps(value).encode())

    def event(self, value: object, event: str = "") -> None:
        """Send one event of a stream whose head is sent."""
        name = f"event: {event}\n" if event else ""
        data = value if isinstance(value, str) else json.dumps(value)
        self.send(f"{name}data: {data}\n\n".encode())

    def reset(self) -> None:
        """End the connection with a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def fall_silent(self) -> None:
        """Say nothing more until the other side has gone."""
        try:
            while self.connection.recv(4096):
                pass
        except OSError as error:
            raise ConnectionEnded from error


Play: TypeAlias = Callable[[Broken, Request], None]


def error_envelope(code: str, message: str, **details: object) -> dict[str, Any]:
    """Return an error as our daemons send it."""
    return {"error": {"code": code, "message": message, "details": details}}


# --- Broken whatever is asked --------------------------------------------------------------------


def status_500(_: Broken, request: Request) -> None:
    """Answer everything with 500."""
    request.answer_json(500, error_envelope("INTERNAL_ERROR", "played by the broken server"))


def status_404(_: Broken, request: Request) -> None:
    """Answer everything with 404, and a page that is no envelope."""
    request.answer(404, b"<h1>Not here</h1>", kind="text/html")


def mute(_: Broken, request: Request) -> None:
    """Accept, read, say nothing."""
    request.fall_silent()


def reset(_: Broken, request: Request) -> None:
    """Accept, read, reset."""
    request.reset()


def wrong_type(_: Broken, request: Request) -> None:
    """Answer everything with 200 and a web page."""
    request.answer(200, b"<h1>Welcome</h1>", kind="text/html")


# --- Streams -------------------------------------------------------------------------------------


def _frames(broken: Broken, request: Request) -> list[dict[str, Any]]:
    """Return good frames of the stream that was asked for, more than `after` of them."""
    count = broken.after + 5
    if request.path.endswith("/v1/progress"):
        return [
            {
                "stage": "loading",
                "fraction": index / count,
                "layers_loaded": index,
                "layers_total": count,
                "memory_mb": 10 * index,
            }
            for index in range(count)
        ]
    if request.path.endswith("/v1/models/download/progress"):
        return [
            {
                "stage": "downloading",
                "bytes_downloaded": 1000 * index,
                "bytes_total": 1000 * count,
                "speed_mbps": 1.0,
                "eta_s": 1.0,
                "download_id": "d-00000000b0b0",
            }
            for index in range(count)
        ]
    started = {"started": True, "request_id": "req-broken"}
    return [started, *({"token": f"{index} ", "id": 100 + index, "index": index} for index in range(count))]


def _good_start(broken: Broken, request: Request) -> None:
    request.send(SSE_HEAD)
    frames = _frames(broken, request)
    # A token stream has its `started` frame before the tokens that `after` counts.
    for frame in frames[: broken.after + (1 if "started" in frames[0] else 0)]:
        request.event(frame)


def half_reset(broken: Broken, request: Request) -> None:
    """Some good frames, then a reset."""
    _good_start(broken, request)
    request.reset()


def half_closed(broken: Broken, request: Request) -> None:
    """Some good frames, then a clean end of the connection, as if that were all."""
    _good_start(broken, request)


def half_silent(broken: Broken, request: Request) -> None:
    """Some good frames, then silence."""
    _good_start(broken, request)
    request.fall_silent()


def beats_only(_: Broken, request: Request) -> None:
    """A stream of comment lines: alive, and never an event."""
    request.send(SSE_HEAD)
    pause = threading.Event()
    while True:
        request.send(b": beat\n\n")
        pause.wait(0.1)


def garbage(_: Broken, request: Request) -> None:
    """A stream whose data is no JSON."""
    request.send(SSE_HEAD)
    request.event("this is {no json")
    request.event("[DONE]")


def error_event(broken: Broken, request: Request) -> None:
    """Some good frames, then the event `error`."""
    _good_start(broken, request)
    request.event(error_envelope("WORKER_LOST", "played by the broken server"), "error")


def _done(total: int) -> dict[str, Any]:
    return {
        "done": True,
        "total_tokens": total,
        "duration_ms": 1,
        "finish_reason": "stop",
        "prompt_tokens": 1,
    }


def _tokens(
    request: Request, indexes: list[int], total: int, *, done: bool = True, mark: bool = True
) -> None:
    request.send(SSE_HEAD)
    request.event({"started": True, "request_id": "req-broken"})
    for index in indexes:
        request.event({"token": f"{index} ", "id": 100 + index, "index": index})
    if done:
        request.event(_done(total))
    if mark:
        request.event("[DONE]")


def token_dropped(broken: Broken, request: Request) -> None:
    """A token stream that lacks one token in its middle and counts it nevertheless."""
    count = broken.after + 2
    _tokens(request, [index for index in range(count) if index != broken.after - 1], count)


def last_token_dropped(broken: Broken, request: Request) -> None:
    """A token stream that lacks its last token and counts it nevertheless."""
    _tokens(request, list(range(broken.after)), broken.after + 1)


def token_doubled(broken: Broken, request: Request) -> None:
    """A token stream that sends one token twice."""
    indexes = list(range(broken.after))
    _tokens(request, [*indexes, broken.after - 1], broken.after + 1)


def no_done_frame(broken: Broken, request: Request) -> None:
    """A token stream without its `done` frame."""
    _tokens(request, list(range(broken.after)), 0, done=False)


def no_done_mark(broken: Broken, request: Request) -> None:
    """A token stream without `[DONE]`."""
    _tokens(request, list(range(broken.after)), broken.after, mark=False)


def no_tokens(_: Broken, request: Request) -> None:
    """A token stream that ends well and brought nothing."""
    _tokens(request, [], 0)


# --- A worker's health ---------------------------------------------------------------------------


def _health(state: str, status: str) -> dict[str, Any]:
    return {
        "status": status,
        "worker_id": WORKER_ID,
        "model_ref": "demo",
        "state": state,
        "slots_total": 4,
        "slots_busy": 0,
        "queued": 0,
    }


def unwell(_: Broken, request: Request) -> None:
    """Answer 200, and say in the body that the worker has failed."""
    request.answer_json(200, _health("failed", "unhealthy"))


# --- A registry ----------------------------------------------------------------------------------


def _record(broken: Broken, state: str) -> dict[str, Any]:
    return {
        "worker_id": WORKER_ID,
        "node": "broken",
        "url": broken.url,
        "model_ref": "demo",
        "backend": "cpu",
        "device": "cpu",
        "state": state,
        "slots_total": 4,
        "slots_available": 4,
        "pid": os.getpid(),
        "started_unix": 1.0,
        "last_activity_unix": 1.0,
    }


def registry_confused(broken: Broken, request: Request) -> None:
    """A registry that names a state which does not exist."""
    request.answer_json(200, {"workers": [_record(broken, "confused")]})


def registry_backwards(broken: Broken, request: Request) -> None:
    """A registry whose worker is idle, and loading some looks later."""
    state = "idle" if request.before < broken.after else "loading"
    request.answer_json(200, {"workers": [_record(broken, state)]})


def registry_forgets(broken: Broken, request: Request) -> None:
    """A registry whose worker is gone some looks later."""
    workers = [_record(broken, "idle")] if request.before < broken.after else []
    request.answer_json(200, {"workers": workers})


def download_never_begins(_: Broken, request: Request) -> None:
    """An agent that accepts a download and then has no progress to tell."""
    if request.method == "POST":
        progress = "/v1/models/download/progress?download_id=d-00000000b0b0"
        request.answer_json(202, {"download_id": "d-00000000b0b0", "progress_url": progress})
    else:
        request.answer_json(404, error_envelope("NOT_FOUND", "no download d-00000000b0b0"))


#: Each mode, by the name given on the command line.
MODES: Final[dict[str, Play]] = {
    play.__name__.replace("_", "-"): play
    for play in (
        status_500, status_404, mute, reset, wrong_type,
        half_reset, half_closed, half_silent, beats_only, garbage, error_event,
        token_dropped, last_token_dropped, token_doubled, no_done_frame, no_done_mark, no_tokens,
        unwell, registry_confused, registry_backwards, registry_forgets,
        download_never_begins,
    )
}  # fmt: skip

#: Faults of a worker: its registry is asked first and must answer well.
_WORKER_FAULTS: Final = frozenset(
    name.replace("_", "-")
    for name in (
        "half_reset", "half_closed", "half_silent", "beats_only", "garbage", "error_event",
        "token_dropped", "last_token_dropped", "token_doubled", "no_done_frame", "no_done_mark",
        "no_tokens", "unwell",
    )
)  # fmt: skip


# --- The server ----------------------------------------------------------------------------------


def _read(connection: socket.socket) -> Request | None:
    """Read one request with its body; None if the other side sent no whole one."""
    buffer = b""
    while b"\r\n\r\n" not in buffer:
        chunk = connection.recv(65_536)
        if not chunk or len(buffer) > HEAD_BYTES_MAX:
            return None
        buffer += chunk
    head, _, body = buffer.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, *_ = first.split(" ")
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    length = int(headers.get("content-length", "0"))
    while len(body) < min(length, BODY_BYTES_MAX):
        chunk = connection.recv(65_536)
        if not chunk:
            return None
        body += chunk
    return Request(connection, method, target.partition("?")[0], headers)


def _serve(broken: Broken, connection: socket.socket) -> None:
    with connection:
        try:
            request = _read(connection)
            if request is None:
                return
            if request.path == "/_seen":
                request.answer_json(200, broken.seen)
                return
            before = broken.note(request)
            request = Request(connection, request.method, request.path, request.headers, before)
            if broken.mode in _WORKER_FAULTS and request.path == "/v1/workers":
                request.answer_json(200, {"workers": [_record(broken, "idle")]})
            else:
                MODES[broken.mode](broken, request)
        except (ConnectionEnded, OSError):
            return


def _accept(listener: socket.socket, broken: Broken) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve, args=(broken, connection), daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    """Play until stdin is closed."""
    parser = argparse.ArgumentParser(prog="broken_server", description=main.__doc__)
    parser.add_argument("mode", choices=sorted(MODES))
    parser.add_argument("--after", type=int, default=3)
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    broken = Broken(given.mode, after=given.after)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        broken.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=_accept, args=(listener, broken), daemon=True).start()
        sys.stdout.write(f"READY {broken.url}\n")
        sys.stdout.flush()
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
