"""What does a server answer when it is asked for bytes of one file, and is the answer to be believed?"""

import asyncio
import base64
import os
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NoReturn

import aiohttp
from yarl import URL

from arriero.agent.fetch_types import FetchLimits, RemoteFile
from arriero.agent.retries import AttemptFailed, FailureKind
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.domain.backoff import retry_after_s
from arriero.domain.parts import OPEN_END, Run
from arriero.runtime.clock import Clock

_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_WORTH_RETRYING: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(?:(\d{1,18})|\*)")
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
#: A connection's own buffer: what is lost of it in a cut is asked for again.
_READ_BYTES: Final = 256 * 1024


class Refused(AttemptFailed):
    """The server answered, and gave no bytes."""


@dataclass(slots=True)
class Answer:
    """A response whose redirects were followed, and what was told on the way."""

    response: aiohttp.ClientResponse
    asked: Run
    is_own_host: bool
    sha256: str | None
    linked_size: int | None

    @property
    def status(self) -> int:
        """The status of the last response."""
        return self.response.status

    @property
    def etag(self) -> str:
        """The strong ETag, empty if there is none that could be sent back."""
        etag = self.response.headers.get("ETag", "")
        # Bytes that are no UTF-8 come as surrogates, which nothing takes.
        return etag if etag.startswith('"') and etag.isprintable() else ""

    def told_range(self) -> tuple[Run | None, int | None]:
        """Return which bytes a Content-Range names, and how many there are in all."""
        match = _CONTENT_RANGE.fullmatch(self.response.headers.get("Content-Range", ""))
        if match is None:
            return None, None
        run = None if match[1] is None else Run(int(match[1]), int(match[2]) + 1)
        return run, int(match[3]) if match[3] else None

    def body(self) -> tuple[Run, int | None]:
        """Return which bytes the body holds, and how long the whole file is, None if nobody tells.

        Raises AttemptFailed if that makes no sense, or is not what was asked for.
        """
        if self.response.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
            raise AttemptFailed(f"{self.response.url.host} sends the file compressed, though asked not to")
        length = _digits(self.response.headers.get("Content-Length"))
        if self.status == 200:
            total = length if length is not None else self.linked_size
            self._check_total(length)
            return Run(0, OPEN_END if total is None else total), total
        run, total = self.told_range()
        if run is None or run.start != self.asked.start:
            raise AttemptFailed(f"asked for bytes from {self.asked.start}, the server sends others")
        if not run.start < run.end <= min(self.asked.end, OPEN_END if total is None else total):
            raise AttemptFailed("the server sends other bytes than it was asked for")
        if length is not None and length != run.end - run.start:
            raise AttemptFailed("the server's Content-Length and Content-Range disagree")
        self._check_total(total)
        return run, total if total is not None else self.linked_size

    def _check_total(self, total: int | None) -> None:
        if total is not None and self.linked_size not in (None, total):
            raise AttemptFailed(f"the server says {total} bytes, the source says {self.linked_size}")

    def close(self) -> None:
        """Let the connection go; one that is not read to its end is closed."""
        self.response.close()


