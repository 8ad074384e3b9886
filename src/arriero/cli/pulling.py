"""How does a person follow a download to its end, and leave it?"""

import contextlib
import time
from typing import Final

from arriero.cli import render
from arriero.cli.narrator import Narrator
from arriero.cli.signals import Terminated, undisturbed
from arriero.client.api import DownloadStarted, Orchestrator, download_frames
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import DownloadFrame
from arriero.contracts.requests import DownloadBody
from arriero.contracts.states import DownloadState

LEAVE_TIMEOUT_S: Final = 3.0
#: A stream that breaks is taken up again, behind what was seen, for so long without news in between:
#: an agent that was killed goes on with the download once it is there again, and a machine whose link was
#: cut has gone on meanwhile.
_STREAM_PATIENCE_S: Final = 120.0
_STREAM_PAUSE_S: Final = 0.5
_BROKEN: Final = frozenset(
    {
        ErrorCode.SSE_CONNECTION_ERROR,
        ErrorCode.SSE_CONNECTION_TIMEOUT,
        ErrorCode.SSE_CONNECTION_FAILED,
        ErrorCode.NODE_UNREACHABLE,
    }
)


def pull(
    client: Orchestrator,
    body: DownloadBody,
    *,
    narrator: Narrator,
    keep: bool,
    patience_s: float = _STREAM_PATIENCE_S,
) -> tuple[DownloadStarted, DownloadFrame]:
    """Have a model fetched and show it; return where, and the last frame.

    Raises the download's error.  Ctrl-C and SIGTERM leave the download, which ends it where nobody else
    waits for it, unless `keep`.
    """
    started = client.start_download(body)
    try:
        return started, _follow(client, started, body.model_ref, narrator, patience_s)
    except (KeyboardInterrupt, Terminated, BrokenPipeError):
        narrator.clear()
        with undisturbed():
            if keep:
                narrator.say(started.node, f"goes on fetching {body.model_ref} ({started.download_id})")
            else:
                # An agent that does not answer is told by nobody: it keeps what it fetched either way.
                with contextlib.suppress(ArrieroError):
                    client.leave_download(started.download_id, started.holder, timeout_s=LEAVE_TIMEOUT_S)
        raise
    finally:
        narrator.clear()


def _follow(
    client: Orchestrator, started: DownloadStarted, model_ref: str, narrator: Narrator, patience_s: float
) -> DownloadFrame:
    shown = _Shown(started.node, model_ref, narrator)
    seen_id = ""
    broken_s: float | None = None
    while True:
        stream = None
        try:
            with client.download_progress(started.download_id, last_event_id=seen_id) as stream:
                for frame in download_frames(stream):
                    broken_s = None
                    shown.take(frame)
            last = shown.last
            if last is not None and last.stage is DownloadState.COMPLETE:
                return last
            raise ArrieroError(ErrorCode.SSE_CONNECTION_ERROR, "the download's stream ended before its end")
        except ArrieroError as error:
            now_s = time.monotonic()
            # From the break on: before it, a download that waits may have had no news for long.
            broken_s = now_s if broken_s is None else broken_s
            if error.code not in _BROKEN or now_s - broken_s > patience_s:
                raise
            shown.broke(error)
        if stream is not None:
            seen_id = stream.last_event_id or seen_id
        time.sleep(_STREAM_PAUSE_S)


class _Shown:
    """What a person has been told of one download."""

    def __init__(self, node: str, model_ref: str, narrator: Narrator) -> None:
        self._node = node
        self._model_ref = model_ref
        self._narrator = narrator
        self._source = ""
        self._is_broken = False
        self.last: DownloadFrame | None = None

    def broke(self, error: ArrieroError) -> None:
        """Say, once, that news stopped coming."""
        if not self._is_broken:
            self._narrator.say("arriero", f"no news of the download ({error.message}): waiting for it")
        self._is_broken = True

    def take(self, frame: DownloadFrame) -> None:
        """Show one frame."""
        self._is_broken = False
        last, self.last = self.last, frame
        if frame.source and frame.source != self._source:
            self._source = frame.source
            self._narrator.say(self._node, f"{self._model_ref} comes from {frame.source}")
        if frame.retry_reason is not None and (last is None or last.retry_reason != frame.retry_reason):
            wait = f", tries again in {render.seconds_text(frame.retry_in_s)}" if frame.retry_in_s else ""
            self._narrator.say(self._node, f"{frame.retry_reason}{wait} (attempt {frame.attempt})")
        name = "checking" if frame.stage is DownloadState.VERIFYING else "downloading"
        total = frame.bytes_total
        detail = render.progress_text(frame.bytes_downloaded, total, frame.speed_mbps, frame.eta_s)
        if frame.stage in (DownloadState.DOWNLOADING, DownloadState.VERIFYING) and frame.bytes_downloaded:
            self._narrator.advance(name, frame.bytes_downloaded / total if total else None, detail)
