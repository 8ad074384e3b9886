"""How is one daemon called?  JSON over HTTP, or an event stream; every failure is an `ArrieroError`."""

from collections.abc import Iterator, Mapping
from typing import Final, TypeVar

import msgspec

from arriero.client import stream as streams
from arriero.client.connection import CALL_CODES, Exchange, FailureCodes, Limits, target_of
from arriero.client.stream import EventStream
from arriero.contracts.errors import ArrieroError, ErrorCode

T = TypeVar("T")
#: A stream that tells nothing, not even a comment (every 10 s), for so long is dead.
STREAM_SILENCE_S: Final = 30.0


class RawAnswer(msgspec.Struct, frozen=True):
    """An answer as it came, whatever its status."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Caller:
    """One daemon, called by JSON over HTTP.  Safe to use from several threads."""

    def __init__(
        self,
        url: str,
        token: str = "",
        *,
        limits: Limits | None = None,
        codes: FailureCodes = CALL_CODES,
    ) -> None:
        self.url = url.rstrip("/")
        self.codes = codes
        self.limits = limits or Limits(total_s=30.0)
        self._target = target_of(url, token)

    def call(
        self, method: str, path: str, answer: type[T], *, body: object = None,
        headers: Mapping[str, str] | None = None, timeout_s: float | None = None,
        codes: FailureCodes | None = None,
    ) -> T:  # fmt: skip
        """Send a request and return its decoded answer.  Raises VERSION_MISMATCH if it is none of ours."""
        with self._exchange(timeout_s, codes) as exchange:
            exchange.send(method, path, body, headers)
            exchange.raise_for_status()
            content = exchange.read_all()
        try:
            return msgspec.json.decode(content, type=answer)
        except msgspec.DecodeError as error:
            raise ArrieroError(
                ErrorCode.VERSION_MISMATCH, f"{method} {path} was answered with something else: {error}"
            ) from error

    def send(
        self, method: str, path: str, *, body: object = None, headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None, codes: FailureCodes | None = None,
    ) -> None:  # fmt: skip
        """Send a request whose answer has no content of interest."""
        with self._exchange(timeout_s, codes) as exchange:
            exchange.send(method, path, body, headers)
            exchange.raise_for_status()

    def raw(
        self, method: str, path: str, *, body: object = None, headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None, codes: FailureCodes | None = None,
    ) -> RawAnswer:  # fmt: skip
        """Send a request and return the answer whatever its status is."""
        with self._exchange(timeout_s, codes) as exchange:
            exchange.send(method, path, body, headers)
            return RawAnswer(exchange.status, exchange.headers, exchange.read_all())

    def stream(
        self, method: str, path: str, *, body: object = None, headers: Mapping[str, str] | None = None,
        codes: FailureCodes = streams.SSE_CODES, connect_s: float | None = None,
        silence_s: float = STREAM_SILENCE_S, total_s: float | None = None, head_s: float | None = None,
        needs_done: bool = True,
    ) -> EventStream:  # fmt: skip
        """Open an event stream; see `EventStream`.  Use it in a `with`, so that it is closed."""
        limits = msgspec.structs.replace(
            self.limits,
            connect_s=connect_s or self.limits.connect_s,
            silence_s=silence_s,
            total_s=total_s,
            head_s=head_s,
        )
        return streams.open_stream(
            self._target, method, path,
            limits=limits, codes=codes, body=body, headers=headers, needs_done=needs_done,
        )  # fmt: skip

    def lines(self, path: str, *, codes: FailureCodes | None = None) -> Iterator[bytes]:
        """Yield the pieces of a plain-text answer as they come, without a limit on silence."""
        limits = msgspec.structs.replace(self.limits, silence_s=86_400.0, total_s=None)
        with Exchange(self._target, limits=limits, codes=codes or self.codes) as exchange:
            exchange.send("GET", path)
            exchange.raise_for_status()
            while chunk := exchange.read_some():
                yield chunk

    def _exchange(self, timeout_s: float | None, codes: FailureCodes | None) -> Exchange:
        limits = self.limits
        if timeout_s is not None:
            limits = msgspec.structs.replace(
                limits, connect_s=min(limits.connect_s, timeout_s), total_s=timeout_s
            )
        return Exchange(self._target, limits=limits, codes=codes or self.codes)
