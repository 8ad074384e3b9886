"""Is a model in the catalog, is its file behind it, does its download begin?"""

from typing import Any, Final
from urllib.parse import urljoin

import msgspec

from arriero.client.api import Agent
from arriero.client.stream import SSE_CODES
from arriero.contracts import refs
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import ModelRecord
from arriero.contracts.states import DownloadState
from arriero.probes.download_progress import DOWNLOAD_CODES, frames_of, open_progress
from arriero.probes.result import ProbeResult, ask, in_terms_of
from arriero.probes.where import Where, agent

CATALOG: Final = "catalog"
REGISTERED: Final = "model-registered"
DOWNLOAD: Final = "download-start"
TIMEOUT_S: Final = 10.0
#: Reading a whole model again takes its time: so long at most.
VERIFY_S: Final = 600.0
_BEGUN: Final = frozenset({DownloadState.DOWNLOADING, DownloadState.VERIFYING, DownloadState.COMPLETE})


def catalog(where: Where, *, model: str, timeout_s: float = TIMEOUT_S) -> ProbeResult:
    """Ask an agent's catalog for a model.  MODEL_NOT_FOUND, INVALID_MODEL_REFERENCE otherwise."""

    def question(seen: dict[str, Any]) -> None:
        refs.parse(model)
        found = _find(agent(where, timeout_s=timeout_s), model)
        seen["model"] = msgspec.to_builtins(found)

    return ask(CATALOG, question)


def model_registered(where: Where, *, model: str | None = None, timeout_s: float = VERIFY_S) -> ProbeResult:
    """Have the agent read a model's files again (all models without `model`) and compare them.

    INVALID_MODEL_PATH if a file is not there, MODEL_CORRUPTED if it is another one, MODEL_NOT_FOUND
    if the catalog does not have the model.
    """

    def question(seen: dict[str, Any]) -> None:
        seen["models"] = []
        if model is not None:
            refs.parse(model)
        caller = agent(where, timeout_s=timeout_s)
        models = caller.models() if model is None else [_find(caller, model)]
        if not models:
            raise ArrieroError(ErrorCode.MODEL_NOT_FOUND, "the catalog is empty")
        for record in models:
            verified = caller.verify_model(record.model_id, timeout_s=timeout_s)
            seen["models"].append(msgspec.to_builtins(verified))

    return ask(REGISTERED, question)


def download_start(where: Where, *, model: str, timeout_s: float = TIMEOUT_S) -> ProbeResult:
    """Ask an agent for a model and read its progress until the download has begun; it goes on.

    A download that ends without the file has the code the agent gives it.
    """

    def question(seen: dict[str, Any]) -> None:
        seen["frames"] = []
        refs.parse(model)
        caller = agent(where, timeout_s=timeout_s)
        started = caller.start_download(model)
        # Below the address that was asked, which may be a route of the orchestrator to another machine.
        url = urljoin(caller.url + "/", started.progress_url.lstrip("/"))
        seen.update(download_id=started.download_id, progress_url=url)
        try:
            _await_begin(url, timeout_s, seen)
        except ArrieroError as error:
            raise _as_download_error(error) from error

    return ask(DOWNLOAD, question)


def _await_begin(url: str, timeout_s: float, seen: dict[str, Any]) -> None:
    with open_progress(url, timeout_s, timeout_s) as stream:
        for frame in frames_of(stream, timeout_s):
            seen["frames"].append(msgspec.to_builtins(frame))
            has_bytes = frame.bytes_downloaded > 0 or frame.bytes_total is not None
            if frame.stage is DownloadState.COMPLETE or (frame.stage in _BEGUN and has_bytes):
                return
    raise ArrieroError(ErrorCode.DOWNLOAD_FAILED, "the progress ended before the download began")


def _as_download_error(error: ArrieroError) -> ArrieroError:
    if error.code in DOWNLOAD_CODES:
        return error
    told = in_terms_of(SSE_CODES, error)
    return ArrieroError(
        ErrorCode.DOWNLOAD_FAILED, f"no beginning was told: {told.message}", cause=told.code.value
    )


def _find(caller: Agent, model: str) -> ModelRecord:
    models = caller.models()
    for record in models:
        if record.model_ref == model:
            return record
    raise ArrieroError(
        ErrorCode.MODEL_NOT_FOUND,
        f"the catalog has {len(models)} models, none of them {model[:200]!r}",
        model_ref=model[:200],
        models=[record.model_ref for record in models[:50]],
    )
