"""Can be believed what a card, or a backup of the catalog, says of a model?

Both may come from anybody.  What they claim is checked as it is read: names without a way out of
their folder, digests that are digests, an id that follows from reference and content.  A claim that
passed is still only a claim: it becomes an entry once `verified` has read every byte of its files.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec

from arriero.agent.catalog_entry import (
    CARD_NAME,
    CatalogEntry,
    model_id_of,
    whole_sha256,
    with_facts,
)
from arriero.agent.files import in_thread, sha256_of
from arriero.contracts import refs
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.names import FileName, ModelId, Sha256
from arriero.contracts.records import ModelFile, ModelRecord
from arriero.engines.base import ModelFacts

CARD_BYTES_MAX: Final = 1024 * 1024
FILES_MAX: Final = 1024

Inspect = Callable[[Path], ModelFacts]
_Words = Annotated[str, msgspec.Meta(max_length=300, pattern=r"\A[^\x00-\x1f\x7f\ud800-\udfff]*\Z")]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
_Unix = Annotated[float, msgspec.Meta(ge=0.0, le=1e11)]


class ClaimedFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file as a stranger describes it."""

    name: FileName
    size_bytes: _Count
    sha256: Sha256
    modified_ns: _Count = 0


class ClaimedRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A `ModelRecord` as a stranger gives it, with bounds on everything; unknown fields are passed over."""

    model_id: ModelId
    model_ref: Annotated[str, msgspec.Meta(max_length=refs.REF_LENGTH_MAX)]
    sha256: Sha256
    added_unix: _Unix = 0.0
    last_used_unix: _Unix = 0.0
    times_used: _Count = 0
    is_external: bool = False
    is_pinned: bool = False
    revision: _Words = ""
    source: _Words = ""
    projector: _Words = ""
    architecture: _Words = ""
    quantisation: _Words = ""
    format: _Words = "gguf"
    context_length: _Count = 0
    block_count: _Count = 0
    parameters: _Count = 0
    is_embedding: bool = False
    has_chat_template: bool = False
    head_count: _Count = 0
    head_count_kv: _Count = 0
    embedding_length: _Count = 0
    vocabulary_size: _Count = 0


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What a card says."""

    record: ClaimedRecord
    files: Annotated[list[ClaimedFile], msgspec.Meta(min_length=1, max_length=FILES_MAX)]


class Unbelievable(ValueError):
    """A claim that contradicts itself or reaches out of its folder; its text is a sentence's end."""


def read_card(path: Path) -> Claim:
    """Return what a card claims.  Blocks: call it in a thread.

    Raises Unbelievable, also for one that is no regular file or cannot be read.
    """
    try:
        # Not through a link, and not held by a FIFO.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise Unbelievable(f"its card cannot be read ({os.strerror(error.errno or 0)})") from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Unbelievable("its card is no regular file")
        content = file.read(CARD_BYTES_MAX + 1)
    if len(content) > CARD_BYTES_MAX:
        raise Unbelievable(f"its card has more than {CARD_BYTES_MAX} bytes")
    try:
        return msgspec.json.decode(content, type=Claim)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Unbelievable(f"its card is not well formed: {str(error)[:200]}") from error


def convert(content: dict[str, Any]) -> Claim:
    """Return what rows of a database claim.  Raises Unbelievable."""
    try:
        # SQLite has no truth values.
        return msgspec.convert(content, Claim, strict=False)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise Unbelievable(f"it is not well formed: {str(error)[:200]}") from error


def record_of(claim: Claim) -> tuple[ModelRecord, tuple[ModelFile, ...]]:
    """Return a claim as record and files.  Raises Unbelievable where its parts do not fit together."""
    provider = provider_of(claim.record.model_ref)
    files = tuple(msgspec.convert(msgspec.to_builtins(file), ModelFile) for file in claim.files)
    names = [file.name for file in files]
    if len(set(names)) != len(names) or CARD_NAME in names:
        raise Unbelievable("two of its files have one name")
    if whole_sha256(files) != claim.record.sha256:
        raise Unbelievable("its checksum is not that of its files")
    if model_id_of(claim.record.model_ref, claim.record.sha256) != claim.record.model_id:
        raise Unbelievable("its id does not follow from its reference and checksum")
    if claim.record.projector not in ("", *names[1:]):
        raise Unbelievable("its projector is none of its files")
    record = msgspec.convert(
        {
            **msgspec.to_builtins(claim.record),
            "provider": provider,
            "files": names,
            "size_bytes": sum(file.size_bytes for file in files),
            "parts": msgspec.to_builtins(files),
        },
        ModelRecord,
    )
    return record, files


