"""Does a model download tell its progress?"""

import time
from collections.abc import Callable, Iterator
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from arriero.client import discovery
from arriero.client.api import Caller
from arriero.client.stream import SSE_CODES, EventStream, download_frame
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import DownloadFrame
from arriero.contracts.states import DownloadState
from arriero.probes.result import SHOWN_MAX, ProbeResult, ask, in_terms_of

NAME: Final = "download-progress"
#: Until the stream has begun.
CONNECT_S: Final = 10.0
#: Without an event, comments not counted: longer than an agent waits for a stalled source.
SILENCE_S: Final = 120.0
#: What an agent says of a download that failed keeps its code.
DOWNLOAD_CODES: Final = frozenset(
    {
        ErrorCode.DOWNLOAD_FAILED,
        ErrorCode.DOWNLOAD_TIMEOUT,
        ErrorCode.MODEL_NOT_FOUND,
        ErrorCode.MODEL_ACCESS_DENIED,
        ErrorCode.MODEL_CORRUPTED,
        ErrorCode.INSUFFICIENT_DISK,
        ErrorCode.INVALID_MODEL_PATH,
        ErrorCode.INVALID_MODEL_REFERENCE,
    }
)


def download_progress(
    url: str,
    *,
    events: int | None = None,
    timeout_s: float = CONNECT_S,
    silence_s: float = SILENCE_S,
    tell: Callable[[str], None] | None = None,
) -> ProbeResult:
    """Read a download's progress until it is complete, or until `events` frames came.

    `timeout_s` limits the time until the stream has begun, `silence_s` the time without an event,
    nothing the download as a whole: it may be large.  `tell` hears of each stage.
    """

    def question(seen: dict[str, Any]) -> None:
        seen.update(url=url, events=0, frames=[])
        try:
            with open_progress(url, timeout_s, silence_s) as stream:
                _read(stream, events, silence_s, seen, tell)
        except ArrieroError as error:
            raise in_terms_of(SSE_CODES, error, also=DOWNLOAD_CODES) from error

    return ask(NAME, question)


def open_progress(url: str, timeout_s: float, silence_s: float) -> EventStream:
    """Open a download's progress stream.  Raises SSE_CONNECTION_FAILED, _ERROR or _TIMEOUT."""
    split = urlsplit(url)
    caller = Caller(f"{split.scheme}://{split.netloc}", discovery.token_for(url))
    path = (split.path or "/") + (f"?{split.query}" if split.query else "")
    return caller.stream(
        "GET", path, codes=SSE_CODES, connect_s=timeout_s, head_s=timeout_s, silence_s=silence_s
    )


def frames_of(stream: EventStream, silence_s: float) -> Iterator[DownloadFrame]:
    """Yield the frames of a download.

    Raises the error the stream tells, DOWNLOAD_FAILED for a download that ended without the file and
    does not say why, SSE_CONNECTION_TIMEOUT where nothing but comments came for `silence_s`.
    """
    ended: DownloadState | None = None
    told_s = time.monotonic()
    for event in stream:
        frame = download_frame(event)
        if frame is None:
            if time.monotonic() - told_s > silence_s:
                raise ArrieroError(
                    ErrorCode.SSE_CONNECTION_TIMEOUT, f"no event within {silence_s:g} s", timeout_s=silence_s
                )
            continue
        told_s = time.monotonic()
        yield frame
        if frame.stage in (DownloadState.FAILED, DownloadState.CANCELLED):
            ended = frame.stage
    if ended is not None:
        raise ArrieroError(ErrorCode.DOWNLOAD_FAILED, f"the download is {ended}, and did not say why")


def _read(
    stream: EventStream,
    events: int | None,
    silence_s: float,
    seen: dict[str, Any],
    tell: Callable[[str], None] | None,
) -> None:
    last: DownloadFrame | None = None
    began_s = time.monotonic()
    for frame in frames_of(stream, silence_s):
        if tell is not None and (last is None or last.stage is not frame.stage):
            tell(f"[probe] {frame.stage}")
        last = frame
        seen["events"] += 1
        if len(seen["frames"]) < SHOWN_MAX:
            at_s = round(time.monotonic() - began_s, 3)
            seen["frames"].append({"at_s": at_s, **msgspec.to_builtins(frame)})
        if events is not None and seen["events"] >= events:
            return
    if last is None or last.stage is not DownloadState.COMPLETE:
        raise ArrieroError(
            ErrorCode.SSE_CONNECTION_ERROR,
            f"the stream ended after {seen['events']} events, the last one not `complete`",
            last_stage=str(last.stage) if last else None,
        )
