"""How does a model reference become verified files on this machine?

One task a download.  Bytes go to `MODELS_DIR/.partial/KEY`; when every file is whole, hashed and
its header read, the folder is renamed to `MODELS_DIR/MODEL_ID` and entered in the catalog: nothing
half is ever visible.  What was fetched stays in `.partial` after a failure or a cancel, and the
next download of the same reference goes on with it.
"""

import asyncio
import hashlib
import os
import shutil
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import aiohttp
import msgspec

from arriero import demo_model
from arriero.agent import hub
from arriero.agent.budget import Budget
from arriero.agent.catalog import CARD_NAME, Card, CatalogEntry, ModelCatalog, make_record
from arriero.agent.fetch import FetchedFile, Fetcher, FetchLimits, RemoteFile
from arriero.agent.files import (
    allocated_bytes,
    check_room,
    disk_error,
    in_thread,
    sha256_of,
    sync_folder,
)
from arriero.agent.progress import Job
from arriero.agent.retries import Retries
from arriero.agent.sources import local_file, remote_file
from arriero.contracts import ids, refs
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import DownloadFrame
from arriero.contracts.records import DownloadRecord, ModelFile, ModelRecord
from arriero.contracts.states import DownloadState
from arriero.engines.base import ModelFacts
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy

PARTIAL_DIR: Final = ".partial"


@dataclass(frozen=True, slots=True)
class ProvisionLimits:
    """Numbers of section 7; tests give smaller ones."""

    fetch: FetchLimits = field(default_factory=FetchLimits)
    #: So many downloads at a time; more wait in the state `queued`.
    downloads_max: int = 4
    #: So many ended downloads are remembered.
    ended_max: int = 100


@dataclass(slots=True)
class _Running:
    job: Job
    task: asyncio.Task[None] | None = None
    entry: CatalogEntry | None = None