def provider_of(model_ref: str) -> str:
    """Return the provider that a reference names.  Raises Unbelievable if it is no reference."""
    try:
        parsed = refs.parse(model_ref)
    except ArrieroError as error:
        raise Unbelievable(error.message) from error
    match parsed:
        case refs.HfRef():
            return "hf"
        case refs.HttpsRef():
            return "https"
        case refs.DemoRef():
            return "demo"
        case _:
            return "file"


def read_folder(folder: Path) -> CatalogEntry:
    """Return what the card in a folder of our own claims.  Blocks: call it in a thread.

    Raises Unbelievable, also where the folder or a file is a link, or the card another model's.
    """
    if folder.is_symlink():
        raise Unbelievable("it is a link")
    record, files = record_of(read_card(folder / CARD_NAME))
    if record.model_id != folder.name:
        raise Unbelievable("its card is of another model")
    if record.is_external:
        raise Unbelievable("its card speaks of a file elsewhere")
    paths = tuple(folder / file.name for file in files)
    for path in paths:
        if path.is_symlink():
            raise Unbelievable(f"{path.name} is a link")
    return CatalogEntry(record, files, paths)


def is_as_verified(entry: CatalogEntry, *, is_strict: bool = False) -> bool:
    """Return whether all files are there with their size; external ones unchanged since as well.

    Strictly: none was written to since.  Blocks: call it in a thread.
    """
    for file, path in zip(entry.files, entry.paths, strict=True):
        try:
            seen = path.stat()
        except (OSError, ValueError):
            return False
        if not stat.S_ISREG(seen.st_mode) or seen.st_size != file.size_bytes:
            return False
        if (entry.record.is_external or is_strict) and seen.st_mtime_ns != file.modified_ns:
            return False
    return True


async def check_files(
    entry: CatalogEntry, on_read: Callable[[int], None] = lambda _: None
) -> tuple[ModelFile, ...]:
    """Hash an entry's files; return them with the times they have now.

    `on_read` is told the bytes read of all files so far.  Raises INVALID_MODEL_PATH if a file is
    gone or no regular one, MODEL_CORRUPTED naming the file that is not as it was.
    """
    before_bytes = 0
    checked: list[ModelFile] = []
    for file, path in zip(entry.files, entry.paths, strict=True):
        start_bytes = before_bytes
        try:
            seen = await in_thread(path.stat)
            if not stat.S_ISREG(seen.st_mode):
                raise ArrieroError(
                    ErrorCode.INVALID_MODEL_PATH,
                    f"{file.name} of {entry.record.model_ref} is no regular file",
                    **_details(entry, file),
                )
            sha256 = await sha256_of(path, lambda read, start=start_bytes: on_read(start + read))  # type: ignore[misc]  # A default binds the loop's value.
            after = await in_thread(path.stat)
        except OSError as error:
            raise ArrieroError(
                ErrorCode.INVALID_MODEL_PATH,
                f"{file.name} of {entry.record.model_ref} cannot be read: {error.strerror}",
                **_details(entry, file),
            ) from error
        if sha256 != file.sha256:
            _corrupted(entry, file, f"has the checksum {sha256[:12]}…, not {file.sha256[:12]}…")
        if (seen.st_size, seen.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            _corrupted(entry, file, "changed while it was read")
        checked.append(msgspec.structs.replace(file, modified_ns=after.st_mtime_ns))
        before_bytes += file.size_bytes
    return tuple(checked)


async def verified(
    entry: CatalogEntry, inspect: Inspect | None, on_read: Callable[[int], None] = lambda _: None
) -> CatalogEntry:
    """Return a claimed entry once its files are what it says, with the facts of its own header.

    Raises as `check_files` and `inspect` do.
    """
    files = await check_files(entry, on_read)
    record = msgspec.structs.replace(entry.record, parts=list(files))
    if inspect is not None:
        record = with_facts(record, await in_thread(lambda: inspect(entry.path)))
    return CatalogEntry(record, files, entry.paths)


def _corrupted(entry: CatalogEntry, file: ModelFile, why: str) -> None:
    raise ArrieroError(
        ErrorCode.MODEL_CORRUPTED,
        f"{file.name} of {entry.record.model_ref} {why}",
        suggested_action="Pull it again; a file that is not ours is for the program that keeps it.",
        **_details(entry, file),
    )


def _details(entry: CatalogEntry, file: ModelFile) -> dict[str, str]:
    return {"model_id": entry.record.model_id, "file": file.name}
