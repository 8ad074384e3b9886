"""How is room made by removing models?  The choice itself is `domain.pruning`."""

import os
import stat
from collections.abc import Callable, Sequence

from arriero.agent.catalog import CatalogEntry, ModelCatalog
from arriero.agent.files import in_thread
from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.records import ModelRecord, PruneResult
from arriero.domain.pruning import Candidate, FileLinks, choose, freed_by

#: References or ids of the models that workers have loaded or are loading.
InUse = Callable[[], set[str]]


def refuse_if_in_use(record: ModelRecord, in_use: InUse) -> None:
    """Raise MODEL_IN_USE if a worker has the model."""
    if _is_used(record, in_use()):
        fail(
            ErrorCode.MODEL_IN_USE,
            f"a worker has {record.model_ref} loaded or is loading it",
            model_id=record.model_id,
            model_ref=record.model_ref,
        )


async def prune(
    catalog: ModelCatalog, in_use: InUse, *, free_bytes: int, is_dry_run: bool = False
) -> PruneResult:
    """Free at least `free_bytes`, or as much as may be freed; the result tells both numbers.

    Never removes what is loaded or loading, pinned, or not ours.  A dry run removes nothing and
    answers the same.  Bytes of a file that something else links to as well are not counted.
    """
    entries = {entry.record.model_id: entry for entry in await catalog.entries()}
    used = in_use()  # Here, where workers come and go: not in a thread beside them.
    candidates = await in_thread(lambda: _candidates(list(entries.values()), used))
    choice = choose(candidates, free_bytes)
    removed: list[ModelRecord] = []
    for model_id in choice.model_ids:
        record = entries[model_id].record
        if is_dry_run or await _remove(catalog, in_use, record):
            removed.append(record)
    ids = {record.model_id for record in removed}
    return PruneResult(
        removed=removed,
        freed_bytes=freed_by(candidate for candidate in candidates if candidate.model_id in ids),
        wanted_bytes=free_bytes,
        is_dry_run=is_dry_run,
    )


async def _remove(catalog: ModelCatalog, in_use: InUse, record: ModelRecord) -> bool:
    """Remove one; False if a worker was started with it, or somebody removed it, since it was chosen."""
    try:
        refuse_if_in_use(record, in_use)
        await catalog.remove(record.model_id)
    except ArrieroError as error:
        if error.code not in (ErrorCode.MODEL_IN_USE, ErrorCode.MODEL_NOT_FOUND):
            raise
        return False
    return True


def _is_used(record: ModelRecord, used: set[str]) -> bool:
    return record.model_ref in used or record.model_id in used


def _candidates(entries: Sequence[CatalogEntry], used: set[str]) -> list[Candidate]:
    return [
        Candidate(
            model_id=entry.record.model_id,
            added_unix=entry.record.added_unix,
            files=_links(entry),
            last_used_unix=entry.record.last_used_unix,
            is_protected=entry.record.is_external or entry.record.is_pinned or _is_used(entry.record, used),
        )
        for entry in entries
    ]


def _links(entry: CatalogEntry) -> tuple[FileLinks, ...]:
    found = []
    for path in entry.paths:
        try:
            seen = os.lstat(path)
        except OSError:
            continue
        if stat.S_ISREG(seen.st_mode):
            found.append(FileLinks((seen.st_dev, seen.st_ino), seen.st_size, seen.st_nlink))
    return tuple(found)
