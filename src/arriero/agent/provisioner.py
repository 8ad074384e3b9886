"""How does a model reference become verified files on this machine, once, whoever asks?

One task a download; where the bytes come from is `obtain`'s question, how they become visible
`ModelCatalog.publish`'s.  What was fetched stays in `.partial` after a failure or a cancel, and the
next download of the same content goes on with it.
"""

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import aiohttp

from arriero.agent import hub_http
from arriero.agent.catalog import ModelCatalog
from arriero.agent.catalog_entry import CatalogEntry
from arriero.agent.fetch import FetchLimits
from arriero.agent.found_files import Found
from arriero.agent.lost_peers import Wishes
from arriero.agent.obtain import Obtainer
from arriero.agent.open_downloads import OpenDownload, OpenDownloads
from arriero.agent.progress import Job
from arriero.contracts import ids, refs
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import DownloadFrame
from arriero.contracts.records import DownloadRecord, ModelRecord
from arriero.contracts.requests import PeerSource
from arriero.contracts.states import DownloadState
from arriero.engines.base import ModelFacts
from arriero.runtime import logs
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy
from arriero.runtime.http import Http

_HOLDER_DIGITS: Final = 12


@dataclass(frozen=True, slots=True)
class ProvisionLimits:
    """Numbers of section 7; tests give smaller ones."""

    fetch: FetchLimits = field(default_factory=FetchLimits)
    #: So many downloads at a time; more wait in the state `queued`.
    downloads_max: int = 4
    #: So many ended downloads are remembered.
    ended_max: int = 100


@dataclass(frozen=True, slots=True)
class Ticket:
    """A share in a download; whoever has it may leave with `cancel(download_id, holder)`."""

    download_id: str
    holder: str


