"""Do several connections bring one file whole, whatever a server does to some of them?

Method: the real fetcher against a real server with scripted faults; small parts, so that a megabyte
is a large file.  The first answer is held until the others were asked for, so that they overlap.
"""

import asyncio
import dataclasses
import hashlib
import itertools
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from tests.integration.model_files import gguf, sha256, small_limits

from arriero.agent.budget import Budget
from arriero.agent.fetch import FetchedFile, Fetcher, FetchLimits, RemoteFile
from arriero.agent.retries import RetryLimits
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.domain.parts import Run
from arriero.runtime.clock import Clock, SystemClock
from arriero.runtime.entropy import SeededEntropy
from arriero.testing.fault_server import Answer, FaultServer

KIB = 1024
PART_BYTES = 16 * KIB
SIZE_BYTES = 1_000_000
CONTENT = gguf(3, SIZE_BYTES)
OTHER = gguf(4, SIZE_BYTES)
HELD = Answer(hold_after=10_000)
LIMITS = dataclasses.replace(
    small_limits(attempts=3).fetch,
    part_bytes=PART_BYTES,
    range_bytes=4 * PART_BYTES,
    connections=4,
)


class NotingClock(SystemClock):
    """A real clock that notes who sleeps."""

    def __init__(self) -> None:
        self.sleeps_s: list[float] = []

    async def sleep_s(self, seconds: float) -> None:
        self.sleeps_s.append(seconds)
        await super().sleep_s(seconds)


class Watch:
    """Notes what a fetch tells."""

    def __init__(self) -> None:
        self.attempts: list[int] = []
        self.reasons: list[str] = []
        self.counts: list[int] = []
        self.stages: list[str] = []
        self.has_bytes = asyncio.Event()

    def attempting(self, attempt: int) -> None:
        self.attempts.append(attempt)

    def waiting(self, reason: str, delay_s: float) -> None:
        self.reasons.append(reason)

    def downloading(self) -> None:
        self.stages.append("downloading")

    def verifying(self) -> None:
        self.stages.append("verifying")

    def advance(self, downloaded_bytes: int, total_bytes: int | None) -> None:
        self.counts.append(downloaded_bytes)
        if downloaded_bytes:
            self.has_bytes.set()


@asynccontextmanager
async def fetcher(
    limits: FetchLimits = LIMITS, *, clock: Clock | None = None, budget: Budget | None = None
) -> AsyncGenerator[Fetcher, None]:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        yield Fetcher(session, clock or SystemClock(), SeededEntropy(2), limits, budget)


async def fetch(
    server: FaultServer,
    folder: Path,
    watch: Watch | None = None,
    *,
    requests_before_going_on: int = 1,
    content: bytes = CONTENT,
    remote: RemoteFile | None = None,
    limits: FetchLimits = LIMITS,
    clock: Clock | None = None,
) -> FetchedFile:
    """Fetch the file and compare it; held answers go on once so many requests have come."""
    asked = remote or RemoteFile("m.gguf", f"{server.url}/m.gguf")
    async with fetcher(limits, clock=clock) as fetching, asyncio.timeout(60), asyncio.TaskGroup() as group:
        task = group.create_task(fetching.fetch(asked, folder, watch or Watch()))
        enough = group.create_task(server.asked(requests_before_going_on))
        await asyncio.wait({task, enough}, return_when=asyncio.FIRST_COMPLETED)
        enough.cancel()
        server.go_on.set()
    file = task.result()
    assert file.path.read_bytes() == content and file.sha256 == sha256(content)
    return file


async def test_a_large_file_comes_in_ranges_that_do_not_overlap(tmp_path: Path) -> None:
    async with FaultServer(CONTENT, [HELD, Answer()]) as server:
        watch = Watch()
        file = await fetch(server, tmp_path, watch, requests_before_going_on=4)
        assert file.size_bytes == watch.counts[-1] and watch.attempts == [1]
        ranges = []
        for request in server.requests:
            assert request.range is not None
            start, end = request.range.removeprefix("bytes=").split("-")
            ranges.append(Run(int(start), int(end) + 1 if end else SIZE_BYTES))
        ranges.sort()
        assert ranges[0].start == 0 and ranges[-1].end == SIZE_BYTES and len(ranges) > 8
        assert all(before.end == after.start for before, after in itertools.pairwise(ranges))
        assert {request.headers["If-Range"] for request in server.requests[1:]} == {'"one"'}


async def test_a_source_that_tells_size_and_checksum_needs_no_etag(tmp_path: Path) -> None:
    async with FaultServer(CONTENT, [Answer(etag="", hold_after=10_000), Answer(etag="")]) as server:
        remote = RemoteFile("m.gguf", f"{server.url}/m.gguf", SIZE_BYTES, sha256(CONTENT))
        await fetch(server, tmp_path, requests_before_going_on=4, remote=remote)
        assert server.requests[0].range == f"bytes=0-{4 * PART_BYTES - 1}"


