"""Where on the Hugging Face Hub are the files that a reference means?"""

import asyncio
import itertools
import os
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeVar
from urllib.parse import urlsplit

import httpx2  # What huggingface_hub speaks HTTP with: its own errors do not cover connections.
import huggingface_hub
import huggingface_hub.constants  # Without this it appears only once something else has imported it.
from huggingface_hub import errors as hub_errors

from arriero.agent import hub_http
from arriero.agent.fetch import RemoteFile
from arriero.agent.hub_choice import HubFile, choose, projector_for
from arriero.agent.retries import AttemptFailed, FailureKind
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.refs import HfRef
from arriero.domain.backoff import RETRY_AFTER_MAX_S, retry_after_s

T = TypeVar("T")
#: A look-up as a whole may take so many times the limit of one of its waits.
WHOLE_LOOKUP: Final = 6
#: So many files of a repository are looked at.
FILES_MAX: Final = 100_000
PATH_LENGTH_MAX: Final = 400
SIZE_BYTES_MAX: Final = 2**60
NAME_LENGTH_MAX: Final = 120
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_REPO: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9 ._+-]")
#: `"api";r=0;t=55`: nothing remains for so many seconds.
_RATE_LIMIT: Final = re.compile(r"r=0;\s*t=(\d{1,9})")
_SUFFIXES: Final = (".gguf", ".safetensors")


@dataclass(frozen=True, slots=True)
class HubModel:
    """The files of one model, pinned to a commit."""

    #: The one to load first comes first, a projector last.
    files: list[RemoteFile]
    #: The commit; empty where the Hub does not tell.
    revision: str
    #: Name of the multimodal projector among the files; empty if there is none.
    projector: str
    #: What the repository is called now: not as in the reference where it was renamed.
    repo: str


@dataclass(frozen=True, slots=True)
class _Token:
    """What there is to show to the Hub; `note` says why there is nothing, though there should be."""

    text: str | None
    name: str = ""
    note: str = ""


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
        # with the next byte or by its own time limit, and touches nothing of ours.
        given_up = threading.Event()
        hub_http.GIVEN_UP.set(given_up)
        try:
            async with asyncio.timeout(WHOLE_LOOKUP * self._timeout_s):
                return await asyncio.to_thread(self._resolve, ref, now_unix)
        except TimeoutError as error:
            raise AttemptFailed(
                f"the Hub did not end its answer within {WHOLE_LOOKUP * self._timeout_s:g} s",
                FailureKind.STALLED,
            ) from error
        finally:
            given_up.set()

    def _resolve(self, ref: HfRef, now_unix: float) -> HubModel:
        token = _token()
        asked = _Asked(ref, token, self._page(ref.repo), self._timeout_s, now_unix)
        api = huggingface_hub.HfApi(endpoint=self._endpoint)
        answer = asked.call(
            lambda: api.model_info(
                ref.repo,
                revision=ref.revision,
                files_metadata=True,
                timeout=self._timeout_s,
                token=token.text or False,
            )
        )
        repo = answer.id if _is_repo(answer.id) else ref.repo
        commit = _commit(answer.sha)
        files = _files(answer.siblings or [])
        now = HfRef(repo, ref.quant, ref.path, ref.revision)
        chosen = choose(now, files)
        projector = projector_for(chosen[0], files)
        if projector is not None:
            chosen.append(projector)
        names = local_names([file.path for file in chosen])
        urls = [self._url(repo, file.path, commit or ref.revision) for file in chosen]
        if answer.gated:
            asked.look_at(urls[0], self._page(repo))
        return HubModel(
            files=[
                RemoteFile(name, url, file.size_bytes, file.sha256, token.text)
                for name, url, file in zip(names, urls, chosen, strict=True)
            ],
            revision=commit,
            projector=names[-1] if projector is not None else "",
            repo=repo,
        )

    def _url(self, repo: str, path: str, revision: str | None) -> str:
        return huggingface_hub.hf_hub_url(repo, path, revision=revision, endpoint=self._endpoint)

    def _page(self, repo: str) -> str:
        """Return the address of a repository's page, without what the endpoint holds of credentials."""
        try:
            split = urlsplit(self._endpoint or huggingface_hub.constants.ENDPOINT)
        except ValueError:
            return repo  # The look-up itself tells that the endpoint is no address.
        return f"{split.scheme}://{split.netloc.rpartition('@')[2]}{split.path}/{repo}"


def local_names(paths: Sequence[str]) -> list[str]:
    """Return a file name for each path of a repository, all different, also where case is ignored.

    The parts of a split model keep what tells them apart, and their common beginning.
    """
    names: list[str] = []
    for path in paths:
        taken = {name.casefold() for name in names}
        whole = _cleaned(path.replace("/", "_"))
        numbered = (f"{number}-{whole}" for number in itertools.count(2))
        candidates = itertools.chain([_cleaned(path.rsplit("/", 1)[-1]), whole], numbered)
        names.append(next(name for name in candidates if name.casefold() not in taken))
    return names


