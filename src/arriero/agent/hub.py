"""Which files of a repository on the Hugging Face Hub does a reference mean, and where are they?"""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

import httpx2  # What huggingface_hub speaks HTTP with: its own errors do not cover connections.
import huggingface_hub
from huggingface_hub import errors as hub_errors

from arriero.agent.fetch import RemoteFile
from arriero.agent.retries import AttemptFailed, FailureKind
from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.refs import HfRef
from arriero.domain.backoff import retry_after_s

PREFERRED_QUANTS: Final = ("Q4_K_M", "Q8_0")
_SPLIT: Final = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf", re.IGNORECASE)
_QUANT_IN_NAME: Final = re.compile(
    r"(?<![A-Za-z0-9])(UD-)?(I?Q\d+(_[A-Z0-9]+)*|T?Q\d+(_[A-Z0-9]+)*|BF16|F16|F32|FP16|MXFP4(_MOE)?)(?![A-Za-z0-9_])",
    re.IGNORECASE,
)
_SAFE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+-]{0,199}")
#: Beside the weights there may be files that are GGUF but no model of their own.
_NO_MODEL: Final = re.compile(r"(^|[/._-])(mmproj|imatrix)", re.IGNORECASE)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository."""

    path: str
    size_bytes: int | None
    sha256: str | None


@dataclass(frozen=True, slots=True)
class HubModel:
    """The files of a reference, and the commit they are of."""

    files: list[RemoteFile]
    revision: str = ""
    projector: str = ""


def quant_of(path: str) -> str | None:
    """Return the quantisation that a file's name tells, upper case."""
    found = list(_QUANT_IN_NAME.finditer(path.rsplit("/", 1)[-1])) or list(_QUANT_IN_NAME.finditer(path))
    return found[-1][0].upper() if found else None


def choose(ref: HfRef, files: Sequence[HubFile]) -> list[HubFile]:
    """Return the files that `ref` means, the first to load first: all parts where a model is split.

    Without a path or a quantisation: Q4_K_M, else Q8_0, else the smallest.  Raises MODEL_NOT_FOUND
    (details: `available`) if there is none or a part is missing.
    """
    if ref.path is not None:
        exact = [file for file in files if file.path == ref.path]
        if not exact:
            _not_there(ref, files, f"has no file {ref.path}")
        return _with_parts(ref, exact[0], files)
    models = [f for f in files if f.path.lower().endswith(".gguf") and not _NO_MODEL.search(f.path)]
    heads = [file for file in models if _is_head(file)]
    if ref.quant is not None:
        found = _matching(ref.quant, heads)
        if not found:
            _not_there(ref, files, f"has no quantisation {ref.quant}")
        return _with_parts(ref, found[0], files)
    if not heads:
        _not_there(ref, files, "has no GGUF file")
    for quant in PREFERRED_QUANTS:
        if found := _matching(quant, heads):
            return _with_parts(ref, found[0], files)
    smallest = min(heads, key=lambda head: (_total(_with_parts(ref, head, files)), head.path))
    return _with_parts(ref, smallest, files)


def quants_available(files: Sequence[HubFile]) -> list[str]:
    """Return the quantisations there are, or the names of files that tell none."""
    models = [f for f in files if f.path.lower().endswith(".gguf") and not _NO_MODEL.search(f.path)]
    return sorted({quant_of(file.path) or file.path for file in models if _is_head(file)})


def _matching(quant: str, heads: Sequence[HubFile]) -> list[HubFile]:
    """Return files whose path holds `quant` as a word of its own; the shortest name first."""
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
    found = [head for head in heads if word.search(head.path.rsplit("/", 1)[-1])]
    found = found or [head for head in heads if word.search(head.path)]
    return sorted(found, key=lambda head: (len(head.path), head.path))


def _is_head(file: HubFile) -> bool:
    match = _SPLIT.fullmatch(file.path)
    return match is None or int(match["part"]) == 1


def _with_parts(ref: HfRef, head: HubFile, files: Sequence[HubFile]) -> list[HubFile]:
    match = _SPLIT.fullmatch(head.path)
    if match is None:
        return [head]
    by_path = {file.path: file for file in files}
    count = int(match["parts"])
    names = [f"{match['stem']}-{part:05d}-of-{count:05d}.gguf" for part in range(1, min(count, 1000) + 1)]
    missing = [name for name in names if name not in by_path]
    if missing or not names:
        _not_there(ref, files, f"lacks {len(missing)} of the {count} parts of {head.path}")
    return [by_path[name] for name in names]


def _total(files: Sequence[HubFile]) -> int:
    # Unknown sizes are taken for large: a known small file is the safer choice.
    return sum(2**62 if file.size_bytes is None else file.size_bytes for file in files)


def _not_there(ref: HfRef, files: Sequence[HubFile], why: str) -> NoReturn:
    available = quants_available(files)
    there = f"it has {', '.join(available[:40])}" if available else "it holds no GGUF file at all"
    fail(ErrorCode.MODEL_NOT_FOUND, f"{ref.repo} {why}; {there}", available=available[:100])


