"""What can be asked of an agent about its models, besides the list?"""

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote, urlencode

from arriero.client import stream as streams
from arriero.client.caller import Caller
from arriero.client.connection import FailureCodes
from arriero.client.stream import EventStream
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import CheckFrame
from arriero.contracts.records import (
    FoundList,
    ImportResult,
    ModelEstimate,
    ModelRecord,
    PruneResult,
    RestoreResult,
)
from arriero.contracts.requests import ImportBody, PinBody, PruneBody, ScanBody

T = TypeVar("T")
#: Work that reads files and comes no further for so long has failed, whatever the connection says.
CHECK_STALL_S: Final = 60.0
#: A dry run a device; each is a process that may take some seconds.
ESTIMATE_S: Final = 120.0


class CheckStream(Generic[T]):
    """Work that reads through files, followed: iterate its frames, then take its `result`.

    There is no limit on the whole: it may take as long as it comes further.  Closing it cancels the
    work.  Raises the work's own error, REQUEST_TIMEOUT where it stands still.
    """

    def __init__(self, stream: EventStream, answer: type[T], *, stall_s: float, codes: FailureCodes) -> None:
        self._stream = stream
        self._answer = answer
        self._stall_s = stall_s
        self._codes = codes
        self._result: list[T] = []

    def __enter__(self) -> "CheckStream[T]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it; safe from any thread, and twice."""
        self._stream.close()

    def __iter__(self) -> Iterator[CheckFrame]:
        seen = ("", -1)
        seen_s = time.monotonic()
        for event in self._stream:
            frame = None if event.comment is not None else streams.check_frame(event, self._answer)
            if isinstance(frame, CheckFrame):
                if (frame.what, frame.bytes_read) != seen:
                    seen, seen_s = (frame.what, frame.bytes_read), time.monotonic()
                yield frame
            elif frame is not None:
                self._result = [frame]
                seen_s = time.monotonic()
            if time.monotonic() - seen_s > self._stall_s:
                self.close()
                raise ArrieroError(
                    self._codes.timeout,
                    f"no progress within {self._stall_s:g} s",
                    timeout_s=self._stall_s,
                )

    def result(self) -> T:
        """Read what is left of the frames, close, and return what came of the work."""
        with self:
            for _ in () if self._result else self:
                pass
        if not self._result:
            raise ArrieroError(ErrorCode.VERSION_MISMATCH, "the stream ended without a result")
        return self._result[0]


class ModelCalls(Caller):
    """An agent's routes for its models."""

    def model(self, model_id: str) -> ModelRecord:
        """Return one model.  Raises MODEL_NOT_FOUND."""
        return self.call("GET", _path(model_id), ModelRecord)

    def pin_model(self, model_id: str, *, is_pinned: bool) -> ModelRecord:
        """Say whether a model may be pruned.  Raises MODEL_NOT_FOUND."""
        return self.call("PUT", f"{_path(model_id)}/pin", ModelRecord, body=PinBody(is_pinned=is_pinned))

    def model_estimate(
        self, model_id: str, *, context_tokens: int | None = None, slots: int | None = None,
        timeout_s: float = ESTIMATE_S,
    ) -> ModelEstimate:  # fmt: skip
        """Return what a model needs on each device there, and whether it fits now."""
        given = {"context_tokens": context_tokens, "slots": slots}
        query = urlencode({name: value for name, value in given.items() if value is not None})
        path = f"{_path(model_id)}/estimate" + (f"?{query}" if query else "")
        return self.call("GET", path, ModelEstimate, timeout_s=timeout_s)

    def prune_models(self, body: PruneBody, *, timeout_s: float | None = None) -> PruneResult:
        """Free room by removing the models used longest ago."""
        return self.call("POST", "/v1/models/prune", PruneResult, body=body, timeout_s=timeout_s)

    def verify_model_stream(
        self, model_id: str, *, stall_s: float = CHECK_STALL_S
    ) -> CheckStream[ModelRecord]:
        """Read a model's files again, followed.  Raises MODEL_CORRUPTED, INVALID_MODEL_PATH."""
        return self._followed(f"{_path(model_id)}/verify", ModelRecord, None, stall_s)

    def import_models(self, body: ImportBody, *, stall_s: float = CHECK_STALL_S) -> CheckStream[ImportResult]:
        """Copy in the models of a file or folder of the agent's machine, followed."""
        return self._followed("/v1/models/import", ImportResult, body, stall_s)

    def scan_models(self, body: ScanBody, *, stall_s: float = CHECK_STALL_S) -> CheckStream[FoundList]:
        """Look for models that other programs keep there, followed."""
        return self._followed("/v1/models/scan", FoundList, body, stall_s)

    def backup_catalog(self, *, timeout_s: float | None = None) -> bytes:
        """Return the catalog as one SQLite file."""
        with self._exchange(timeout_s, None) as exchange:
            exchange.send("GET", "/v1/models/backup")
            exchange.raise_for_status()
            return exchange.read_all()

    def restore_catalog(self, content: bytes, *, stall_s: float = CHECK_STALL_S) -> RestoreResult:
        """Enter the models of a backup whose files are there and unchanged."""
        return self._followed("/v1/models/restore", RestoreResult, content, stall_s).result()

    def _followed(self, path: str, answer: type[T], body: Any, stall_s: float) -> CheckStream[T]:
        stream = self.stream("POST", path, body=body, codes=self.codes, head_s=stall_s)
        return CheckStream(stream, answer, stall_s=stall_s, codes=self.codes)


def _path(model_id: str) -> str:
    return f"/v1/models/{quote(model_id, safe='')}"