async def test_without_a_proof_one_connection_asks_for_all(tmp_path: Path) -> None:
    async with FaultServer(CONTENT, [Answer(etag="")]) as server:
        watch = Watch()
        await fetch(server, tmp_path, watch)
        assert [request.range for request in server.requests] == [f"bytes=0-{4 * PART_BYTES - 1}", None]
        assert watch.attempts == [1]


@pytest.mark.parametrize(
    "refusal",
    [
        Answer(status=429, headers={"Retry-After": "200"}),
        Answer(status=503),
        Answer(status=403),
        Answer(cut_after=0, has_length=False),
        Answer(ignores_range=True),
    ],
    ids=["429", "503", "403", "cut", "whole"],
)
async def test_a_server_that_bears_one_connection_gets_one(tmp_path: Path, refusal: Answer) -> None:
    async with FaultServer(CONTENT, [HELD, refusal, refusal, refusal, Answer()]) as server:
        watch = Watch()
        await fetch(server, tmp_path, watch, requests_before_going_on=4)
        assert watch.attempts == [1] and watch.reasons == []


async def test_a_server_that_bears_two_is_not_asked_for_more_again_and_again(tmp_path: Path) -> None:
    async with FaultServer(CONTENT, [HELD, HELD, Answer()], answering_max=2) as server:
        watch, clock = Watch(), NotingClock()
        await fetch(server, tmp_path, watch, requests_before_going_on=4, clock=clock)
        assert watch.attempts == [1] and server.refused == 2
        assert clock.sleeps_s == [], "nobody waits to ask again"


async def test_a_connection_that_is_cut_beside_others_is_no_attempt(tmp_path: Path) -> None:
    cut = Answer(cut_after=5_000)
    async with FaultServer(CONTENT, [HELD, cut, cut, cut, cut, cut, Answer()]) as server:
        watch = Watch()
        await fetch(server, tmp_path, watch, requests_before_going_on=6)
        assert watch.attempts == [1] and watch.reasons == []


async def test_all_that_fail_at_the_same_moment_are_one_attempt(tmp_path: Path) -> None:
    held_and_cut = Answer(hold_after=3_000, cut_after=20_000)
    limits = dataclasses.replace(LIMITS, retry=RetryLimits(attempts=2, base_s=0.1, cap_s=0.1))
    async with FaultServer(CONTENT, [held_and_cut] * 4 + [Answer()]) as server:
        watch = Watch()
        await fetch(server, tmp_path, watch, requests_before_going_on=4, limits=limits)
        # None at all if one came back before the last had failed.
        assert len(watch.reasons) <= 1


async def test_a_mute_connection_is_dropped_and_its_range_asked_for_again(tmp_path: Path) -> None:
    stalling = Answer(stall_after=1_000)
    async with FaultServer(CONTENT, [HELD, Answer(), stalling, Answer()]) as server:
        watch = Watch()
        limits = dataclasses.replace(LIMITS, stall_s=1.0)
        await fetch(server, tmp_path, watch, requests_before_going_on=4, limits=limits)
        assert watch.counts[-1] == SIZE_BYTES
        assert len(watch.reasons) <= 1  # None if others were still at work, one if it was the last.
        assert all("no byte" in reason for reason in watch.reasons)


@pytest.mark.parametrize("is_lying", [False, True])
async def test_a_file_that_changes_under_way_is_fetched_anew_and_never_mixed(
    tmp_path: Path, is_lying: bool
) -> None:
    new = Answer(content=OTHER, etag='"two"')
    # A server that honours If-Range sends the new file whole; a lying one a part of it.
    changed = Answer(content=OTHER, etag='"two"', ignores_if_range=is_lying)
    async with FaultServer(CONTENT, [HELD, Answer(), changed, new]) as server:
        watch = Watch()
        await fetch(server, tmp_path, watch, requests_before_going_on=4, content=OTHER)
        assert watch.attempts[-1] == 2 and "changed" in watch.reasons[0]
        assert 0 in watch.counts


@pytest.mark.parametrize(
    "wrong",
    [
        Answer(content=CONTENT[:500_000]),
        Answer(content=CONTENT + b"more"),
        Answer(status=416, content_range="bytes */5"),
    ],
    ids=["shorter", "longer", "416"],
)
async def test_another_length_under_way_means_from_the_start(tmp_path: Path, wrong: Answer) -> None:
    async with FaultServer(CONTENT, [HELD, wrong, Answer()]) as server:
        watch = Watch()
        await fetch(server, tmp_path, watch, requests_before_going_on=2)
        assert len(watch.reasons) == 1 and 0 in watch.counts