@dataclass(slots=True)
class _Running:
    job: Job
    wishes: Wishes
    task: asyncio.Task[None] | None = None
    entry: CatalogEntry | None = None
    #: What was fetched is removed unless it becomes a model.
    is_clean: bool = False
    #: It is among the open downloads on the disk.
    is_open: bool = False


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
        self._open = OpenDownloads(catalog.database)
        self._clock = clock
        self._entropy = entropy
        self._inspect = inspect
        self._limits = limits or ProvisionLimits()
        self._hf_endpoint = hf_endpoint
        self._on_change = on_change
        self._own_group = asyncio.TaskGroup() if group is None else None
        self._group = group or self._own_group
        self._http = Http(connect_timeout_s=self._limits.fetch.connect_s)
        self._session: aiohttp.ClientSession | None = None
        self._obtainer: Obtainer | None = None
        self._all: dict[str, _Running] = {}
        self._by_ref: dict[str, _Running] = {}
        self._places = asyncio.Semaphore(self._limits.downloads_max)
        self._is_closed = False
        self._log = logs.get("arriero.agent.downloads")

    async def __aenter__(self) -> Self:
        if self._own_group is not None:
            await self._own_group.__aenter__()
        await self._http.__aenter__()
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
        self._obtainer = Obtainer(
            self._catalog,
            self._http,
            self._session,
            clock=self._clock,
            entropy=self._entropy,
            inspect=self._inspect,
            limits=self._limits.fetch,
            hf_endpoint=self._hf_endpoint,
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
            await self._http.__aexit__(None, None, None)
        hub_http.close_connections()

    async def resume(self) -> list[str]:
        """Go on with the downloads that an agent before us left open; return their references.

        They keep their ids, so whoever followed one comes back to it.  A share in each is ours: it goes
        on until it ends, or somebody leaves it without naming a share.  The ways to other machines are
        not known any more: one that came from there waits until they are told.
        """
        resumed = []
        for left in await self._open.all():
            try:
                running = self._start(left.model_ref, Wishes(lost=left.source), left=left)
            except ArrieroError:
                # A reference that this release does not take any more.
                await self._open.remove(left.download_id)
                continue
            running.is_clean = left.is_clean
            running.job.wants_peers = bool(left.source)
            self._ticket(running)
            resumed.append(left.model_ref)
        return resumed

    # --- Asked from outside -------------------------------------------------------------------

    def start(self, ref: str, *, peers: Sequence[PeerSource] = (), clean: bool = False) -> Ticket:
        """Begin to make `ref` available, or join the download that does so already.

        One that is in the catalog is `complete` in a moment, without the network.  `peers` are asked
        before the internet is; with `clean` nothing is kept of a download that fails or is cancelled.
        Raises INVALID_MODEL_REFERENCE, NOT_RUNNING.
        """
        running = self._start(ref, Wishes(peers))
        running.is_clean = running.is_clean or clean
        return self._ticket(running)

    def tell_peers(self, download_id: str, peers: Sequence[PeerSource]) -> DownloadRecord:
        """Tell a download where peers are by now: it asks them where its source fails.  Raises NOT_FOUND."""
        running = self._require(download_id)
        running.wishes.tell(peers)
        return running.job.record()

    def records(self) -> list[DownloadRecord]:
        """Return all downloads that run, and the last ones that ended; the newest first."""
        return [running.job.record() for running in reversed(self._all.values())]

    def record(self, download_id: str) -> DownloadRecord:
        """Return one download.  Raises NOT_FOUND."""
        return self._require(download_id).job.record()

    def frames(self, download_id: str, after: int = 0) -> AsyncGenerator[tuple[int, DownloadFrame], None]:
        """Yield the present state with its number, then each change; ends after a final state.

        Frames up to the number `after` are left out: the caller has seen them.  Raises NOT_FOUND at
        once.
        """
        return self._require(download_id).job.frames(after)

    async def wait(self, download_id: str) -> tuple[ModelRecord, Path]:
        """Return the model once it is there.  Raises the download's error; REQUEST_CANCELLED."""
        running = self._require(download_id)
        await running.job.wait_final()
        if running.job.error is not None:
            raise _copy(running.job.error)
        assert running.entry is not None, "a complete download has an entry"
        return running.entry.record, running.entry.path

    async def ensure(self, ref: str) -> tuple[ModelRecord, Path]:
        """Return the model of `ref`, fetched first where it is not there.  Raises as `wait` does.

        A caller that is cancelled leaves the download.
        """
        refs.parse(ref)
        entry = await self._catalog.get(ref)
        if entry is not None:
            return entry.record, entry.path
        ticket = self.start(ref)
        try:
            return await self.wait(ticket.download_id)
        except asyncio.CancelledError:
            self._leave(self._require(ticket.download_id), ticket.holder)
            raise

    async def cancel(self, download_id: str, holder: str | None = None) -> DownloadRecord:
        """Leave a download; the last one to leave ends it, and returns when nothing of it runs any more.

        `holder` is the ticket's, and leaving twice with it is as leaving once; without one, any of
        those who are left leaves.  A download that has ended stays as it is.  Raises NOT_FOUND.
        """
        running = self._require(download_id)
        self._leave(running, holder)
        if not running.job.holders and running.task is not None and not running.task.done():
            await asyncio.wait({running.task})
        return running.job.record()

    def start_found(self, seen: Found) -> Ticket:
        """Begin to enter a model that another program keeps here: a download that fetches nothing."""
        running = self._start(seen.model_ref, Wishes(), seen)
        return self._ticket(running)

    # --- One download -------------------------------------------------------------------------

    def _require(self, download_id: str) -> _Running:
        running = self._all.get(download_id)
        if running is None:
            raise ArrieroError(ErrorCode.NOT_FOUND, f"no download has the id {download_id[:40]!r}")
        return running

    def _ticket(self, running: _Running) -> Ticket:
        holder = self._entropy.hex(_HOLDER_DIGITS)
        running.job.holders[holder] = None
        self._on_change(running.job.record())
        return Ticket(running.job.download_id, holder)

    def _leave(self, running: _Running, holder: str | None) -> None:
        holders = running.job.holders
        if running.job.is_final or not holders:
            return
        if holder is None:
            holders.popitem()
        else:
            holders.pop(holder, None)
        self._on_change(running.job.record())
        if not holders and running.task is not None:
            # Who comes now begins a new one, behind this one's end.
            running.task.cancel()

    def _start(
        self, ref: str, wishes: Wishes, seen: Found | None = None, left: OpenDownload | None = None
    ) -> _Running:
        parsed = refs.parse(ref)
        present = self._by_ref.get(ref)
        if present is not None and present.job.holders and not present.job.is_final:
            return present
        if self._is_closed or self._group is None:
            raise ArrieroError(ErrorCode.NOT_RUNNING, "the agent is stopping: no download is begun")
        job = Job(
            download_id=left.download_id if left else ids.download_id(self._entropy.hex(12)),
            model_ref=ref,
            clock=self._clock,
            interval_s=self._limits.fetch.interval_s,
            on_change=self._on_change,
            started_unix=left.started_unix if left else self._clock.wall_s(),
        )
        running = _Running(job, wishes)
        self._all[job.download_id] = self._by_ref[ref] = running
        before = present.task if present is not None else None
        work = self._run(running, parsed, wishes, seen, before)
        running.task = self._group.create_task(work, name=f"download-{job.download_id}")
        running.task.add_done_callback(lambda task: self._ended(running, task))
        self._on_change(job.record())
        return running

    async def _run(
        self, running: _Running, parsed: refs.ModelRef, wishes: Wishes, seen: Found | None,
        before: asyncio.Task[None] | None,
    ) -> None:  # fmt: skip
        job = running.job
        if before is not None and not before.done():
            # One that is being cancelled still has its files open.
            await asyncio.wait({before})
        try:
            running.entry = await self._provide(job, parsed, wishes, seen)
            job.verifying()
            job.local_path = str(running.entry.path)
            job.finish(DownloadState.COMPLETE)
        except ArrieroError as error:
            await self._fail(running, error)
        except Exception:  # noqa: BLE001  The edge: the agent lives on, the log has the traceback.
            self._log.exception("download_fault", download_id=job.download_id, model_ref=job.model_ref)
            await self._fail(running, ArrieroError(ErrorCode.INTERNAL_ERROR))
        except asyncio.CancelledError:
            await self._drop(running)
            raise
        finally:
            await self._close(running)

    async def _fail(self, running: _Running, error: ArrieroError) -> None:
        # Before anybody hears of the end: whoever waits for this content is not to find it half removed.
        await self._drop(running)
        running.job.finish(DownloadState.FAILED, error)

    async def _drop(self, running: _Running) -> None:
        """Remove what was fetched, where nothing of it is to be kept, or nothing came."""
        if self._obtainer is not None:
            await self._obtainer.drop(running.job, is_all=running.is_clean)

    async def _close(self, running: _Running) -> None:
        """Note that a download is not open any more."""
        if running.is_open:
            try:
                await self._open.remove(running.job.download_id)
            except ArrieroError as error:
                # The next agent goes on with it, and finds the model there or fails as this one did.
                self._log.warning("download_not_closed", code=str(error.code), why=error.message)

    def _ended(self, running: _Running, task: asyncio.Task[None]) -> None:
        """Note how a task ended; also one that was cancelled before its first step."""
        if self._by_ref.get(running.job.model_ref) is running:
            del self._by_ref[running.job.model_ref]
        if task.cancelled():
            error = ArrieroError(ErrorCode.REQUEST_CANCELLED, "the download was cancelled")
            running.job.finish(DownloadState.CANCELLED, error)
        elif task.exception() is not None:
            # A fault of its very end: readers are told, then the group fails with it.
            running.job.finish(DownloadState.FAILED, ArrieroError(ErrorCode.INTERNAL_ERROR))
        ended = [key for key, other in self._all.items() if other.job.is_final]
        for key in ended[: -self._limits.ended_max or None]:
            del self._all[key]

    async def _provide(
        self, job: Job, parsed: refs.ModelRef, wishes: Wishes, seen: Found | None
    ) -> CatalogEntry:
        assert self._obtainer is not None, "used outside of its `async with`"
        entry = await self._catalog.get(job.model_ref)
        if entry is not None:
            job.downloading()
            job.source = "this machine"
            job.advance(entry.record.size_bytes, entry.record.size_bytes)
            return entry
        if seen is not None:
            return await self._obtainer.enter_found(job, seen)
        if isinstance(parsed, refs.DemoRef | refs.FileRef):
            return await self._obtainer.obtain(job, parsed, wishes)
        running = self._all[job.download_id]
        running.is_open = True
        await self._open.add(
            OpenDownload(job.download_id, job.model_ref, job.started_unix, running.is_clean, wishes.lost)
        )
        wishes.before_peer = functools.partial(self._open.comes_from, job.download_id)
        async with self._places:
            return await self._obtainer.obtain(job, parsed, wishes)


def _copy(error: ArrieroError) -> ArrieroError:
    """Return a new exception for each waiter: a raised one carries its own traceback."""
    return ArrieroError(error.code, error.message, **error.details)
