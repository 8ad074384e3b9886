"""How does one HTTP request leave this process and come back, with every wait limited?

One connection a request, never through a proxy.  All limits hold for each single read, so that a
server that answers a byte at a time cannot stretch them.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from arriero.client import http1
from arriero.client.http1 import Answer
from arriero.contracts.errors import ArrieroError, ErrorCode, ErrorResponse, from_body
from arriero.contracts.version import __version__

CONNECT_TIMEOUT_S: Final = 10.0
CALL_TIMEOUT_S: Final = 30.0
#: Waits before the second and the third attempt to connect; each is stretched by up to a half by chance.
CONNECT_DELAYS_S: Final = (0.2, 0.4)
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024


class FailureCodes(msgspec.Struct, frozen=True):
    """Which error codes stand for the ways a request can fail; a probe brings its own."""

    #: Refused, reset, an unknown host, broken off, or no HTTP at all.
    unreachable: ErrorCode
    #: No connection, no answer or no byte in time.
    timeout: ErrorCode
    #: A status that is not 2xx; None: the code that the answer's own envelope carries.
    status: ErrorCode | None = None


#: A call whose failure has no name of its own.
CALL_CODES: Final = FailureCodes(ErrorCode.NODE_UNREACHABLE, ErrorCode.REQUEST_TIMEOUT)


class Limits(msgspec.Struct, frozen=True):
    """How long one request may take, in seconds."""

    #: Until the connection stands.
    connect_s: float = CONNECT_TIMEOUT_S
    #: Without a single byte, comments included.
    silence_s: float = CALL_TIMEOUT_S
    #: Until the head of the answer; None: as any silence.
    head_s: float | None = None
    #: From the first attempt to connect to the last byte; None: as long as bytes come.
    total_s: float | None = None
    #: Attempts to connect; only a refused or failed connection is tried again, never a sent request.
    attempts: int = 1


class Target(msgspec.Struct, frozen=True):
    """Where requests go, and with which token."""

    host: str
    port: int
    is_tls: bool
    base_path: str
    token: str

    @property
    def netloc(self) -> str:
        """Host and port as they stand in an address."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def target_of(url: str, token: str = "") -> Target:
    """Return where `url` leads.  Raises INVALID_REQUEST if it is no http or https address."""
    try:
        split = urlsplit(url)
        host, port = split.hostname, split.port
    except ValueError as error:
        raise ArrieroError(ErrorCode.INVALID_REQUEST, f"{url!r} is no address: {error}") from error
    if split.scheme not in ("http", "https") or not host:
        raise ArrieroError(ErrorCode.INVALID_REQUEST, f"{url!r} is no http:// or https:// address")
    is_tls = split.scheme == "https"
    return Target(host, port or (443 if is_tls else 80), is_tls, split.path.rstrip("/"), token)