class ModelProvisioner:
    """Fetches and registers models.  Used as `async with ModelProvisioner(…) as provisioner`.

    `inspect` reads a model's header in a thread and raises MODEL_CORRUPTED for what is none.
    `on_change` is called in the event loop with each change of a download; it must not raise.
    `group` owns the tasks; without one the provisioner has its own.
    """

    def __init__(
        self,
        catalog: ModelCatalog,
        *,
        clock: Clock,
        entropy: Entropy,
        inspect: Callable[[Path], ModelFacts],
        limits: ProvisionLimits | None = None,
        hf_endpoint: str | None = None,
        on_change: Callable[[DownloadRecord], None] = lambda _: None,
        group: asyncio.TaskGroup | None = None,
    ) -> None:
        self._catalog = catalog
        self._clock = clock
        self._entropy = entropy
        self._inspect = inspect
        self._limits = limits or ProvisionLimits()
        self._budget = Budget(clock, self._limits.fetch.rate_bytes_per_s)
        self._hub = hub.Hub(hf_endpoint, timeout_s=self._limits.fetch.connect_s)
        self._on_change = on_change
        self._own_group = asyncio.TaskGroup() if group is None else None
        self._group = group or self._own_group
        self._session: aiohttp.ClientSession | None = None
        self._all: dict[str, _Running] = {}
        self._by_ref: dict[str, _Running] = {}
        self._places = asyncio.Semaphore(self._limits.downloads_max)
        self._is_closed = False

    async def __aenter__(self) -> Self:
        if self._own_group is not None:
            await self._own_group.__aenter__()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            auto_decompress=False,
            # Signed addresses are long; nothing of one download is told to another.
            max_line_size=65_536,
            max_field_size=65_536,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            read_bufsize=self._limits.fetch.block_bytes,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.aclose()
        finally:
            if self._own_group is not None:
                # No task runs any more.  An error of the caller's block leaves as it is, not as a
                # group; a cancellation goes through the group, which may be its cause.
                is_cancel = isinstance(error, asyncio.CancelledError)
                await self._own_group.__aexit__(*((kind, error, trace) if is_cancel else (None, None, None)))

    async def aclose(self) -> None:
        """Cancel what runs, wait until it has let go, close connections.  Safe to call twice."""
        self._is_closed = True
        tasks = [running.task for running in self._all.values() if running.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._session is not None:
            await self._session.close()
        hub.close_connections()

    # --- Asked from outside -------------------------------------------------------------------

    def start(self, ref: str) -> DownloadRecord:
        """Begin to make `ref` available, or join the download that does so already.

        One that is in the catalog is `complete` in a moment, without the network.
        Raises INVALID_MODEL_REFERENCE.
        """
        return self._start(ref).job.record()

    def records(self) -> list[DownloadRecord]:
        """Return all downloads that run, and the last ones that ended; the newest first."""
        return [running.job.record() for running in reversed(self._all.values())]

    def record(self, download_id: str) -> DownloadRecord:
        """Return one download.  Raises NOT_FOUND."""
        return self._require(download_id).job.record()

    def frames(self, download_id: str) -> AsyncGenerator[DownloadFrame, None]:
        """Yield the present state, then each change; ends after a final state, whichever it is.

        Raises NOT_FOUND at once.
        """
        return self._require(download_id).job.frames()

    async def wait(self, download_id: str) -> tuple[ModelRecord, Path]:
        """Return the model once it is there.  Raises the download's error; REQUEST_CANCELLED."""
        running = self._require(download_id)
        await running.job.wait_final()
        if running.job.error is not None:
            raise _copy(running.job.error)
        assert running.entry is not None, "a complete download has an entry"
        return running.entry.record, running.entry.path

    async def ensure(self, ref: str) -> tuple[ModelRecord, Path]:
        """Return the model of `ref`, fetched first where it is not there.  Raises as `wait` does."""
        refs.parse(ref)
        entry = await self._catalog.get(ref)
        if entry is not None:
            return entry.record, entry.path
        return await self.wait(self._start(ref).job.download_id)

    async def cancel(self, download_id: str) -> DownloadRecord:
        """End a download and return when nothing of it runs any more.  Safe to call twice.

        One that has ended stays as it is.  Raises NOT_FOUND.
        """
        running = self._require(download_id)
        if running.task is not None and not running.task.done():
            running.task.cancel()
            await asyncio.wait({running.task})
        return running.job.record()

    # --- One download -------------------------------------------------------------------------

    def _require(self, download_id: str) -> _Running:
        running = self._all.get(download_id)
        if running is None:
            raise ArrieroError(ErrorCode.NOT_FOUND, f"no download has the id {download_id[:40]!r}")
        return running

    def _start(self, ref: str) -> _Running:
        parsed = refs.parse(ref)
        present = self._by_ref.get(ref)
        if present is not None:
            return present
        if self._is_closed or self._group is None:
            raise ArrieroError(ErrorCode.NOT_RUNNING, "the agent is stopping: no download is begun")
        job = Job(
            download_id=ids.download_id(self._entropy.hex(12)),
            model_ref=ref,
            clock=self._clock,
            interval_s=self._limits.fetch.interval_s,
            on_change=self._on_change,
        )
        running = _Running(job)
        self._all[job.download_id] = self._by_ref[ref] = running
        running.task = self._group.create_task(self._run(running, parsed), name=f"download-{job.download_id}")
        running.task.add_done_callback(lambda task: self._ended(running, task))
        self._on_change(job.record())
        return running

    async def _run(self, running: _Running, parsed: refs.ModelRef) -> None:
        job = running.job
        try:
            running.entry = await self._provide(job, parsed)
            job.verifying()
            job.local_path = str(running.entry.path)
            job.finish(DownloadState.COMPLETE)
        except ArrieroError as error:
            job.finish(DownloadState.FAILED, error)

    def _ended(self, running: _Running, task: asyncio.Task[None]) -> None:
        """Note how a task ended; also one that was cancelled before its first step."""
        if self._by_ref.get(running.job.model_ref) is running:
            del self._by_ref[running.job.model_ref]
        if task.cancelled():
            error = ArrieroError(ErrorCode.REQUEST_CANCELLED, "the download was cancelled")
            running.job.finish(DownloadState.CANCELLED, error)
        elif task.exception() is not None:
            # A fault of ours: readers are told, then the group fails with it.
            running.job.finish(DownloadState.FAILED, ArrieroError(ErrorCode.INTERNAL_ERROR))
        ended = [key for key, other in self._all.items() if other.job.is_final]
        for key in ended[: -self._limits.ended_max or None]:
            del self._all[key]

    async def _provide(self, job: Job, parsed: refs.ModelRef) -> CatalogEntry:
        entry = await self._catalog.get(job.model_ref)
        if entry is not None:
            job.downloading()
            job.advance(entry.record.size_bytes, entry.record.size_bytes)
            return entry
        match parsed:
            case refs.DemoRef():
                path, sha256 = await in_thread(_demo)
                return await self._register(job, path, "demo", sha256)
            case refs.FileRef():
                path = await in_thread(lambda: local_file(parsed))
                return await self._register(job, path, "file")
            case refs.HttpsRef():
                remote = remote_file(parsed)
                async with self._places:
                    job.downloading()
                    return await self._fetch_all(job, [remote], "https")
            case refs.HfRef():
                async with self._places:
                    job.downloading()
                    remotes = await self._resolve(job, parsed)
                    return await self._fetch_all(job, remotes, "hf")

    async def _resolve(self, job: Job, ref: refs.HfRef) -> list[RemoteFile]:
        retries = Retries(self._limits.fetch.retry, self._clock, self._entropy)
        return await retries.run(
            lambda: self._hub.resolve(ref, self._clock.wall_s()), job, what=f"looking up {ref.repo}"
        )

    # --- External files -----------------------------------------------------------------------

    async def _register(
        self, job: Job, path: Path, provider: str, expected_sha256: str | None = None
    ) -> CatalogEntry:
        """Enter a file where it lies: header read, hashed, never copied."""
        job.downloading()
        facts = await asyncio.to_thread(self._inspect, path)
        try:
            before = await in_thread(path.stat)
            job.verifying()
            job.advance(0, before.st_size)
            sha256 = await sha256_of(path, lambda read: job.advance(read, before.st_size))
            after = await in_thread(path.stat)
        except OSError as error:
            raise ArrieroError(
                ErrorCode.INVALID_MODEL_PATH, f"{path.name} cannot be read: {error.strerror}"
            ) from error
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ArrieroError(ErrorCode.MODEL_CORRUPTED, f"{path.name} changed while it was read")
        if expected_sha256 not in (None, sha256):
            raise ArrieroError(ErrorCode.MODEL_CORRUPTED, f"{path.name} is not the file of this release")
        file = ModelFile(
            name=path.name, size_bytes=after.st_size, sha256=sha256, modified_ns=after.st_mtime_ns
        )
        record = make_record(
            model_ref=job.model_ref,
            provider=provider,
            files=[file],
            facts=facts,
            is_external=True,
            added_unix=self._clock.wall_s(),
            source=provider,
        )
        entry = CatalogEntry(record, (file,), (path,))
        await self._catalog.add(entry)
        return entry

    # --- Fetched files ------------------------------------------------------------------------

    async def _fetch_all(self, job: Job, remotes: list[RemoteFile], provider: str) -> CatalogEntry:
        assert self._session is not None, "used outside of its `async with`"
        fetcher = Fetcher(self._session, self._clock, self._entropy, self._limits.fetch, self._budget)
        folder = self._partial_folder(job.model_ref)
        try:
            have_bytes = await in_thread(lambda: _prepare_folder(folder))
        except OSError as error:
            raise disk_error(error, "a download was prepared") from error
        sizes = [remote.size_bytes for remote in remotes]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        if total is not None:
            await check_room(folder, total - have_bytes)
        fetched: list[FetchedFile] = []
        for number, remote in enumerate(remotes, 1):
            watch = _PartWatch(job, sum(file.size_bytes for file in fetched), total)
            later_bytes = sum(later.size_bytes or 0 for later in remotes[number:])
            fetched.append(await fetcher.fetch(remote, folder, watch, later_bytes=later_bytes))
        job.verifying()
        return await self._publish(job, folder, fetched, provider)

    async def _publish(
        self, job: Job, folder: Path, fetched: list[FetchedFile], provider: str
    ) -> CatalogEntry:
        """Read the header, write the card, rename the folder into place, enter it."""
        try:
            ready = await in_thread(lambda: _gather(folder, fetched))
            facts = await self._inspect_or_remove(ready / fetched[0].name, folder)
            files = await in_thread(lambda: _describe(ready, fetched))
            record = make_record(
                model_ref=job.model_ref,
                provider=provider,
                files=files,
                facts=facts,
                is_external=False,
                added_unix=self._clock.wall_s(),
                source=provider,
            )
            target = self._catalog.models_dir / record.model_id
            await in_thread(lambda: _put_in_place(ready, target, Card(record=record, files=files)))
        except OSError as error:
            raise disk_error(error, "a model was put in place") from error
        entry = CatalogEntry(record, tuple(files), tuple(target / file.name for file in files))
        await self._catalog.add(entry)
        await in_thread(lambda: shutil.rmtree(folder, ignore_errors=True))
        return entry

    async def _inspect_or_remove(self, path: Path, folder: Path) -> ModelFacts:
        try:
            return await asyncio.to_thread(self._inspect, path)
        except ArrieroError:
            # All bytes are as the source has them, and they are no model: going on is of no use.
            await in_thread(lambda: shutil.rmtree(folder, ignore_errors=True))
            raise

    def _partial_folder(self, model_ref: str) -> Path:
        key = hashlib.sha256(model_ref.encode()).hexdigest()[:24]
        return self._catalog.models_dir / PARTIAL_DIR / key


class _PartWatch:
    """Tells a job of one file of several."""

    def __init__(self, job: Job, before_bytes: int, total_bytes: int | None) -> None:
        self._job = job
        self._before_bytes = before_bytes
        self._total_bytes = total_bytes
        self.attempting = job.attempting
        self.waiting = job.waiting
        self.downloading = job.downloading
        self.verifying = job.verifying

    def advance(self, downloaded_bytes: int, total_bytes: int | None) -> None:
        """So many bytes of this file are there."""
        total = self._total_bytes
        if total is None and total_bytes is not None:
            total = self._before_bytes + total_bytes
        self._job.advance(self._before_bytes + downloaded_bytes, total)


def _copy(error: ArrieroError) -> ArrieroError:
    """Return a new exception for each waiter: a raised one carries its own traceback."""
    return ArrieroError(error.code, error.message, **error.details)


# --- In threads --------------------------------------------------------------------------------


def _demo() -> tuple[Path, str]:
    return demo_model.path().resolve(), demo_model.SHA256


def _prepare_folder(folder: Path) -> int:
    """Make the folder; undo a publication that a crash cut short; return the bytes that are there."""
    folder.mkdir(parents=True, exist_ok=True)
    ready = folder / "ready"
    if ready.is_dir():
        (ready / CARD_NAME).unlink(missing_ok=True)
        for path in ready.iterdir():
            path.replace(folder / f"{path.name}.part")
        ready.rmdir()
    return sum(allocated_bytes(path) for path in folder.glob("*.part"))


def _gather(folder: Path, fetched: list[FetchedFile]) -> Path:
    """Move the whole files under their names into one folder."""
    ready = folder / "ready"
    ready.mkdir()
    for file in fetched:
        file.path.replace(ready / file.name)
    sync_folder(ready)
    return ready


def _describe(ready: Path, fetched: list[FetchedFile]) -> list[ModelFile]:
    return [
        ModelFile(
            name=file.name,
            size_bytes=file.size_bytes,
            sha256=file.sha256,
            modified_ns=(ready / file.name).stat().st_mtime_ns,
        )
        for file in fetched
    ]


def _put_in_place(ready: Path, target: Path, card: Card) -> None:
    with (ready / CARD_NAME).open("wb") as file:
        file.write(msgspec.json.encode(card))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(ready)
    if target.exists():
        # The same reference and content, but not in the catalog: whatever it was, this is verified.
        shutil.rmtree(target)
    ready.replace(target)
    sync_folder(target.parent)