def _cleaned(name: str) -> str:
    suffix = next((suffix for suffix in _SUFFIXES if name.lower().endswith(suffix)), "")
    stem = _UNSAFE.sub("_", name[: len(name) - len(suffix)]).lstrip("._- ")
    kept = stem if len(stem) <= NAME_LENGTH_MAX else stem[-NAME_LENGTH_MAX:].lstrip("._- ")
    return (kept or "model") + name[len(name) - len(suffix) :]


# --- What the Hub answers --------------------------------------------------------------------


def _files(siblings: Sequence[Any]) -> list[HubFile]:
    """Return the files that a look-up lists, without those that nobody could mean to offer."""
    found: dict[str, HubFile] = {}
    for entry in itertools.islice(siblings, FILES_MAX):
        path = entry.rfilename
        if not _is_path(path) or path in found:
            continue
        size = entry.size if entry.size is not None else getattr(entry.lfs, "size", None)
        found[path] = HubFile(path, _size(size), _sha256(getattr(entry.lfs, "sha256", None)))
    return list(found.values())


def _is_repo(name: object) -> bool:
    """Return whether a repository may be called so: the client asks for no other."""
    if not isinstance(name, str) or not _REPO.fullmatch(name):
        return False
    try:
        huggingface_hub.hf_hub_url(name, "x")
    except hub_errors.HFValidationError:
        return False
    return True


def _is_path(path: object) -> bool:
    return (
        isinstance(path, str)
        and 0 < len(path) <= PATH_LENGTH_MAX
        and path.isprintable()
        and "\\" not in path
        and not {"", ".", ".."} & set(path.split("/"))
    )


def _size(size: object) -> int | None:
    """Return a size if it can be one: what else is told counts as not told."""
    return size if type(size) is int and 0 <= size <= SIZE_BYTES_MAX else None


def _sha256(text: object) -> str | None:
    return text if isinstance(text, str) and _SHA256.fullmatch(text) else None


def _commit(sha: object) -> str:
    return sha if isinstance(sha, str) and _COMMIT.fullmatch(sha) else ""