@pytest.mark.parametrize(
    "nonsense",
    [
        Answer(is_gzipped=True, has_length=False),
        Answer(content_range="bytes 0-9/1000000"),
        Answer(claimed_length=7),
        Answer(status=204),
    ],
    ids=["gzip", "range", "length", "204"],
)
async def test_nonsense_on_one_connection_stops_nothing(tmp_path: Path, nonsense: Answer) -> None:
    async with FaultServer(CONTENT, [HELD, nonsense, Answer()]) as server:
        watch = Watch()
        await fetch(server, tmp_path, watch, requests_before_going_on=4)
        assert watch.reasons == []


async def test_a_server_of_http_1_0_that_closes_is_understood(tmp_path: Path) -> None:
    old = Answer(http_version="1.0", has_length=False, ignores_range=True, etag="")
    async with FaultServer(CONTENT, [old]) as server:
        file = await fetch(server, tmp_path)
        assert file.size_bytes == SIZE_BYTES and len(server.requests) == 1


async def test_a_signed_address_that_runs_out_is_looked_up_again(tmp_path: Path) -> None:
    """The file redirects to another host name; the token stays at home."""
    expired = Answer(status=403)
    async with FaultServer(
        CONTENT, [HELD, Answer(), Answer(), Answer(), Answer(), expired, Answer()]
    ) as store:
        location = {"Location": store.url.replace("127.0.0.1", "localhost") + "/signed?x=a%2Fb"}
        async with FaultServer(b"", [Answer(status=302, headers=location)]) as front:
            watch = Watch()
            remote = RemoteFile("m.gguf", f"{front.url}/m.gguf", token="hf_notASecret")
            store.go_on.set()
            await fetch(front, tmp_path, watch, remote=remote)
        assert watch.attempts == [1]
        assert len(front.requests) == 2 < len(store.requests)
        assert all("Authorization" in request.headers for request in front.requests)
        assert not any("Authorization" in request.headers for request in store.requests)
        assert {request.target for request in store.requests} == {"/signed?x=a%2Fb"}


async def test_a_head_that_trickles_in_is_a_timeout(tmp_path: Path) -> None:
    limits = dataclasses.replace(LIMITS, connect_s=0.1, stall_s=0.1)
    async with FaultServer(CONTENT, [Answer(is_trickling=True)]) as server, fetcher(limits) as fetching:
        with pytest.raises(ArrieroError) as failed:
            await fetching.fetch(RemoteFile("m.gguf", f"{server.url}/m.gguf"), tmp_path, Watch())
        assert failed.value.code is ErrorCode.DOWNLOAD_TIMEOUT
        assert len(failed.value.details["attempts"]) == 3


# --- What is on the disk ---------------------------------------------------------------------


async def _begun(server: FaultServer, folder: Path) -> None:
    """Fetch until the server's answers are over; what came is kept."""
    async with fetcher(dataclasses.replace(LIMITS, connections=1)) as fetching:
        with pytest.raises(ArrieroError):
            await fetching.fetch(RemoteFile("m.gguf", f"{server.url}/m.gguf"), folder, Watch())


async def test_only_a_damaged_part_is_fetched_again(tmp_path: Path) -> None:
    """As after a power cut: the journal tells of bytes that never came to the disk."""
    answers = [Answer(cut_after=60_000), Answer(cut_after=540_000), Answer(status=503), Answer()]
    async with FaultServer(CONTENT, answers) as server:
        await _begun(server, tmp_path)
        part = tmp_path / "m.gguf.part"
        content = bytearray(part.read_bytes())
        assert len(content) == 600_000
        content[5 * PART_BYTES + 7] ^= 1
        part.write_bytes(content)
        watch = Watch()
        await fetch(server, tmp_path, watch)
        ranges = [request.range for request in server.requests[3:]]
        assert ranges[0] == f"bytes={5 * PART_BYTES}-{6 * PART_BYTES - 1}"
        assert [asked for asked in ranges if asked and asked.startswith("bytes=600000-")]
        assert 600_000 - PART_BYTES in watch.counts
        assert watch.stages[0] == "verifying" and "downloading" in watch.stages


async def test_a_journal_of_another_file_or_of_nonsense_counts_for_nothing(tmp_path: Path) -> None:
    for journal in (b"", b"\0" * 5000, b'{"mark":{},"part_bytes":0}\n0 5 1\n', b"{}\n", b"\xff" * 100):
        (tmp_path / "m.gguf.part").write_bytes(b"x" * 2_000_000)
        (tmp_path / "m.gguf.journal").write_bytes(journal)
        async with FaultServer(CONTENT) as server:
            await fetch(server, tmp_path)


