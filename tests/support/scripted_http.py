"""A small HTTP server that plays its part from a script: also the broken parts no daemon of ours plays."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Connection:
    """What a script speaks through."""

    sock: socket.socket
    stopping: threading.Event

    def send(self, content: bytes) -> None:
        self.sock.sendall(content)

    def answer(self, status: int, body: Any, content_type: str = "application/json", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        extra = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        extra += f"Content-Type: {content_type}\r\nContent-Length: {len(content)}\r\n"
        head = f"HTTP/1.1 {status} X\r\n{extra}\r\n"
        self.send(head.encode() + content)

    def begin_stream(self) -> None:
        self.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    def chunk(self, content: bytes) -> None:
        self.send(b"%x\r\n%s\r\n" % (len(content), content))

    def event(self, value: Any, event: str = "") -> None:
        head = f"event: {event}\n" if event else ""
        data = value if isinstance(value, str) else json.dumps(value)
        self.chunk(f"{head}data: {data}\n\n".encode())

    def end_stream(self) -> None:
        self.chunk(b"")

    def wait_closed(self) -> bool:
        """Wait until the other side has closed; False if the server is stopped before."""
        self.sock.settimeout(0.05)
        while not self.stopping.is_set():
            try:
                if not self.sock.recv(4096):
                    return True
            except TimeoutError:
                continue
            except OSError:
                return True
        return False

    def wait_stopping(self) -> None:
        """Say nothing until the test is over or the client is gone."""
        self.wait_closed()


Script = Callable[[Request, Connection], None]


@dataclass
class ScriptedServer:
    script: Script
    requests: list[Request] = field(default_factory=list)
    _stopping: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "ScriptedServer":
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self._accepting = threading.Thread(target=self._accept, name="scripted-accept")
        self._accepting.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        self._accepting.join(60)
        for thread in self._threads:
            thread.join(60)
        self._listener.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                sock, _ = self._listener.accept()
            except TimeoutError:
                continue
            thread = threading.Thread(target=self._serve, args=(sock,), name="scripted-connection")
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(10)
            request = _read_request(sock)
            if request is not None:
                self.requests.append(request)
                self.script(request, Connection(sock, self._stopping))


def _read_request(sock: socket.socket) -> Request | None:
    content = b""
    while b"\r\n\r\n" not in content:
        more = sock.recv(65536)
        if not more:
            return None
        content += more
    head, _, body = content.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = int(headers.get("content-length", "0"))
    while len(body) < length:
        body += sock.recv(65536)
    method, path, _ = first.split(" ")
    return Request(method, path, headers, body)


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port on which nobody listens while the context is open: bound, not listening."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]