class Origin:
    """Asks for bytes of one file.  `session` must not decompress.

    Where redirects led is remembered, so that a file of many ranges is looked up once; an address
    that refuses later on (a signed one runs out) is looked up again.
    """

    def __init__(
        self, session: aiohttp.ClientSession, clock: Clock, limits: FetchLimits, remote: RemoteFile
    ) -> None:
        self.remote = remote
        #: As many as the server has borne so far.
        self.connections = limits.connections
        #: False once a range was of no use: then the file is asked for whole.
        self.is_ranged = True
        self._session = session
        self._clock = clock
        self._limits = limits
        self._first = URL(remote.url, encoded=True)
        self._target: Answer | None = None
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=limits.connect_s, sock_read=limits.stall_s
        )

    @property
    def host(self) -> str:
        """The host that people know the file by."""
        return self.remote.server

    def forget_target(self) -> None:
        """Begin at the first address next time."""
        self._target = None

    async def ask(self, asked: Run, *, is_whole: bool, is_tail: bool, etag: str) -> Answer:
        """Ask for a run of bytes; the head is there when this returns, with the status 200, 206 or 416.

        Raises AttemptFailed and Refused; MODEL_NOT_FOUND, MODEL_ACCESS_DENIED or DOWNLOAD_FAILED where
        asking again is of no use.
        """
        headers = {"Accept-Encoding": "identity"}
        if not is_whole:
            headers["Range"] = f"bytes={asked.start}-{'' if is_tail else asked.end - 1}"
            if etag:
                headers["If-Range"] = etag
        try:
            # A limit for the head as a whole: one that trickles in is as good as none.
            async with asyncio.timeout(self._limits.connect_s + self._limits.stall_s):
                answer = await self._ask_target(asked, headers) or await self._follow(asked, headers)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self._target = None
            raise self.failure(error) from error
        try:
            self._check_status(answer)
        except BaseException:
            self._target = None
            answer.close()
            raise
        self._target = answer
        return answer

    def failure(self, error: Exception) -> AttemptFailed:
        """Return why a connection failed, without addresses: a signed one is as good as a token."""
        self._target = None
        if isinstance(error, TimeoutError):
            reason = f"no byte from {self.host} within {self._limits.stall_s:g} s"
            return AttemptFailed(reason, FailureKind.STALLED)
        if isinstance(error, aiohttp.ClientConnectorDNSError):
            return AttemptFailed(f"the name of {self.host} is not known")
        if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
            return AttemptFailed(f"the certificate of {self.host} is not valid")
        if isinstance(error, aiohttp.ClientConnectorError):
            return AttemptFailed(f"{self.host} cannot be connected to: {_reason(error)}")
        if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError | OSError):
            return AttemptFailed(f"the connection to {self.host} was cut")
        if isinstance(error, ValueError) and not isinstance(error, aiohttp.ClientError):
            # Such as a label of more than 63 letters, where it or a redirect leads to, or in a proxy's name.
            return AttemptFailed(f"{self.host} leads to an address that is none")
        return AttemptFailed(f"{self.host} answers what is no valid HTTP ({type(error).__name__})")

    # --- Sending ------------------------------------------------------------------------------

    async def _send(self, url: URL, headers: dict[str, str]) -> aiohttp.ClientResponse:
        sent = dict(headers)
        if self.remote.token and url.origin() == self._first.origin():
            sent["Authorization"] = f"Bearer {self.remote.token}"
        return await self._session.get(
            url, headers=sent, allow_redirects=False, proxy=_proxy_for(url), timeout=self._timeout,
            read_bufsize=_READ_BYTES,
        )  # fmt: skip

    async def _ask_target(self, asked: Run, headers: dict[str, str]) -> Answer | None:
        """Ask where redirects led before; None if there is no such place, or none any more."""
        if self._target is None:
            return None
        known = self._target
        response = await self._send(known.response.url, headers)
        if response.status in (200, 206, 416) or response.status in _WORTH_RETRYING:
            return Answer(response, asked, known.is_own_host, known.sha256, known.linked_size)
        response.close()
        return None

    async def _follow(self, asked: Run, headers: dict[str, str]) -> Answer:
        """Send the request and follow redirects; the token goes to the first host alone."""
        url = self._first
        sha256: str | None = None
        linked_size = self.remote.size_bytes
        for _ in range(self._limits.redirects_max + 1):
            response = await self._send(url, headers)
            sha256 = sha256 or told_sha256(response.headers)
            if linked_size is None:
                linked_size = _digits(response.headers.get("X-Linked-Size"))
            if response.status not in _REDIRECTS:
                is_own_host = url.origin() == self._first.origin()
                return Answer(response, asked, is_own_host, sha256, linked_size)
            location = response.headers.get("Location", "")
            response.close()
            url = redirected(url, location)
        raise AttemptFailed(f"{self._first.host} redirects more than {self._limits.redirects_max} times")

    def _check_status(self, answer: Answer) -> None:
        status = answer.status
        if status == 206 and "Range" not in answer.response.request_info.headers:
            raise AttemptFailed("the server sends a part, though the whole was asked for")
        if status in (200, 206, 416):
            return
        if answer.is_own_host:
            _refuse_finally(status, self.remote)
        # A signed address on another host may just have run out: the next attempt gets a new one.
        if status in _WORTH_RETRYING or not answer.is_own_host:
            wait_s = retry_after_s(answer.response.headers.get("Retry-After"), self._clock.wall_s())
            raise Refused(f"{self.host} answered {status}", retry_after_s=wait_s)
        raise ArrieroError(
            ErrorCode.DOWNLOAD_FAILED, f"{self.host} answered {status} for {self.remote.name}", status=status
        )


# --- Headers ---------------------------------------------------------------------------------


def told_sha256(headers: Mapping[str, str]) -> str | None:
    """Return the hash of the whole file where headers tell it: the Hub's linked ETag, or a digest."""
    linked = headers.get("X-Linked-Etag", "").strip().strip('"')
    if _SHA256.fullmatch(linked):
        return linked
    for name, prefix in (("Repr-Digest", "sha-256=:"), ("Digest", "sha-256=")):
        for part in headers.get(name, "").split(","):
            if not part.strip().lower().startswith(prefix):
                continue
            try:
                digest = base64.b64decode(part.strip()[len(prefix) :].rstrip(":"), validate=True)
            except ValueError:
                continue
            if len(digest) == 32:
                return digest.hex()
    return None


def _refuse_finally(status: int, remote: RemoteFile) -> None:
    if status in (404, 410):
        raise ArrieroError(
            ErrorCode.MODEL_NOT_FOUND,
            f"{remote.server} has no {remote.name} (status {status})",
            status=status,
        )
    if status in (401, 403):
        _deny(status, remote)


def _deny(status: int, remote: RemoteFile) -> NoReturn:
    raise ArrieroError(
        ErrorCode.MODEL_ACCESS_DENIED,
        f"{remote.server} refuses access to {remote.name} (status {status}; "
        f"{'the token does not suffice' if remote.token else 'no token is set'})",
        status=status,
    )


def _digits(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) <= 18 else None


# --- Addresses -------------------------------------------------------------------------------


def redirected(url: URL, location: str) -> URL:
    """Return where a redirect leads.  Raises AttemptFailed if it leads from https to something weaker."""
    try:
        target = url.join(URL(location, encoded=True))
        is_fit = target.host and (target.scheme == "https" or (target.scheme == url.scheme == "http"))
    except ValueError:
        is_fit = False
    if not is_fit:
        raise AttemptFailed(f"{url.host} redirects to an address that is not https")
    return target


def _proxy_for(url: URL) -> str | None:
    """Return the environment's proxy for an address; loopback is never asked for through one."""
    host = url.host or ""
    if host in _LOOPBACK or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(url.scheme)


def _reason(error: OSError) -> str:
    """Return why a connection was not made; asyncio's own text is about its calls."""
    return os.strerror(error.errno).lower() if error.errno else "refused"
