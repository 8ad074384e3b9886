"""How does one remote file come to this disk whole, over as many connections as it takes?

The bytes go to a `Partial`; they are hashed on the way.  A later attempt asks for the rest alone,
where the server can prove that it is the rest of the same file.
"""

import asyncio
import base64
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn, Protocol
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from arriero.agent.files import check_room
from arriero.agent.partial import Mark, Partial
from arriero.agent.retries import AttemptFailed, FailureKind, Retries, RetryLimits, RetryWatch
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.domain.backoff import retry_after_s
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy

GGUF_MAGIC: Final = b"GGUF"
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_WORTH_RETRYING: Final = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524})
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(?:(\d{1,18})|\*)")
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Numbers of section 7; tests give smaller ones."""

    connect_s: float = 10.0
    #: So long without a byte is a failed attempt.
    stall_s: float = 60.0
    retry: RetryLimits = field(default_factory=RetryLimits)
    #: An attempt that came so much further than any before counts as the first one again.
    progress_bytes: int = 1024 * 1024
    redirects_max: int = 10
    #: Bytes are written, hashed and told in blocks of this size, or after this time.
    block_bytes: int = 1024 * 1024
    interval_s: float = 0.2


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file behind an address."""

    name: str
    url: str
    size_bytes: int | None = None
    sha256: str | None = None
    #: Sent to the address' own host alone, never to one it redirects to.
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """A file that is whole and verified, still under its partial name."""

    name: str
    path: Path
    size_bytes: int
    sha256: str


class FetchWatch(RetryWatch, Protocol):
    """Who is told how a fetch goes."""

    def downloading(self) -> None:
        """Bytes are asked for."""
        ...

    def verifying(self) -> None:
        """All bytes are there and are checked."""
        ...

    def advance(self, downloaded_bytes: int, total_bytes: int | None) -> None:
        """So many bytes of this file are there, of so many."""
        ...


@dataclass(slots=True)
class _Answer:
    """A response whose redirects were followed, and what was told on the way."""

    response: aiohttp.ClientResponse
    is_own_host: bool
    sha256: str | None
    linked_size: int | None


