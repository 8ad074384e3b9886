"""From where does the content of a reference come: this disk, another node, or the internet?

In this order: a model with the same content under another reference; one that another program keeps
here; a node of the pool that has it; its source on the internet.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp

from arriero import demo_model
from arriero.agent import found, found_files, hub, partial_folder, peers
from arriero.agent.budget import Budget
from arriero.agent.catalog import ModelCatalog
from arriero.agent.catalog_entry import CatalogEntry, make_record
from arriero.agent.fetch import FetchedFile, Fetcher, FetchLimits, RemoteFile
from arriero.agent.files import disk_error, in_thread, sha256_of
from arriero.agent.lost_peers import ELSEWHERE, Wishes
from arriero.agent.progress import Job
from arriero.agent.retries import Retries
from arriero.agent.sources import local_files, remote_file
from arriero.contracts import refs
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import ModelFile
from arriero.domain.download_states import DOWNLOADS
from arriero.engines import gguf
from arriero.engines.base import ModelFacts
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy
from arriero.runtime.http import Http

#: With these nothing is known of the reference; without a network it may still be here.
_UNREACHABLE: Final = frozenset({ErrorCode.DOWNLOAD_FAILED, ErrorCode.DOWNLOAD_TIMEOUT})


@dataclass(frozen=True, slots=True)
class Supply:
    """The files of a model, the one to load first in front, and who has them."""

    files: Sequence[RemoteFile]
    provider: str
    #: For people: "hub", "https", "node attic".
    source: str
    revision: str = ""
    projector: str = ""

    @property
    def sha256s(self) -> list[str]:
        """The checksums, empty unless all are known."""
        known = [file.sha256 for file in self.files if file.sha256 is not None]
        return known if len(known) == len(self.files) else []


class Obtainer:
    """Makes one reference available for a job.  Raises what a download may fail with."""

    def __init__(
        self,
        catalog: ModelCatalog,
        http: Http,
        session: aiohttp.ClientSession,
        *,
        clock: Clock,
        entropy: Entropy,
        inspect: Callable[[Path], ModelFacts],
        limits: FetchLimits,
        hf_endpoint: str | None,
    ) -> None:
        self._catalog = catalog
        self._http = http
        self._clock = clock
        self._entropy = entropy
        self._inspect = inspect
        self._limits = limits
        self._hub = hub.Hub(hf_endpoint, timeout_s=limits.connect_s)
        self._fetcher = Fetcher(session, clock, entropy, limits, Budget(clock, limits.rate_bytes_per_s))
        #: Who fetches into which folder now, one for each content: no file is fetched twice at a time.
        self._turns: dict[Path, Job] = {}

    async def obtain(self, job: Job, parsed: refs.ModelRef, wishes: Wishes) -> CatalogEntry:
        """Return the entry of the job's reference, entered in the catalog; tells the job the way."""
        match parsed:
            case refs.DemoRef():
                path, sha256 = await in_thread(_demo)
                return await self._register(job, [path], "demo", "demo", expected=[sha256])
            case refs.FileRef():
                paths = await in_thread(lambda: local_files(parsed))
                return await self._register(job, paths, "file", "file")
            case refs.HttpsRef() | refs.HfRef():
                return await wishes.outlasting(
                    lambda: self._from_afar(job, parsed, wishes),
                    job,
                    self._limits,
                    self._clock,
                    self._entropy,
                )

    async def _from_afar(self, job: Job, ref: refs.HttpsRef | refs.HfRef, wishes: Wishes) -> CatalogEntry:
        job.downloading()
        if isinstance(ref, refs.HfRef):
            return await self._from_hub(job, ref, wishes)
        return await self._from_anywhere(job, wishes, Supply([remote_file(ref)], "https", "https"))

    async def _from_hub(self, job: Job, ref: refs.HfRef, wishes: Wishes) -> CatalogEntry:
        if (entry := await self._from_peers(job, wishes, "hf", model_ref=job.model_ref)) is not None:
            return entry
        try:
            supply = await self._resolved(job, ref)
        except ArrieroError as error:
            if error.code not in _UNREACHABLE:
                raise
            # Without a network the Hugging Face cache says which file a reference means.
            seen = await in_thread(lambda: found.by_name(os.environ, Path.home(), ref))
            if seen is None:
                raise
            return await self.enter_found(job, seen)
        return await self._from_anywhere(job, wishes, supply)

    async def _from_anywhere(self, job: Job, wishes: Wishes, supply: Supply) -> CatalogEntry:
        """Return the entry as any peer has it, else from `supply`."""
        # Without checksums a peer is asked by the reference; with them, also for another reference.
        if supply.sha256s:
            entry = await self._from_peers(
                job, wishes, supply.provider, wanted=supply.files,
                revision=supply.revision, projector=supply.projector,
            )  # fmt: skip
        else:
            entry = await self._from_peers(job, wishes, supply.provider, model_ref=job.model_ref)
        return entry or await self._from(job, supply)

    async def _from_peers(
        self, job: Job, wishes: Wishes, provider: str, *, model_ref: str | None = None,
        wanted: Sequence[RemoteFile] = (), revision: str = "", projector: str = "",
    ) -> CatalogEntry | None:  # fmt: skip
        """Return the entry as a peer has it; None where none has it, or all fail."""
        if not wishes.peers:
            return None
        offers = await peers.offers(
            wishes.peers,
            model_ref,
            [file.sha256 for file in wanted if file.sha256 is not None],
            http=self._http,
            names=[file.name for file in wanted],
            on_silent=lambda sentence: job.waiting(sentence, 0.0),
        )
        for offer in offers:
            supply = Supply(
                offer.files,
                provider,
                f"node {offer.node}" if offer.node else "another node",
                revision=revision or offer.revision,
                projector=projector or offer.projector,
            )
            job.wants_peers = False
            await wishes.before_peer(supply.source)
            try:
                return await self._from(job, supply)
            except ArrieroError as error:
                if error.code not in ELSEWHERE:
                    raise
                wishes.lose(job, supply.source, error)
                job.waiting(f"{supply.source}: {error.message}", 0.0)
                job.downloading()
        return None

    async def _resolved(self, job: Job, ref: refs.HfRef) -> Supply:
        retries = Retries(self._limits.retry, self._clock, self._entropy)
        model = await retries.run(
            lambda: self._hub.resolve(ref, self._clock.wall_s()), job, what=f"looking up {ref.repo}"
        )
        return Supply(model.files, "hf", "hub", revision=model.revision, projector=model.projector)

    async def _from(self, job: Job, supply: Supply) -> CatalogEntry:
        content = ",".join(supply.sha256s) or job.model_ref
        folder = partial_folder.path_of(self._catalog.models_dir, content)
        async with self._turn(folder, job):
            if supply.sha256s:
                here = await self._catalog.with_content(supply.sha256s)
                if here is not None and (entry := await self._shared(job, here, supply)) is not None:
                    return entry
                if (entry := await self._found(job, supply)) is not None:
                    return entry
            job.source = supply.source
            return await self._fetch_all(job, supply, folder)

    async def drop(self, job: Job, *, is_all: bool) -> None:
        """Remove what was fetched for a job, unless another one goes on with it already.

        Without `is_all` what has bytes stays: the next one goes on with them.
        """
        folder = job.folder
        if folder is None or folder in self._turns:
            return
        self._turns[folder] = job
        try:
            if is_all or not await in_thread(lambda: partial_folder.has_bytes(folder)):
                await in_thread(lambda: partial_folder.drop(folder))
        finally:
            del self._turns[folder]

    @asynccontextmanager
    async def _turn(self, folder: Path, job: Job) -> AsyncGenerator[None, None]:
        """Wait until nobody else fetches this content, telling what they tell; then be the one."""
        while (other := self._turns.get(folder)) is not None:
            frames = other.frames()
            try:
                async for _, frame in frames:
                    job.source = frame.source
                    job.advance(frame.bytes_downloaded, frame.bytes_total)
                    if frame.stage in DOWNLOADS.final or self._turns.get(folder) is not other:
                        break
            finally:
                await frames.aclose()
        self._turns[folder] = job
        try:
            yield
        finally:
            del self._turns[folder]

    # --- Files that are here already ----------------------------------------------------------

    async def _shared(self, job: Job, here: CatalogEntry, supply: Supply) -> CatalogEntry | None:
        """Enter the files of another entry under the job's reference; None if they cannot be shared."""
        try:
            facts = await asyncio.to_thread(self._inspect, here.path)
        except ArrieroError as error:
            # Damaged, or removed in this moment: what is wrong there is not to be wrong here.
            job.waiting(f"{here.record.model_ref} is here, but {error.message}", 0.0)
            return None
        job.source = "this machine"
        job.advance(here.record.size_bytes, here.record.size_bytes)
        record = make_record(
            model_ref=job.model_ref,
            provider=supply.provider,
            files=here.files,
            facts=facts,
            is_external=here.record.is_external,
            added_unix=self._clock.wall_s(),
            source=here.record.source,
            revision=supply.revision,
            projector=here.record.projector,
        )
        job.verifying()
        if here.record.is_external:
            entry = CatalogEntry(record, here.files, here.paths)
            await self._catalog.add(entry)
            return entry
        folder = partial_folder.path_of(self._catalog.models_dir, f"{job.model_ref}\nlinked")
        try:
            ready = await in_thread(lambda: partial_folder.link(folder, here))
        except OSError:
            await in_thread(lambda: partial_folder.drop(folder))
            job.downloading()
            return None
        entry = await self._catalog.publish(ready, record, here.files)
        await in_thread(lambda: partial_folder.drop(folder))
        return entry

    async def _found(self, job: Job, supply: Supply) -> CatalogEntry | None:
        """Enter what another program keeps here, if it is these very files."""
        sizes = [file.size_bytes for file in supply.files]
        seen = await in_thread(lambda: found.by_content(os.environ, Path.home(), supply.sha256s, sizes))
        if seen is None:
            return None
        try:
            return await self._register(
                job, seen.paths, supply.provider, _described(seen), expected=supply.sha256s,
                revision=supply.revision, projector=seen.projector,
            )  # fmt: skip
        except ArrieroError as error:
            # Not what its name says, or gone meanwhile: then it is fetched.
            job.waiting(f"{seen.source}: {error.message}", 0.0)
            job.downloading()
            return None

    async def enter_found(self, job: Job, seen: found_files.Found) -> CatalogEntry:
        """Enter a model that a scan found, where it lies."""
        provider = "hf" if seen.model_ref.startswith("hf:") else "file"
        return await self._register(
            job, seen.paths, provider, _described(seen), expected=seen.sha256s,
            revision=seen.revision, projector=seen.projector,
        )  # fmt: skip

    async def _register(
        self, job: Job, paths: Sequence[Path], provider: str, source: str, *,
        expected: Sequence[str | None] = (), revision: str = "", projector: str = "",
    ) -> CatalogEntry:  # fmt: skip
        """Enter files where they lie: header read, hashed, never copied."""
        job.downloading()
        job.source = source
        facts = await asyncio.to_thread(self._inspect, paths[0])
        if projector:
            await asyncio.to_thread(gguf.check_projector, paths[-1])
        job.verifying()
        files = []
        try:
            total = sum([(await in_thread(path.stat)).st_size for path in paths])
            before = 0
            for number, path in enumerate(paths):
                file = await self._hashed(job, path, before, total)
                wanted = expected[number] if number < len(expected) else None
                if wanted not in (None, file.sha256):
                    raise ArrieroError(
                        ErrorCode.MODEL_CORRUPTED,
                        f"{file.name} has the checksum {file.sha256[:12]}…, it should be {str(wanted)[:12]}…",
                        file=file.name,
                    )
                before += file.size_bytes
                files.append(file)
        except OSError as error:
            raise ArrieroError(
                ErrorCode.INVALID_MODEL_PATH, f"{paths[0].name} cannot be read: {error.strerror}"
            ) from error
        record = make_record(
            model_ref=job.model_ref,
            provider=provider,
            files=files,
            facts=facts,
            is_external=True,
            added_unix=self._clock.wall_s(),
            source=source,
            revision=revision,
            projector=projector,
        )
        entry = CatalogEntry(record, tuple(files), tuple(paths))
        await self._catalog.add(entry)
        return entry

    async def _hashed(self, job: Job, path: Path, before_bytes: int, total_bytes: int) -> ModelFile:
        before = await in_thread(path.stat)
        job.advance(before_bytes, total_bytes)
        sha256 = await sha256_of(path, lambda read: job.advance(before_bytes + read, total_bytes))
        after = await in_thread(path.stat)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ArrieroError(ErrorCode.MODEL_CORRUPTED, f"{path.name} changed while it was read")
        return ModelFile(
            name=path.name, size_bytes=after.st_size, sha256=sha256, modified_ns=after.st_mtime_ns
        )

    # --- Fetched files ------------------------------------------------------------------------

    async def _fetch_all(self, job: Job, supply: Supply, folder: Path) -> CatalogEntry:
        try:
            await in_thread(lambda: partial_folder.prepare(folder))
        except OSError as error:
            raise disk_error(error, "a download was prepared") from error
        job.folder = folder
        sizes = [remote.size_bytes for remote in supply.files]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        fetched: list[FetchedFile] = []
        for number, remote in enumerate(supply.files, 1):
            watch = _PartWatch(job, sum(file.size_bytes for file in fetched), total)
            later_bytes = sum(later.size_bytes or 0 for later in supply.files[number:])
            fetched.append(await self._fetcher.fetch(remote, folder, watch, later_bytes=later_bytes))
        job.verifying()
        return await self._publish(job, supply, folder, fetched)

    async def _publish(
        self, job: Job, supply: Supply, folder: Path, fetched: list[FetchedFile]
    ) -> CatalogEntry:
        """Read the header, write the card, rename the folder into place, enter it."""
        try:
            ready = await in_thread(lambda: partial_folder.gather(folder, fetched))
            facts = await self._inspect_or_drop(ready, fetched[0].name, supply.projector, folder)
            files = await in_thread(lambda: partial_folder.describe(ready, fetched))
        except OSError as error:
            raise disk_error(error, "a model was put in place") from error
        record = make_record(
            model_ref=job.model_ref,
            provider=supply.provider,
            files=files,
            facts=facts,
            is_external=False,
            added_unix=self._clock.wall_s(),
            source=supply.source,
            revision=supply.revision,
            projector=supply.projector,
        )
        entry = await self._catalog.publish(ready, record, files)
        await in_thread(lambda: partial_folder.drop(folder))
        return entry

    async def _inspect_or_drop(self, ready: Path, name: str, projector: str, folder: Path) -> ModelFacts:
        try:
            if projector:
                await asyncio.to_thread(gguf.check_projector, ready / projector)
            return await asyncio.to_thread(self._inspect, ready / name)
        except ArrieroError:
            # All bytes are as the source has them, and they are no model: going on is of no use.
            await in_thread(lambda: partial_folder.drop(folder))
            raise


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


def _demo() -> tuple[Path, str]:
    return demo_model.path().resolve(), demo_model.SHA256


def _described(seen: found_files.Found) -> str:
    """Return where a model was found, for people: "ollama llama3.2:3b"."""
    return f"{seen.source} {seen.name}"
