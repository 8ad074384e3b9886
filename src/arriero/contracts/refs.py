"""What is a well-formed model reference, and what does it point to?"""

import re
from dataclasses import dataclass
from typing import Final, NoReturn
from urllib.parse import unquote, urlsplit

from arriero.contracts.errors import ErrorCode, fail
from arriero.contracts.names import FILE_NAME_BYTES_MAX, is_file_name

ACCEPTED_FORMS: Final = (
    "hf:org/repo[:QUANT][@revision], hf:org/repo/path/file.gguf[@revision], file:///abs/path.gguf, "
    "https://host/file.gguf, demo"
)
REF_LENGTH_MAX: Final = 2048
#: Formats that run code when they are loaded: never fetched, never loaded.
PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
_HF_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_QUANT: Final = re.compile(r"[A-Za-z0-9_]{1,32}")
_REVISION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_PATH_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+-]{0,199}")


@dataclass(frozen=True, slots=True)
class HfRef:
    """A model on the Hugging Face Hub: a repository, and how to choose a file in it."""

    repo: str
    quant: str | None = None
    path: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file on the node itself, by its absolute path."""

    path: str


@dataclass(frozen=True, slots=True)
class HttpsRef:
    """A file behind an address.  `http` is accepted for loopback hosts alone."""

    url: str


@dataclass(frozen=True, slots=True)
class DemoRef:
    """The tiny model inside the package."""


ModelRef = HfRef | FileRef | HttpsRef | DemoRef


def parse(text: str) -> ModelRef:
    """Return what `text` points to.

    Raises INVALID_MODEL_REFERENCE (with the accepted forms) if it has none of them.
    """
    if not text or len(text) > REF_LENGTH_MAX or not text.isprintable():
        _refuse(text, "empty, too long, or with unprintable characters")
    if text == "demo":
        return DemoRef()
    if text.startswith("hf:"):
        return _parse_hf(text)
    if text.startswith("file://"):
        return _parse_file(text)
    if text.startswith(("https://", "http://")):
        return _parse_url(text)
    _refuse(text, "unknown form")


def _parse_hf(text: str) -> HfRef:
    body, _, revision = text[3:].partition("@")
    if "@" in text and not (_REVISION.fullmatch(revision) and ".." not in revision):
        _refuse(text, "the revision is not well formed")
    body, _, quant = body.partition(":")
    if ":" in text[3:].partition("@")[0] and not _QUANT.fullmatch(quant):
        _refuse(text, "the quantisation is not well formed")
    parts = body.split("/")
    if len(parts) < 2 or not all(_HF_NAME.fullmatch(part) and ".." not in part for part in parts[:2]):
        _refuse(text, "no org/repo")
    path = "/".join(parts[2:]) or None
    if path is not None:
        if quant:
            _refuse(text, "a path and a quantisation at once")
        if not all(_PATH_PART.fullmatch(part) and ".." not in part for part in parts[2:]):
            _refuse(text, "the path is not well formed")
        _refuse_pickle(text, path)
        if not path.lower().endswith((".gguf", ".safetensors")):
            _refuse(text, "the path names no .gguf file")
    elif len(parts) > 2:
        _refuse(text, "an empty path")
    return HfRef("/".join(parts[:2]), quant or None, path, revision or None)


def _parse_file(text: str) -> FileRef:
    try:
        split = urlsplit(text)
    except ValueError:
        _refuse(text, "the address is not well formed")
    path = unquote(split.path)
    if split.netloc not in ("", "localhost") or split.query or split.fragment:
        _refuse(text, "a file reference has no host, query or fragment (write # and ? as %23 and %3F)")
    if not path.startswith("/") or "\x00" in path or ".." in path.split("/"):
        _refuse(text, "the path is not absolute")
    name = path.rsplit("/", 1)[-1]
    if len(name) <= FILE_NAME_BYTES_MAX and not is_file_name(name):  # Longer ones no system has.
        _refuse(text, "the path ends in no plain name of a file")
    _refuse_pickle(text, path)
    return FileRef(path)


def _parse_url(text: str) -> HttpsRef:
    try:
        split = urlsplit(text)
        host, _ = split.hostname, split.port
    except ValueError:
        _refuse(text, "the address is not well formed")
    if not host or split.username is not None or split.password is not None or " " in text:
        _refuse(text, "the address needs a host and carries no credentials")
    if split.scheme == "http" and host not in ("127.0.0.1", "localhost", "::1"):
        _refuse(text, "http:// is accepted for loopback hosts alone")
    name = unquote(split.path).rsplit("/", 1)[-1]
    if not name:
        _refuse(text, "the address names no file")
    _refuse_pickle(text, name)
    return HttpsRef(text)


def _refuse_pickle(text: str, path: str) -> None:
    lowered = path.lower()
    for suffix in PICKLE_SUFFIXES:
        if lowered.endswith(suffix):
            _refuse(
                text, f"{suffix} files are pickles, which run code when they are loaded; use a .gguf file"
            )


def _refuse(text: str, why: str) -> NoReturn:
    # An argument that is no UTF-8 holds surrogates, which no answer can carry.
    sendable = text[:120].encode("utf-8", "backslashreplace").decode()
    shown = sendable + ("…" if len(text) > 120 else "")
    fail(
        ErrorCode.INVALID_MODEL_REFERENCE,
        f"{shown!r} is no model reference: {why}. Accepted: {ACCEPTED_FORMS}",
        reference=shown,
        accepted=ACCEPTED_FORMS,
    )
