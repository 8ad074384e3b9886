"""What is one model of a catalog: its record, its files, the card beside them?"""

import hashlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from arriero.agent.files import sync_folder
from arriero.contracts.records import ModelFile, ModelRecord
from arriero.engines.base import ModelFacts

CARD_NAME: Final = "model.json"
#: Hidden folder below the models folder for what is not whole yet.
PARTIAL_DIR: Final = ".partial"
#: What is copied in by an import lies there; of no use after a crash.
IMPORT_PREFIX: Final = "import-"


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """`model.json` beside the files of a model of our own, as we write it; `claims` reads it."""

    record: ModelRecord
    files: list[ModelFile]


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model with its files; `paths` are absolute, the one to load first."""

    record: ModelRecord
    files: tuple[ModelFile, ...]
    paths: tuple[Path, ...]

    @property
    def path(self) -> Path:
        """The file to give to the engine."""
        return self.paths[0]


def model_id_of(model_ref: str, sha256: str) -> str:
    """Return the id of a model: the same for the same reference and content."""
    return "m-" + hashlib.sha256(f"{model_ref}\n{sha256}".encode()).hexdigest()[:12]


def whole_sha256(files: Sequence[ModelFile]) -> str:
    """Return the hash of a model: its file's, or one over those of all its parts."""
    if len(files) == 1:
        return files[0].sha256
    return hashlib.sha256("".join(f"{f.sha256}  {f.name}\n" for f in files).encode()).hexdigest()


def make_record(
    *,
    model_ref: str,
    provider: str,
    files: Sequence[ModelFile],
    facts: ModelFacts,
    is_external: bool,
    added_unix: float,
    source: str,
    revision: str = "",
    projector: str = "",
) -> ModelRecord:
    """Return the record of a model that was just verified."""
    sha256 = whole_sha256(files)
    record = ModelRecord(
        model_id=model_id_of(model_ref, sha256),
        model_ref=model_ref,
        provider=provider,
        files=[file.name for file in files],
        size_bytes=sum(file.size_bytes for file in files),
        sha256=sha256,
        added_unix=added_unix,
        is_external=is_external,
        revision=revision,
        source=source,
        projector=projector,
        parts=list(files),
    )
    return with_facts(record, facts)


def with_facts(record: ModelRecord, facts: ModelFacts) -> ModelRecord:
    """Return a record with what its file's header says."""
    return msgspec.structs.replace(
        record,
        architecture=facts.architecture,
        quantisation=facts.quantisation,
        context_length=facts.context_length,
        block_count=facts.block_count,
        parameters=facts.parameters,
        is_embedding=facts.is_embedding,
        has_chat_template=facts.has_chat_template,
        format=facts.format,
        head_count=facts.head_count,
        head_count_kv=facts.head_count_kv,
        embedding_length=facts.embedding_length,
        vocabulary_size=facts.vocabulary_size,
    )


# --- In threads --------------------------------------------------------------------------------


def write_card(folder: Path, card: Card) -> None:
    """Write the card of a folder so that a reader sees the old one or the new one, never a half."""
    fresh = folder / f".{CARD_NAME}.new"
    with fresh.open("wb") as file:
        file.write(msgspec.json.encode(card))
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(folder / CARD_NAME)
    sync_folder(folder)


def put_in_place(ready: Path, target: Path, card: Card) -> None:
    """Make a folder of whole, verified files visible under its final name, its card in it."""
    write_card(ready, card)
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        # The same reference and content, but not in the catalog: whatever it was, this is verified.
        shutil.rmtree(target)
    ready.replace(target)
    sync_folder(target.parent)


def remove_card(folder: Path) -> None:
    """Remove the card of a model's folder, if there is one.  Raises OSError, as on a read-only disk."""
    if not folder.is_symlink():
        (folder / CARD_NAME).unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a model's folder; what a link put in its place leads to stays untouched."""
    if folder.is_symlink():
        folder.unlink()
        return
    # The card first: without it, what a crash leaves is not taken for a model.
    remove_card(folder)
    shutil.rmtree(folder, ignore_errors=True)
