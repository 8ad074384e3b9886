"""How do models that lie on this machine come into the catalog?  (air-gapped: `models import`)

Each is copied into a hidden folder and hashed on the way; its header is read, its card compared,
and only then it becomes visible: nothing half ever is.
"""

import asyncio
import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from arriero.agent import claims
from arriero.agent.catalog import ModelCatalog, make_record
from arriero.agent.catalog_entry import IMPORT_PREFIX, PARTIAL_DIR
from arriero.agent.files import READ_BYTES, disk_error, in_thread, mib, size_text
from arriero.agent.import_plan import ImportPlan, Piece, PlannedModel, plan
from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.records import ImportResult, ModelFile, ModelRecord
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy

Tell = Callable[[str, int, int], None]


class Importer:
    """Copies models in, one at a time."""

    def __init__(
        self, catalog: ModelCatalog, *, inspect: claims.Inspect, clock: Clock, entropy: Entropy
    ) -> None:
        self._catalog = catalog
        self._inspect = inspect
        self._clock = clock
        self._entropy = entropy
        self._turn = asyncio.Lock()

    async def plan(self, path: str, model_ref: str | None) -> ImportPlan:
        """Look what is at `path`; raises as `import_plan.plan` does."""
        return await asyncio.to_thread(plan, path, model_ref)

    async def run(self, planned: ImportPlan, tell: Tell = lambda *_: None) -> ImportResult:
        """Import what was planned.  One model that cannot be imported does not keep the others.

        Raises the first model's error where none could be imported and none was known.
        """
        imported: list[ModelRecord] = []
        known: list[ModelRecord] = []
        errors: list[ArrieroError] = []
        before_bytes, total_bytes = 0, planned.size_bytes
        async with self._turn:
            for model in planned.models:
                start = before_bytes
                try:
                    record, is_new = await self._bring(
                        model,
                        lambda read, name=model.name, start=start: tell(name, start + read, total_bytes),  # type: ignore[misc]  # Defaults bind the loop's values.
                    )
                except ArrieroError as error:
                    errors.append(error)
                    planned.refuse(model.name, error)
                else:
                    (imported if is_new else known).append(record)
                before_bytes += model.size_bytes
                tell(model.name, before_bytes, total_bytes)
        if not imported and not known:
            _raise_first(planned, errors)
        return ImportResult(imported=imported, known=known, refused=planned.refused)

    async def _bring(self, model: PlannedModel, on_read: Callable[[int], None]) -> tuple[ModelRecord, bool]:
        """Import one model; return its record, and whether it is new."""
        present = await self._catalog.get(model.model_ref)
        if present is not None and model.card is not None and not present.record.is_external:
            if present.record.sha256 == model.card[0].sha256:
                return present.record, False
            if model.model_ref == model.card[0].model_ref:
                fail(
                    ErrorCode.INVALID_REQUEST,
                    f"{model.model_ref} is here already, with other content: remove it first",
                    model_ref=model.model_ref,
                )
        # What is no model is not copied; what was copied is looked at again.
        await asyncio.to_thread(self._inspect, model.pieces[0].path)
        await self._check_room(model.size_bytes)
        folder = self._catalog.models_dir / PARTIAL_DIR / f"{IMPORT_PREFIX}{self._entropy.hex(16)}"
        try:
            await in_thread(lambda: _make(folder))
            files = await self._copy_all(model, folder, on_read)
            facts = await asyncio.to_thread(self._inspect, folder / files[0].name)
            card = None if model.card is None else model.card[0]
            record = make_record(
                model_ref=model.model_ref,
                provider=claims.provider_of(model.model_ref),
                files=files,
                facts=facts,
                is_external=False,
                added_unix=self._clock.wall_s(),
                source="import",
                revision="" if card is None else card.revision,
                projector="" if card is None else card.projector,
            )
            is_known = (
                present is not None
                and not present.record.is_external
                and present.record.model_id == record.model_id
            )
            entry = await self._catalog.publish(folder, record, files)
            return entry.record, not is_known
        finally:
            await in_thread(lambda: shutil.rmtree(folder, ignore_errors=True))

    async def _copy_all(
        self, model: PlannedModel, folder: Path, on_read: Callable[[int], None]
    ) -> list[ModelFile]:
        files: list[ModelFile] = []
        expected = [file.sha256 for file in model.card[1]] if model.card is not None else []
        done_bytes = 0
        for number, piece in enumerate(model.pieces):
            start = done_bytes
            file = await _copy(piece, folder, lambda read, start=start: on_read(start + read))  # type: ignore[misc]  # A default binds the loop's value.
            if expected and file.sha256 != expected[number]:
                fail(
                    ErrorCode.MODEL_CORRUPTED,
                    f"{piece.name} has the checksum {file.sha256[:12]}…, "
                    f"its card says {expected[number][:12]}…",
                    file=piece.name,
                )
            files.append(file)
            done_bytes += file.size_bytes
        return files

    async def _check_room(self, needed_bytes: int) -> None:
        folder = self._catalog.models_dir
        try:
            free_bytes = (await in_thread(lambda: shutil.disk_usage(folder))).free
        except OSError as error:
            raise disk_error(error, "its room was measured") from error
        if needed_bytes > free_bytes:
            short_bytes = needed_bytes - free_bytes
            fail(
                ErrorCode.INSUFFICIENT_DISK,
                f"the copy needs {size_text(needed_bytes)}, the disk has {size_text(free_bytes)}: "
                f"{size_text(short_bytes)} too little",
                required_mb=mib(needed_bytes),
                available_mb=free_bytes // (1024 * 1024),
                shortfall_mb=mib(short_bytes),
            )