class Fetcher:
    """Fetches files over one connection each.  `session` must not decompress."""

    def __init__(
        self, session: aiohttp.ClientSession, clock: Clock, entropy: Entropy, limits: FetchLimits
    ) -> None:
        self._session = session
        self._clock = clock
        self._limits = limits
        self._retries = Retries(limits.retry, clock, entropy)
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=limits.connect_s, sock_read=limits.stall_s
        )

    async def fetch(self, remote: RemoteFile, folder: Path, watch: FetchWatch) -> FetchedFile:
        """Bring `remote` into `folder`, whole and verified, going on where an earlier fetch stopped.

        Raises MODEL_NOT_FOUND, MODEL_ACCESS_DENIED, INSUFFICIENT_DISK at once; DOWNLOAD_FAILED,
        DOWNLOAD_TIMEOUT, MODEL_CORRUPTED after the last attempt.  What came is kept, but for wrong bytes.
        """
        wanted = Mark(url=remote.url, size_bytes=remote.size_bytes, sha256=remote.sha256)
        partial = await Partial.open(
            folder, remote.name, wanted, lambda offset: watch.advance(offset, remote.size_bytes)
        )
        furthest_bytes = partial.offset

        def has_progressed() -> bool:
            nonlocal furthest_bytes
            if partial.offset < furthest_bytes + self._limits.progress_bytes:
                return False
            furthest_bytes = partial.offset
            return True

        try:
            return await self._retries.run(
                lambda: self._attempt(remote, partial, watch),
                watch,
                what=f"fetching {remote.name}",
                has_progressed=has_progressed,
            )
        finally:
            partial.close()

    async def _attempt(self, remote: RemoteFile, partial: Partial, watch: FetchWatch) -> FetchedFile:
        watch.downloading()
        is_whole = partial.offset > 0 and partial.offset == (remote.size_bytes or partial.mark.size_bytes)
        if not is_whole:
            try:
                await self._download(remote, partial, watch)
            except TimeoutError as error:
                raise AttemptFailed(
                    f"no byte from {_host(remote.url)} within {self._limits.stall_s:g} s", FailureKind.STALLED
                ) from error
            except (aiohttp.ClientError, ConnectionError) as error:
                raise AttemptFailed(_reason(error, remote, partial)) from error
        watch.verifying()
        sha256 = await partial.finish()
        expected = remote.sha256 or partial.mark.sha256
        if expected is not None and sha256 != expected:
            await partial.restart(Mark())
            watch.advance(0, remote.size_bytes)
            raise AttemptFailed(
                f"the checksum of {remote.name} is {sha256[:12]}…, it should be {expected[:12]}…",
                FailureKind.CORRUPTED,
            )
        return FetchedFile(remote.name, partial.path, partial.offset, sha256)

    async def _download(self, remote: RemoteFile, partial: Partial, watch: FetchWatch) -> None:
        async with asyncio.timeout(self._limits.connect_s + self._limits.stall_s):
            answer = await self._open(remote, _range_headers(partial))
        response = answer.response
        try:
            if response.status == 416:
                await self._after_416(response, partial)
                return
            _check_status(answer, remote, self._clock.wall_s())
            total_bytes = await self._prepare(answer, remote, partial)
            if total_bytes is not None:
                await check_room(partial.path.parent, total_bytes - partial.offset)
            watch.advance(partial.offset, total_bytes)
            await self._receive(response, partial, total_bytes, watch)
        finally:
            response.close()

    async def _open(self, remote: RemoteFile, headers: dict[str, str]) -> _Answer:
        """Send the request and follow redirects; the token goes to the first host alone."""
        url = URL(remote.url, encoded=True)
        first = url.origin()
        sha256: str | None = None
        linked_size: int | None = None
        for _ in range(self._limits.redirects_max + 1):
            sent = {"Accept-Encoding": "identity", **headers}
            if remote.token and url.origin() == first:
                sent["Authorization"] = f"Bearer {remote.token}"
            response = await self._session.get(
                url, headers=sent, allow_redirects=False, proxy=_proxy_for(url), timeout=self._timeout
            )
            sha256 = sha256 or told_sha256(response.headers)
            linked_size = (
                linked_size if linked_size is not None else _digits(response.headers.get("X-Linked-Size"))
            )
            if response.status not in _REDIRECTS:
                return _Answer(response, url.origin() == first, sha256, linked_size)
            location = response.headers.get("Location", "")
            response.release()
            url = _redirected(url, location)
        raise AttemptFailed(f"{first.host} redirects more than {self._limits.redirects_max} times")

    async def _after_416(self, response: aiohttp.ClientResponse, partial: Partial) -> None:
        """The server has nothing after what we have: it is whole, or it is of another file."""
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or match[3] is None or int(match[3]) != partial.offset:
            had_bytes = partial.offset
            await partial.restart(Mark())
            raise AttemptFailed(f"the server has no byte {had_bytes} of the file any more: from the start")

    async def _prepare(self, answer: _Answer, remote: RemoteFile, partial: Partial) -> int | None:
        """Make the partial ready for the answer's bytes; return the whole size, None if nobody tells."""
        response = answer.response
        if response.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
            raise AttemptFailed(f"{_host(remote.url)} sends the file compressed, though asked not to")
        length = _digits(response.headers.get("Content-Length"))
        total = _checked_range(response, partial, length) if response.status == 206 else length
        known = remote.size_bytes if remote.size_bytes is not None else answer.linked_size
        if known is not None and total is not None and total != known:
            raise AttemptFailed(f"the server says {total} bytes, the source says {known}")
        total = total if total is not None else known
        mark = Mark(
            url=remote.url,
            etag=_strong_etag(response.headers),
            size_bytes=total,
            sha256=remote.sha256 or answer.sha256,
        )
        if response.status == 206:
            if not partial.mark.is_same_file(mark):
                await partial.restart(Mark())
                raise AttemptFailed("the file changed at its source: from the start")
        else:
            await partial.restart(mark)
        return total

    async def _receive(
        self, response: aiohttp.ClientResponse, partial: Partial, total: int | None, watch: FetchWatch
    ) -> None:
        buffer = bytearray()
        told_s = self._clock.monotonic_s()
        try:
            while chunk := await response.content.readany():
                buffer += chunk
                if total is not None and partial.offset + len(buffer) > total:
                    buffer.clear()
                    await partial.restart(Mark())
                    raise AttemptFailed(f"the server sends more than the {total} bytes it said")
                now_s = self._clock.monotonic_s()
                if len(buffer) >= self._limits.block_bytes or now_s - told_s >= self._limits.interval_s:
                    told_s = now_s
                    await _flush(buffer, partial, watch, total)
        except (aiohttp.ClientError, ConnectionError, TimeoutError):
            # What came before a cut is kept, so that the next attempt goes on behind it: also what
            # aiohttp has and no longer gives out.  Where that name has moved, it is fetched again.
            for chunk in getattr(response.content, "_buffer", ()):
                buffer += chunk
            del buffer[max(total - partial.offset, 0) if total is not None else len(buffer) :]
            await _flush(buffer, partial, watch, total)
            raise
        await _flush(buffer, partial, watch, total)
        if total is not None and partial.offset < total:
            raise AttemptFailed(f"the connection was cut after {partial.offset} of {total} bytes")