class Exchange:
    """One request and its answer, used as `with Exchange(…) as exchange`.

    `close` may be called from any thread and more than once: a read that waits ends at once, and
    what reads then sees `is_closed`.
    """

    def __init__(self, target: Target, *, limits: Limits, codes: FailureCodes) -> None:
        self.target = target
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.is_closed = False
        self._limits = limits
        self._codes = codes
        self._deadline = None if limits.total_s is None else time.monotonic() + limits.total_s
        self._sock: socket.socket | None = None
        self._answer: Answer | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> "Exchange":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(
        self, method: str, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> None:
        """Connect, send, and read the answer's head into `status` and `headers`.

        `body` is sent as JSON, bytes as they are.
        """
        sent = {"Host": self.target.netloc, "User-Agent": f"arriero/{__version__}", "Connection": "close"}
        if self.target.token:
            sent["Authorization"] = f"Bearer {self.target.token}"
        content = b""
        if body is not None:
            content = body if isinstance(body, bytes) else msgspec.json.encode(body)
            sent["Content-Type"] = "application/json"
        sent.update(headers or {})
        with self._translated():
            request = http1.request_bytes(method, self.target.base_path + path, sent, content)
            sock = self._connect()
            sock.settimeout(self._remaining_s())
            sock.sendall(request)
            answer = Answer(self._receive)
            answer.read_head()
        self._answer = answer
        self.status = answer.status
        self.headers = answer.headers

    def read_some(self) -> bytes:
        """Return the next bytes of the answer as soon as there are some; b"" at its end."""
        assert self._answer is not None, "read before send"
        with self._translated():
            return self._answer.read_some()

    def read_all(self) -> bytes:
        """Return the rest of the answer.  Raises the code of an unreachable peer beyond 64 MiB."""
        parts: list[bytes] = []
        size = 0
        while chunk := self.read_some():
            parts.append(chunk)
            size += len(chunk)
            if size > ANSWER_BYTES_MAX:
                raise ArrieroError(
                    self._codes.unreachable, f"an answer of more than {ANSWER_BYTES_MAX} bytes"
                )
        return b"".join(parts)

    def raise_for_status(self) -> None:
        """Raise the error of an answer that is not 2xx, with the status among its details."""
        if 200 <= self.status < 300:
            return
        found = error_of(self.status, self.read_all())
        if self._codes.status is None:
            raise found
        raise ArrieroError(
            self._codes.status,
            f"{self.target.netloc} answered with status {self.status}: {found.message}",
            status=self.status,
            answered_code=found.code.value,
            answered_details=found.details,
        )

    def close(self) -> None:
        """End the exchange; the server sees the connection close."""
        with self._lock:
            self.is_closed = True
            sock = self._sock
        if sock is not None:
            # Wakes a thread that waits in recv, which closing alone does not.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def broken(self, why: str) -> ArrieroError:
        """Return the error of a peer that does not answer as it should."""
        return ArrieroError(self._codes.unreachable, f"{self.target.netloc}: {why}", reason=why)

    def _remaining_s(self) -> float:
        """Return how long the next wait may be; raises TimeoutError if no time is left."""
        silence_s = self._silence_s()
        if self._deadline is None:
            return silence_s
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return min(left, silence_s)

    def _silence_s(self) -> float:
        if self._answer is None and self._limits.head_s is not None:
            return self._limits.head_s
        return self._limits.silence_s

    def _receive(self, size: int) -> bytes:
        """Receive from the socket; each wait is no longer than allowed then."""
        assert self._sock is not None
        self._sock.settimeout(self._remaining_s())
        return self._sock.recv(size)

    def _connect(self) -> socket.socket:
        delays = CONNECT_DELAYS_S[: max(0, self._limits.attempts - 1)]
        for delay in delays:
            try:
                return self._connect_once()
            except OSError:
                if self.is_closed:
                    raise
            # No secret: chance only keeps many clients from coming back in step.
            time.sleep(min(delay * (1 + os.urandom(1)[0] / 512), self._remaining_s()))
        return self._connect_once()

    def _connect_once(self) -> socket.socket:
        deadline = time.monotonic() + self._limits.connect_s
        last: OSError | None = None
        found = socket.getaddrinfo(self.target.host, self.target.port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in found:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(max(0.001, min(self._remaining_s(), deadline - time.monotonic())))
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self.target.is_tls:
                    import ssl

                    sock = ssl.create_default_context().wrap_socket(sock, server_hostname=self.target.host)
            except OSError as error:
                sock.close()
                last = error
                continue
            with self._lock:
                if self.is_closed:
                    sock.close()
                    raise OSError("closed")
                self._sock = sock
            return sock
        raise last if last is not None else OSError("no address")

    def _timed_out(self) -> ArrieroError:
        limit = self._limits.total_s
        if self._deadline is None or time.monotonic() < self._deadline:
            limit = self._limits.connect_s if self._sock is None else self._silence_s()
        what = "no connection" if self._sock is None else "no answer" if self._answer is None else "not done"
        shown = f"{self.target.netloc}: {what} within {limit:g} s"
        return ArrieroError(self._codes.timeout, shown, timeout_s=limit)

    @contextlib.contextmanager
    def _translated(self) -> Any:
        """Turn what sockets and `http1` raise into our errors."""
        try:
            yield
        except TimeoutError as error:
            raise self._timed_out() from error
        except socket.gaierror as error:
            raise self.broken(f"the host is not known ({error.strerror})") from error
        except ConnectionRefusedError as error:
            raise self.broken("connection refused") from error
        except http1.CutOff as error:
            raise self.broken("the connection closed in the middle of the answer") from error
        except http1.NoAnswer as error:
            raise self.broken("the connection closed without an answer") from error
        except http1.NotHttp as error:
            raise self.broken(f"no proper HTTP ({error})") from error
        except ConnectionError as error:
            raise self.broken("connection reset") from error
        except OSError as error:
            raise self.broken(error.strerror or str(error) or type(error).__name__) from error
        except ValueError as error:
            # A header or a path with control characters.
            raise self.broken(f"the request could not be made ({error})") from error


def error_of(status: int, content: bytes) -> ArrieroError:
    """Return the error that an answer of `status` with `content` speaks of."""
    try:
        found = from_body(msgspec.json.decode(content, type=ErrorResponse).error)
    except msgspec.DecodeError:
        return ArrieroError(ErrorCode.INTERNAL_ERROR, f"answered with status {status}", status=status)
    found.details.setdefault("status", status)
    return found