class Hub:
    """The Hub behind one address (None: `HF_ENDPOINT`, else the public one).

    The token is `HF_TOKEN`, else the one that `hf auth login` left.
    """

    def __init__(self, endpoint: str | None = None, timeout_s: float = 10.0) -> None:
        self._endpoint = endpoint.rstrip("/") if endpoint else None
        self._timeout_s = timeout_s

    async def resolve(self, ref: HfRef, now_unix: float) -> HubModel:
        """Return the files of `ref`, pinned to the commit that its revision names now.

        Raises MODEL_NOT_FOUND, MODEL_ACCESS_DENIED, and AttemptFailed for what may pass.
        """
        # A thread that waits for the Hub is not waited for when its download is cancelled: it ends
        # by its own time limit and touches nothing of ours.
        return await asyncio.to_thread(self._resolve, ref, now_unix)

    def _resolve(self, ref: HfRef, now_unix: float) -> HubModel:
        api = huggingface_hub.HfApi(endpoint=self._endpoint)
        try:
            answer = api.model_info(
                ref.repo, revision=ref.revision, files_metadata=True, timeout=self._timeout_s
            )
        except hub_errors.OfflineModeIsEnabled as error:
            raise ArrieroError(
                ErrorCode.DOWNLOAD_FAILED, f"{ref.repo} cannot be looked up: HF_HUB_OFFLINE is set"
            ) from error
        except hub_errors.HfHubHTTPError as error:
            _raise_status(ref, error, now_unix)
        except hub_errors.HFValidationError as error:
            raise ArrieroError(
                ErrorCode.INVALID_MODEL_REFERENCE, f"{ref.repo} is no name of a repository"
            ) from error
        except httpx2.TimeoutException as error:
            raise AttemptFailed(
                f"the Hub did not answer within {self._timeout_s:g} s", FailureKind.STALLED
            ) from error
        except httpx2.HTTPError as error:
            raise AttemptFailed(f"the Hub cannot be reached ({type(error).__name__})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise AttemptFailed("the Hub's answer makes no sense") from error
        files = [
            HubFile(entry.rfilename, entry.size, _sha256(entry.lfs.sha256 if entry.lfs else None))
            for entry in answer.siblings or []
        ]
        revision = answer.sha or ref.revision
        token = huggingface_hub.get_token()
        return HubModel(
            [self._remote(ref, file, revision, token) for file in choose(ref, files)], revision or ""
        )

    def _remote(self, ref: HfRef, file: HubFile, revision: str | None, token: str | None) -> RemoteFile:
        name = file.path.rsplit("/", 1)[-1]
        if not _SAFE_NAME.fullmatch(name) or not name.lower().endswith(".gguf"):
            fail(ErrorCode.MODEL_NOT_FOUND, f"{ref.repo}: {name[:80]!r} is no GGUF file this version can run")
        url = huggingface_hub.hf_hub_url(ref.repo, file.path, revision=revision, endpoint=self._endpoint)
        return RemoteFile(name, url, file.size_bytes, file.sha256, token)


def close_connections() -> None:
    """Close what huggingface_hub keeps open between calls."""
    huggingface_hub.close_session()


def _sha256(text: str | None) -> str | None:
    return text if text is not None and _SHA256.fullmatch(text) else None


def _raise_status(ref: HfRef, error: hub_errors.HfHubHTTPError, now_unix: float) -> NoReturn:
    status = error.response.status_code
    reason = error.response.headers.get("X-Error-Code", "")
    revision = f" at revision {ref.revision}" if ref.revision else ""
    if isinstance(error, hub_errors.GatedRepoError):
        raise ArrieroError(
            ErrorCode.MODEL_ACCESS_DENIED,
            f"{ref.repo} is gated: accept its licence on its page, then set HF_TOKEN (or `hf auth login`)",
            status=status,
        ) from error
    if (
        isinstance(error, hub_errors.RevisionNotFoundError)
        or status in (404, 410)
        or reason == "RepoNotFound"
    ):
        raise ArrieroError(
            ErrorCode.MODEL_NOT_FOUND,
            f"the Hub has no {ref.repo}{revision}; a private one needs HF_TOKEN (or `hf auth login`)",
            status=status,
        ) from error
    if status in (401, 403):
        raise ArrieroError(
            ErrorCode.MODEL_ACCESS_DENIED,
            f"the Hub refuses access to {ref.repo}: set a valid HF_TOKEN (or `hf auth login`)",
            status=status,
        ) from error
    if status == 429 or status >= 500 or status == 408:
        wait_s = retry_after_s(error.response.headers.get("Retry-After"), now_unix)
        raise AttemptFailed(f"the Hub answered {status}", retry_after_s=wait_s) from error
    raise ArrieroError(
        ErrorCode.DOWNLOAD_FAILED, f"the Hub answered {status} for {ref.repo}", status=status
    ) from error