async def _flush(buffer: bytearray, partial: Partial, watch: FetchWatch, total: int | None) -> None:
    if not buffer:
        return
    if partial.offset == 0 and partial.mark.sha256 is None and not GGUF_MAGIC.startswith(bytes(buffer[:4])):
        # With no checksum to tell, the first bytes do: an error page is not fetched to its end.
        shown = bytes(buffer[:4])
        buffer.clear()
        raise ArrieroError(
            ErrorCode.MODEL_CORRUPTED, f"the file begins with {shown!r}, a GGUF file with b'GGUF'"
        )
    block = bytes(buffer)
    buffer.clear()
    await partial.write(block)
    watch.advance(partial.offset, total)


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


def _range_headers(partial: Partial) -> dict[str, str]:
    if partial.offset == 0 or not (partial.mark.etag or partial.mark.sha256):
        return {}  # Nothing could prove that the rest is of the same file.
    headers = {"Range": f"bytes={partial.offset}-"}
    if partial.mark.etag:
        headers["If-Range"] = partial.mark.etag
    return headers


def _checked_range(response: aiohttp.ClientResponse, partial: Partial, length: int | None) -> int | None:
    """Return the whole size that a 206 tells.  Raises AttemptFailed unless it begins where we stopped."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or match[1] is None or int(match[1]) != partial.offset:
        raise AttemptFailed(f"asked for bytes from {partial.offset}, the server sends others")
    total = int(match[3]) if match[3] else None
    if total is not None and int(match[2]) != total - 1:
        raise AttemptFailed("the server sends a part of the rest only")
    if length is not None and length != int(match[2]) - int(match[1]) + 1:
        raise AttemptFailed("the server's Content-Length and Content-Range disagree")
    return total


def _check_status(answer: _Answer, remote: RemoteFile, now_unix: float) -> None:
    status = answer.response.status
    if status in (200, 206):
        if status == 206 and "Range" not in answer.response.request_info.headers:
            raise AttemptFailed("the server sends a part, though the whole was asked for")
        return
    if answer.is_own_host:
        _refuse_finally(status, remote)
    # A signed address on another host may just have run out: the next attempt gets a new one.
    if status in _WORTH_RETRYING or not answer.is_own_host:
        wait_s = retry_after_s(answer.response.headers.get("Retry-After"), now_unix)
        raise AttemptFailed(f"{_host(remote.url)} answered {status}", retry_after_s=wait_s)
    raise ArrieroError(
        ErrorCode.DOWNLOAD_FAILED, f"{_host(remote.url)} answered {status} for {remote.name}", status=status
    )


def _refuse_finally(status: int, remote: RemoteFile) -> None:
    if status in (404, 410):
        raise ArrieroError(
            ErrorCode.MODEL_NOT_FOUND,
            f"{_host(remote.url)} has no {remote.name} (status {status})",
            status=status,
        )
    if status in (401, 403):
        _deny(status, remote)


def _deny(status: int, remote: RemoteFile) -> NoReturn:
    raise ArrieroError(
        ErrorCode.MODEL_ACCESS_DENIED,
        f"{_host(remote.url)} refuses access to {remote.name} (status {status}; "
        f"{'the token does not suffice' if remote.token else 'no token is set'})",
        status=status,
    )


def _strong_etag(headers: Mapping[str, str]) -> str:
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else ""


def _digits(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) <= 18 else None


# --- Addresses -------------------------------------------------------------------------------


def _redirected(url: URL, location: str) -> URL:
    """Return where a redirect leads.  Raises AttemptFailed if it leads from https to something weaker."""
    try:
        target = url.join(URL(location, encoded=True))
        is_fit = target.host and (target.scheme == "https" or (target.scheme == url.scheme == "http"))
    except ValueError:
        is_fit = False
    if not is_fit:
        raise AttemptFailed(f"{url.host} redirects to an address that is not https")
    return target


def _host(url: str) -> str:
    return urlsplit(url).netloc


def _proxy_for(url: URL) -> str | None:
    """Return the environment's proxy for an address; loopback is never asked for through one."""
    host = url.host or ""
    if host in _LOOPBACK or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(url.scheme)


def _reason(error: Exception, remote: RemoteFile, partial: Partial) -> str:
    """Return why a connection failed, without addresses: a signed one is as good as a token."""
    host = _host(remote.url)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"the name of {host} is not known"
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientConnectorSSLError):
        return f"the certificate of {host} is not valid"
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"{host} cannot be connected to: {error.strerror or 'refused'}"
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError | ConnectionError):
        return f"the connection to {host} was cut after {partial.offset} bytes"
    return f"{host} answers what is no valid HTTP ({type(error).__name__})"