def _raise_first(planned: ImportPlan, errors: list[ArrieroError]) -> None:
    first = planned.refused[0]
    details = dict(errors[0].details) if errors and errors[0].message == first.why else {}
    others = f" (and {len(planned.refused) - 1} more)" if len(planned.refused) > 1 else ""
    details["refused"] = [
        {"name": row.name, "code": row.code, "why": row.why} for row in planned.refused[:100]
    ]
    # Many a reason names the file already.
    why = first.why if first.why.startswith(first.name) else f"{first.name}: {first.why}"
    raise ArrieroError(ErrorCode(first.code), f"{why}{others}", **details)


async def _copy(piece: Piece, folder: Path, on_read: Callable[[int], None]) -> ModelFile:
    """Copy one file, hashing on the way, and make it last.

    Raises INVALID_MODEL_PATH if it cannot be read, MODEL_CORRUPTED if it changes meanwhile,
    INSUFFICIENT_DISK and STATE_DIR_UNUSABLE where it cannot be written.
    """
    copy = _Copy(piece, folder)
    try:
        await in_thread(copy.open)
        while count := await in_thread(copy.step):
            copy.size_bytes += count
            on_read(copy.size_bytes)
        return await in_thread(copy.finish)
    finally:
        copy.close()


class _Copy:
    """Two open files and a hash; every method but `close` blocks."""

    def __init__(self, piece: Piece, folder: Path) -> None:
        self._piece = piece
        self._target = folder / piece.name
        self._hasher = hashlib.sha256()
        self._descriptors = [-1, -1]
        self._before = (0, 0)
        self.size_bytes = 0

    def open(self) -> None:
        # The path was resolved: a link that stands here now was put there since.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._descriptors[0] = os.open(self._piece.path, flags)
            seen = os.fstat(self._descriptors[0])
        except OSError as error:
            raise self._unreadable(os.strerror(error.errno or 0)) from error
        if not stat.S_ISREG(seen.st_mode):
            raise self._unreadable("it is no regular file")
        self._before = (seen.st_size, seen.st_mtime_ns)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._descriptors[1] = os.open(self._target, flags, 0o644)
        except OSError as error:
            raise disk_error(error, f"{self._piece.name} was copied") from error

    def step(self) -> int:
        try:
            block = os.read(self._descriptors[0], READ_BYTES)
        except OSError as error:
            raise self._unreadable(os.strerror(error.errno or 0)) from error
        self._hasher.update(block)
        rest = memoryview(block)
        try:
            while rest:
                rest = rest[os.write(self._descriptors[1], rest) :]
        except OSError as error:
            raise disk_error(error, f"{self._piece.name} was copied") from error
        return len(block)

    def finish(self) -> ModelFile:
        seen = os.fstat(self._descriptors[0])
        if (seen.st_size, seen.st_mtime_ns) != self._before or seen.st_size != self.size_bytes:
            raise ArrieroError(ErrorCode.MODEL_CORRUPTED, f"{self._piece.name} changed while it was copied")
        try:
            os.fsync(self._descriptors[1])
        except OSError as error:
            raise disk_error(error, f"{self._piece.name} was copied") from error
        return ModelFile(
            name=self._piece.name,
            size_bytes=self.size_bytes,
            sha256=self._hasher.hexdigest(),
            modified_ns=os.fstat(self._descriptors[1]).st_mtime_ns,
        )

    def close(self) -> None:
        for descriptor in self._descriptors:
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptors = [-1, -1]

    def _unreadable(self, why: str) -> ArrieroError:
        return ArrieroError(ErrorCode.INVALID_MODEL_PATH, f"{self._piece.name} cannot be read: {why}")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise disk_error(error, "an import was prepared") from error
