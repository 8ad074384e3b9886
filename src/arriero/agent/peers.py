"""Which other machines of the pool have a model, and where are its files?

A peer is another agent.  What it answers is looked at as if anybody had written it: the pool's
machines are its owner's, but one of them may be old, broken, or taken over.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec

from arriero.agent.fetch import RemoteFile
from arriero.agent.hub import SIZE_BYTES_MAX, local_names
from arriero.contracts import refs
from arriero.contracts.errors import ArrieroError
from arriero.contracts.records import ModelFile, ModelList, ModelRecord
from arriero.contracts.requests import PeerSource
from arriero.runtime.http import Http

#: A peer is near: one that takes longer is not worth waiting for.
ASK_TIMEOUT_S: Final = 3.0
ANSWER_BYTES_MAX: Final = 16 * 1024 * 1024
FILES_MAX: Final = 1000
_FORMATS: Final = frozenset({"gguf", "safetensors"})
_MODEL_ID: Final = re.compile(r"m-[0-9a-f]{12}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class PeerOffer:
    """A model that a peer has: where each of its files is, with size and checksum."""

    #: What the peer is called; empty where nobody said.
    node: str
    #: The one to load first comes first, a projector last.
    files: list[RemoteFile]
    #: The commit of the Hub that the files are of; empty where the peer does not tell.
    revision: str
    #: Name of the multimodal projector among the files; empty if there is none.
    projector: str


class _Silent(Exception):
    """A peer cannot be asked.  The text says why."""


async def offers(
    peers: Sequence[PeerSource],
    model_ref: str | None,
    sha256s: Sequence[str],
    *,
    http: Http,
    timeout_s: float = ASK_TIMEOUT_S,
    names: Sequence[str] = (),
    on_silent: Callable[[str], None] = lambda _: None,
) -> list[PeerOffer]:
    """Ask all peers at once; return what they offer, in the order in which they were given.

    With `sha256s` a peer needs files of just that content, whatever it calls them: they are offered in
    the order of `sha256s`, under `names` where given (parts of a split model need theirs).  Without, it
    needs a model of the reference; one that names a file of a machine (`file:`) means another file on
    another machine and is never asked for.  Raises nothing: a peer that fails is left out, and
    `on_silent` is told a sentence about it.
    """
    told: dict[int, PeerOffer | str] = {}

    async def ask(number: int, peer: PeerSource) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                records = await _models_of(http, peer)
            offer = choose(peer, records, model_ref, sha256s, names)
        except TimeoutError:
            told[number] = f"{name_of(peer)} did not answer within {timeout_s:g} s"
        except _Silent as error:
            told[number] = f"{name_of(peer)} {error}"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            told[number] = f"{name_of(peer)} is not reachable ({type(error).__name__})"
        else:
            if offer is not None:
                told[number] = offer

    async with asyncio.TaskGroup() as group:
        for number, peer in enumerate(peers):
            group.create_task(ask(number, peer), name=f"ask-peer-{number}")
    found: list[PeerOffer] = []
    for number in sorted(told):
        answer = told[number]
        if isinstance(answer, str):
            on_silent(answer)
        else:
            found.append(answer)
    return found


def choose(
    peer: PeerSource,
    records: Sequence[ModelRecord],
    model_ref: str | None,
    sha256s: Sequence[str],
    names: Sequence[str] = (),
) -> PeerOffer | None:
    """Return what `peer` offers among its models; None if there is nothing that fits."""
    if not sha256s and not _is_shared(model_ref):
        return None
    for record in records:
        files = _files_of(record)
        if files is None:
            continue
        if sha256s:
            by_sha256 = {file.sha256: file for file in files}
            files = [by_sha256[sha256] for sha256 in sha256s if sha256 in by_sha256]
        if len(files) != len(sha256s) if sha256s else record.model_ref != model_ref:
            continue
        own = local_names([_with_suffix(file.name, record.format) for file in files])
        called = list(names) if len(names) == len(files) else own
        projectors = [name for name, file in zip(called, files, strict=True) if file.name == record.projector]
        return PeerOffer(
            node=peer.node,
            files=[_remote(peer, record, name, file) for name, file in zip(called, files, strict=True)],
            revision=record.revision if _COMMIT.fullmatch(record.revision) else "",
            projector=projectors[-1] if projectors and len(files) > 1 else "",
        )
    return None


def name_of(peer: PeerSource) -> str:
    """Return what a peer is called, without anything secret."""
    try:
        host = urlsplit(peer.url).netloc.rpartition("@")[2]
    except ValueError:
        host = ""
    return peer.node or host or "a peer without an address"


async def _models_of(http: Http, peer: PeerSource) -> list[ModelRecord]:
    split = urlsplit(peer.url)
    if split.scheme not in ("http", "https") or not split.hostname or split.username is not None:
        raise _Silent("has no address that could be asked")
    headers = {"Accept-Encoding": "identity"}
    if peer.token:
        headers["Authorization"] = f"Bearer {peer.token}"
    url = f"{peer.url.rstrip('/')}/v1/models"
    async with http.session().get(url, headers=headers, allow_redirects=False) as response:
        if response.status != 200:
            raise _Silent(f"answered with status {response.status}")
        content = bytearray()
        while chunk := await response.content.readany():
            content += chunk
            if len(content) > ANSWER_BYTES_MAX:
                raise _Silent(f"answers with more than {ANSWER_BYTES_MAX} bytes")
    try:
        return msgspec.json.decode(content, type=ModelList).models
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise _Silent("answers what is no list of models") from error


def _files_of(record: ModelRecord) -> list[ModelFile] | None:
    """Return the files of a model in their order; None unless each of them can be asked for and checked."""
    if record.format not in _FORMATS or not _MODEL_ID.fullmatch(record.model_id):
        return None
    parts = record.parts
    if not parts and len(record.files) == 1:
        # An agent of an older version tells one checksum, which is that of the only file.
        name, size_bytes = record.files[0], record.size_bytes
        parts = [ModelFile(name=name, size_bytes=size_bytes, sha256=record.sha256)]
    by_name = {part.name: part for part in parts}
    if not 0 < len(parts) <= FILES_MAX or set(by_name) != set(record.files):
        return None
    if len(by_name) != len(parts) or len(parts) != len(record.files):
        return None
    files = [by_name[name] for name in record.files]
    return files if all(map(_is_sound, files)) else None


def _is_sound(file: ModelFile) -> bool:
    return (
        0 < len(file.name) <= 255
        and file.name.isprintable()
        and file.name not in (".", "..")
        and not set(file.name) & set("/\\")
        and 0 < file.size_bytes <= SIZE_BYTES_MAX
        and _SHA256.fullmatch(file.sha256) is not None
    )


def _is_shared(model_ref: str | None) -> bool:
    """Return whether a reference means the same on every machine."""
    try:
        parsed = refs.parse(model_ref or "")
    except ArrieroError:
        return False
    return isinstance(parsed, refs.HfRef | refs.HttpsRef)


def _with_suffix(name: str, kind: str) -> str:
    return name if name.lower().endswith(f".{kind}") else f"{name}.{kind}"


def _remote(peer: PeerSource, record: ModelRecord, name: str, part: ModelFile) -> RemoteFile:
    path = f"/v1/models/{record.model_id}/files/{quote(part.name, safe='')}"
    return RemoteFile(
        name, peer.url.rstrip("/") + path, part.size_bytes, part.sha256, peer.token or None, name_of(peer)
    )