def _token() -> _Token:
    """Return the token of the environment or of the login.  One that cannot be used is none, with a note."""
    if huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return _Token(None, note="HF_HUB_DISABLE_IMPLICIT_TOKEN is set")
    is_given = bool(os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"))
    name = "HF_TOKEN" if is_given else "the token of `hf auth login`"
    try:
        text = huggingface_hub.get_token()
    except (OSError, ValueError, hub_errors.OIDCError, httpx2.HTTPError) as error:
        return _Token(None, name, f"{name} cannot be read ({type(error).__name__})")
    if text and not (text.isascii() and text.isprintable() and " " not in text):
        return _Token(None, name, f"{name} holds characters that no token has")
    return _Token(text or None, name)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One look-up: turns what goes wrong into what is told of it."""

    ref: HfRef
    token: _Token
    page: str
    timeout_s: float
    now_unix: float

    def call(self, ask: Callable[[], T]) -> T:
        """Return what `ask` returns.  Raises ArrieroError, and AttemptFailed for what may pass."""
        repo = self.ref.repo
        try:
            hub_http.bound_client()
            return ask()
        except hub_errors.OfflineModeIsEnabled as error:
            raise ArrieroError(
                ErrorCode.DOWNLOAD_FAILED, f"{repo} cannot be looked up: HF_HUB_OFFLINE is set",
                suggested_action="Unset HF_HUB_OFFLINE, or use a model of `arriero models list`.",
            ) from error  # fmt: skip
        except hub_errors.HfHubHTTPError as error:
            self._raise_status(error)
        except hub_errors.HFValidationError as error:
            raise ArrieroError(
                ErrorCode.INVALID_MODEL_REFERENCE, f"{repo} is no name of a repository"
            ) from error
        except httpx2.TimeoutException as error:
            raise AttemptFailed(
                f"the Hub did not answer within {self.timeout_s:g} s", FailureKind.STALLED
            ) from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise ArrieroError(
                ErrorCode.DOWNLOAD_FAILED, f"{repo} cannot be looked up: HF_ENDPOINT is no address",
                suggested_action="Unset HF_ENDPOINT, or set it to an address as https://huggingface.co; "
                "then start the agent again.",
            ) from error  # fmt: skip
        except httpx2.HTTPError as error:
            host = urlsplit(self.page).netloc
            raise AttemptFailed(f"the Hub at {host} cannot be reached ({type(error).__name__})") from error
        except hub_http.AnswerRefused as error:
            raise AttemptFailed(f"the Hub's answer is refused: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise AttemptFailed("the Hub's answer makes no sense") from error
        except OSError as error:
            raise AttemptFailed(
                f"the Hub cannot be asked: {error.strerror or type(error).__name__}"
            ) from error

    def look_at(self, url: str, page: str) -> None:
        """Raise MODEL_ACCESS_DENIED if a file may not be fetched: anybody may look up a gated repository."""
        try:
            huggingface_hub.get_hf_file_metadata(url, token=self.token.text or False, timeout=self.timeout_s)
        except hub_errors.GatedRepoError as error:
            self._raise_gated(error, page)
        except (hub_errors.HfHubHTTPError, httpx2.HTTPError, OSError, ValueError):
            return  # Whatever it is, the fetch will meet it, with its attempts.

    def _raise_status(self, error: hub_errors.HfHubHTTPError) -> NoReturn:
        status, headers = error.response.status_code, error.response.headers
        if isinstance(error, hub_errors.GatedRepoError):
            self._raise_gated(error, self.page)
        if isinstance(error, hub_errors.RevisionNotFoundError):
            raise ArrieroError(
                ErrorCode.MODEL_NOT_FOUND,
                f"{self.ref.repo} has no revision {self.ref.revision or 'main'}",
                status=status,
                suggested_action=f"Its revisions are on {self.page}.",
            ) from error
        if status in (404, 410) or headers.get("X-Error-Code") == "RepoNotFound":
            self._raise_missing(error, ErrorCode.MODEL_NOT_FOUND)
        if status == 401 and self.token.text is None:
            self._raise_missing(error, ErrorCode.MODEL_ACCESS_DENIED)
        if status in (401, 403):
            self._raise_denied(error)
        if status == 429 or status >= 500 or status == 408:
            raise AttemptFailed(
                f"the Hub answered {status}", retry_after_s=_wait_s(headers, self.now_unix)
            ) from error
        raise ArrieroError(
            ErrorCode.DOWNLOAD_FAILED, f"the Hub answered {status} for {self.ref.repo}", status=status
        ) from error

    def _raise_missing(self, error: hub_errors.HfHubHTTPError, code: ErrorCode) -> NoReturn:
        """It does not exist, or it is private: the Hub does not tell which."""
        if self.token.text is None:
            how = f"; {self.token.note}" if self.token.note else ""
            hint = f"it is misspelt, or private and needs HF_TOKEN (or `hf auth login`){how}"
        else:
            hint = f"it is misspelt, or private and {self.token.name} may not see it"
        raise ArrieroError(
            code,
            f"the Hub has no {self.ref.repo} that it shows: {hint}",
            status=error.response.status_code,
            suggested_action="Check the spelling; for a private repository set HF_TOKEN of an account "
            "that may read it, or run `hf auth login`.",
        ) from error

    def _raise_gated(self, error: hub_errors.HfHubHTTPError, page: str) -> NoReturn:
        if self.token.text is None:
            note = f" ({self.token.note})" if self.token.note else ""
            why = f"accept its licence on {page}, then set HF_TOKEN (or `hf auth login`){note}"
        else:
            why = f"the account of {self.token.name} has not been let in: accept its licence on {page}"
        raise ArrieroError(
            ErrorCode.MODEL_ACCESS_DENIED,
            f"{self.ref.repo} is gated: {why}",
            status=error.response.status_code,
            suggested_action=f"Accept the licence on {page} (its authors may have to agree), "
            "and set HF_TOKEN of the same account.",
        ) from error

    def _raise_denied(self, error: hub_errors.HfHubHTTPError) -> NoReturn:
        if isinstance(error, hub_errors.DisabledRepoError):
            why, advice = "the Hub has disabled it", "Look for another repository with this model."
        elif error.response.status_code == 401:
            why = f"{self.token.name} is not valid, or no longer"
            advice = (
                f"Set HF_TOKEN to a valid token or unset it, or run `hf auth login`; then try {self.page}."
            )
        else:
            why = f"{self.token.name or 'no token'} does not give the right to it"
            advice = f"Set HF_TOKEN of an account that may read {self.page}."
        raise ArrieroError(
            ErrorCode.MODEL_ACCESS_DENIED,
            f"the Hub refuses access to {self.ref.repo}: {why}",
            status=error.response.status_code,
            suggested_action=advice,
        ) from error


def _wait_s(headers: httpx2.Headers, now_unix: float) -> float | None:
    """Return how long the Hub asks to wait: by the usual header, or by that of its rate limit."""
    told = retry_after_s(headers.get("Retry-After"), now_unix)
    if told is not None:
        return told
    match = _RATE_LIMIT.search(headers.get("RateLimit", ""))
    return min(float(match[1]), RETRY_AFTER_MAX_S) if match else None