async def test_a_part_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    folder = tmp_path / "partial"
    folder.mkdir()
    (folder / "m.gguf.part").symlink_to(outside)
    async with FaultServer(CONTENT) as server, fetcher() as fetching:
        with pytest.raises(ArrieroError) as failed:
            await fetching.fetch(RemoteFile("m.gguf", f"{server.url}/m.gguf"), folder, Watch())
    assert failed.value.code is ErrorCode.STATE_DIR_UNUSABLE and outside.read_bytes() == b"precious"


async def test_the_room_of_other_downloads_counts_as_taken(tmp_path: Path) -> None:
    """Two files of which either has room; not both.  The second is refused before its bytes come."""
    claimed = int(shutil.disk_usage(tmp_path).free * 0.6)
    huge = Answer(content_range=f"bytes 0-{4 * PART_BYTES - 1}/{claimed}", stall_after=5_000)
    limits = dataclasses.replace(LIMITS, connections=1)
    budget = Budget(SystemClock())
    async with FaultServer(CONTENT, [huge]) as server, fetcher(limits, budget=budget) as fetching:
        remotes = [RemoteFile(name, f"{server.url}/{name}") for name in ("a.gguf", "b.gguf")]
        async with asyncio.TaskGroup() as group:
            first = group.create_task(fetching.fetch(remotes[0], tmp_path, Watch()))
            await server.is_stalling.wait()
            with pytest.raises(ArrieroError) as failed:
                await fetching.fetch(remotes[1], tmp_path, Watch())
            first.cancel()
            await asyncio.wait({first})
            # The room is free again.
            server.is_stalling.clear()
            second = group.create_task(fetching.fetch(remotes[1], tmp_path, Watch()))
            await server.is_stalling.wait()
            second.cancel()
    assert failed.value.code is ErrorCode.INSUFFICIENT_DISK and "other downloads" in failed.value.message
    short_mb = failed.value.details["required_mb"] - failed.value.details["available_mb"]
    assert abs(failed.value.details["shortfall_mb"] - short_mb) <= 1


async def test_room_that_shrinks_under_way_is_noticed_and_what_came_is_kept(tmp_path: Path) -> None:
    budget = Budget(SystemClock())
    older = budget.reserve(tmp_path)
    limits = dataclasses.replace(LIMITS, room_bytes=PART_BYTES, connections=1)
    async with FaultServer(CONTENT, [Answer(hold_after=5_000)]) as server:
        remote, watch = RemoteFile("m.gguf", f"{server.url}/m.gguf"), Watch()

        async def shrink() -> None:
            await watch.has_bytes.wait()
            older.note(2 * shutil.disk_usage(tmp_path).free)
            server.go_on.set()

        async with fetcher(limits, budget=budget) as fetching, asyncio.TaskGroup() as group:
            group.create_task(shrink())
            with pytest.raises(ArrieroError) as failed:
                await fetching.fetch(remote, tmp_path, watch)
        assert failed.value.code is ErrorCode.INSUFFICIENT_DISK
        assert 0 < (tmp_path / "m.gguf.part").stat().st_size < SIZE_BYTES
        older.release()
        await fetch(server, tmp_path)
        assert server.requests[-1].range != f"bytes=0-{4 * PART_BYTES - 1}"


# --- Time ------------------------------------------------------------------------------------


class _LeapingClock(SystemClock):
    """The wall clock jumps with every look; waits pass at once, and count as time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._jumps = 0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        self._jumps += 1
        return 1e9 if self._jumps % 2 else -1e9

    async def sleep_s(self, seconds: float) -> None:
        assert 0 <= seconds <= 300, seconds
        self.now_s += seconds
        await asyncio.sleep(0)


async def test_a_wall_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    date = {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}
    answers = [Answer(cut_after=5_000), Answer(status=503, headers=date), Answer()]
    async with FaultServer(CONTENT, answers) as server, fetcher(clock=_LeapingClock()) as fetching:
        file = await fetching.fetch(RemoteFile("m.gguf", f"{server.url}/m.gguf"), tmp_path, Watch())
        assert file.sha256 == hashlib.sha256(CONTENT).hexdigest()


async def test_the_cap_holds_for_all_downloads_together(tmp_path: Path) -> None:
    clock, rate = _LeapingClock(), 100_000.0
    async with FaultServer(CONTENT) as server, fetcher(clock=clock, budget=Budget(clock, rate)) as fetching:
        async with asyncio.TaskGroup() as group:
            for name in ("a.gguf", "b.gguf"):
                remote = RemoteFile(name, f"{server.url}/{name}")
                group.create_task(fetching.fetch(remote, tmp_path, Watch()))
    assert clock.now_s >= (2 * SIZE_BYTES - rate) / rate
