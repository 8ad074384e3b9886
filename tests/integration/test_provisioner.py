"""Does a reference become verified files, once, seen by all, and cancelled without a trace?

Method: the real huggingface_hub client against a tiny Hub on loopback, real files, a real full disk.
"""

import asyncio
import dataclasses
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tests.integration.model_files import SIZE_BYTES, Kit, gguf, kit_in, sha256, small_limits

from arriero import demo_model
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import DownloadFrame
from arriero.contracts.records import ModelRecord
from arriero.contracts.states import DownloadState
from arriero.domain.download_states import DOWNLOADS
from arriero.engines import gguf as gguf_format
from arriero.testing.fault_server import Answer, FaultServer
from arriero.testing.gguf_writer import write_llama
from arriero.testing.hub import HubServer

TOKEN = "hf_notASecret"


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


async def _refused(kit: Kit, ref: str) -> ArrieroError:
    with pytest.raises(ArrieroError) as refused:
        await kit.provisioner.ensure(ref)
    assert TOKEN not in f"{refused.value} {refused.value.details}"
    return refused.value


# --- The Hub ---------------------------------------------------------------------------------


async def test_a_quantisation_comes_from_the_hub(tmp_path: Path) -> None:
    content = gguf()
    async with HubServer() as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/r", {"README.md": b"hello", "m-Q8_0.gguf": gguf(2), "m-Q4_K_M.gguf": content})
        record, path = await kit.provisioner.ensure("hf:o/r:q4_k_m")
        assert path.name == "m-Q4_K_M.gguf" and path.read_bytes() == content
        assert (record.provider, record.sha256, record.files) == ("hf", sha256(content), ["m-Q4_K_M.gguf"])
        assert hub.requests[1] == f"GET /o/r/resolve/{hub.repos['o/r'].commit}/m-Q4_K_M.gguf"

        before = len(hub.requests)
        assert (await kit.provisioner.ensure("hf:o/r:q4_k_m"))[0].model_id == record.model_id
        assert len(hub.requests) == before


async def test_all_parts_of_a_split_model_come(tmp_path: Path) -> None:
    parts = {f"Q8_0/m-{part:05d}-of-00003.gguf": gguf(part, 50_000 * part) for part in (1, 2, 3)}
    async with HubServer() as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/r", parts)
        started = kit.provisioner.start("hf:o/r")
        frames = [frame async for _, frame in kit.provisioner.frames(started.download_id)]
        record, path = await kit.provisioner.wait(started.download_id)
        assert path.name == "m-00001-of-00003.gguf" and record.size_bytes == 300_000
        assert [(path.parent / name).read_bytes() for name in record.files] == list(parts.values())
        assert frames[-1].bytes_downloaded == frames[-1].bytes_total == 300_000
        assert {frame.bytes_total for frame in frames} <= {None, 300_000}
        counts = [frame.bytes_downloaded for frame in frames]
        assert counts == sorted(counts)


async def test_an_unknown_quantisation_is_told_with_those_there_are(tmp_path: Path) -> None:
    async with HubServer() as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/r", {"m-Q8_0.gguf": gguf(), "m-Q2_K.gguf": gguf()})
        error = await _refused(kit, "hf:o/r:Q5_K_M")
        assert error.code is ErrorCode.MODEL_NOT_FOUND
        assert error.details["available"] == ["Q2_K", "Q8_0"]


@pytest.mark.parametrize("ref", ["hf:o/nothing", "hf:o/r/x.gguf", "hf:o/r@nowhere"])
async def test_what_the_hub_does_not_have_is_not_found(tmp_path: Path, ref: str) -> None:
    async with HubServer() as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/r", {"m-Q8_0.gguf": gguf()})
        assert (await _refused(kit, ref)).code is ErrorCode.MODEL_NOT_FOUND


async def test_a_gated_repository_needs_the_token_and_it_stays_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with HubServer(token=TOKEN) as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/gated", {"m-Q8_0.gguf": gguf()}, gated=True)
        error = await _refused(kit, "hf:o/gated")
        assert error.code is ErrorCode.MODEL_ACCESS_DENIED
        assert "HF_TOKEN" in str(error.body().details["suggested_action"])

        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        assert (await _refused(kit, "hf:o/gated")).code is ErrorCode.MODEL_ACCESS_DENIED

        monkeypatch.setenv("HF_TOKEN", TOKEN)
        await kit.provisioner.ensure("hf:o/gated")
        assert hub.leaked == []


async def test_a_private_repository_is_found_with_the_token_of_the_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with HubServer(token=TOKEN) as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/private", {"m-Q8_0.gguf": gguf()}, private=True)
        error = await _refused(kit, "hf:o/private")
        assert error.code is ErrorCode.MODEL_NOT_FOUND and "HF_TOKEN" in error.message

        (tmp_path / "token").write_text(TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        await kit.provisioner.ensure("hf:o/private")


async def test_no_hub_at_the_address_is_told(tmp_path: Path) -> None:
    async with HubServer() as hub:
        url = hub.url
    async with kit_in(tmp_path, hf_endpoint=url) as kit:
        error = await _refused(kit, "hf:o/r")
    assert error.code is ErrorCode.DOWNLOAD_FAILED
    assert len(error.details["attempts"]) == 3


async def test_a_tired_hub_is_asked_again(tmp_path: Path) -> None:
    async with (
        FaultServer(b"", [Answer(status=503)]) as server,
        kit_in(tmp_path, hf_endpoint=server.url) as kit,
    ):
        error = await _refused(kit, "hf:o/r")
        assert error.code is ErrorCode.DOWNLOAD_FAILED and "503" in error.message
        assert len(server.requests) == 3


async def _cancelled_midway(kit: Kit, ref: str) -> None:
    download_id = kit.provisioner.start(ref).download_id
    async for _, frame in kit.provisioner.frames(download_id):
        if frame.bytes_downloaded > 0:
            break
    await kit.provisioner.cancel(download_id)


async def test_a_hub_download_is_gone_on_with_by_its_checksum(tmp_path: Path) -> None:
    async with HubServer(rate_bytes_per_s=2_000_000) as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/r", {"m-Q8_0.gguf": gguf()})
        await _cancelled_midway(kit, "hf:o/r")
        (part,) = (kit.models_dir / file for file in kit.files() if file.endswith(".part"))
        kept = len(part.read_bytes())
        assert 0 < kept < SIZE_BYTES
        _, path = await kit.provisioner.ensure("hf:o/r")
        assert path.read_bytes() == gguf()
        assert hub.ranges == [None, f"bytes={kept}-"]


async def test_a_repository_that_moved_on_is_fetched_from_the_start(tmp_path: Path) -> None:
    async with HubServer(rate_bytes_per_s=2_000_000) as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/r", {"m-Q8_0.gguf": gguf()})
        await _cancelled_midway(kit, "hf:o/r")
        hub.add("o/r", {"m-Q8_0.gguf": gguf(2)})
        _, path = await kit.provisioner.ensure("hf:o/r")
        assert path.read_bytes() == gguf(2)


async def test_the_real_header_is_read_and_a_truncated_file_refused(tmp_path: Path) -> None:
    whole = write_llama(tmp_path / "tiny.gguf").read_bytes()
    async with HubServer() as hub, kit_in(tmp_path, hf_endpoint=hub.url, inspect=gguf_format.inspect) as kit:
        hub.add("o/whole", {"tiny.gguf": whole})
        record, _ = await kit.provisioner.ensure("hf:o/whole")
        assert record.architecture == "llama" and record.block_count > 0 and record.parameters > 0
        hub.add("o/short", {"tiny.gguf": whole[:-1000]})
        assert (await _refused(kit, "hf:o/short")).code is ErrorCode.MODEL_CORRUPTED
        assert len(await kit.catalog.records()) == 1


# --- Files that are there already ------------------------------------------------------------


async def test_a_local_file_stays_where_it_is(tmp_path: Path) -> None:
    own = tmp_path / "my models" / "m.gguf"
    own.parent.mkdir()
    own.write_bytes(gguf())
    async with kit_in(tmp_path) as kit:
        record, path = await kit.provisioner.ensure(f"file://{own}")
        assert path == own and record.is_external and record.sha256 == sha256(gguf())
        assert kit.files() == []
        await kit.catalog.remove(record.model_id)
        assert own.exists() and await kit.catalog.records() == []


async def test_all_parts_of_a_local_model_are_verified(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-{part:05d}-of-00002.gguf" for part in (1, 2)]
    for number, part in enumerate(parts):
        part.write_bytes(gguf(number))
    async with kit_in(tmp_path) as kit:
        ref = f"file://{parts[0]}"
        record, path = await kit.provisioner.ensure(ref)
        assert path == parts[0] and record.files == [part.name for part in parts]
        assert record.size_bytes == 2 * SIZE_BYTES
        # The engine reads them all: a part that changed is read again.
        parts[1].write_bytes(gguf(3))
        again, _ = await kit.provisioner.ensure(ref)
        assert again.parts[1].sha256 == sha256(gguf(3)) != record.parts[1].sha256

        parts[1].unlink()
        alone, _ = await kit.provisioner.ensure(ref)
        assert alone.files == [parts[0].name], "whether parts are missing, the header knows"


async def test_the_demo_model_is_there_without_a_network(tmp_path: Path) -> None:
    async with kit_in(tmp_path, inspect=gguf_format.inspect) as kit:
        record, path = await kit.provisioner.ensure("demo")
        assert (record.provider, record.is_external) == ("demo", True)
        assert (record.sha256, record.size_bytes) == (demo_model.SHA256, demo_model.SIZE_BYTES)
        assert path.is_absolute() and record.has_chat_template
        await kit.catalog.remove(record.model_id)
        assert (await kit.provisioner.ensure("demo"))[1] == path


async def test_a_local_file_that_changed_is_read_again(tmp_path: Path) -> None:
    own = tmp_path / "m.gguf"
    own.write_bytes(gguf())
    async with kit_in(tmp_path) as kit:
        first, _ = await kit.provisioner.ensure(f"file://{own}")
        own.write_bytes(gguf(2))
        os.utime(own, ns=(1, 1))
        second, _ = await kit.provisioner.ensure(f"file://{own}")
        assert first.sha256 != second.sha256 == sha256(gguf(2))
        assert len(await kit.catalog.records()) == 1


async def test_paths_that_lead_to_no_file_are_told(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "broken.gguf").symlink_to(tmp_path / "nothing")
    (tmp_path / "weights.bin").write_bytes(b"\x80\x04")
    (tmp_path / "text.gguf").write_text("hello")
    async with kit_in(tmp_path) as kit:
        for name, why in {
            "nothing.gguf": "does not exist",
            "folder": "is a folder",
            "pipe.gguf": "is no regular file",
            "broken.gguf": "does not exist",
            "x" * 300: "cannot be looked at",
        }.items():
            error = await _refused(kit, f"file://{tmp_path}/{name}")
            assert error.code is ErrorCode.INVALID_MODEL_PATH and why in error.message
            assert str(tmp_path) not in f"{error} {error.details}"
        assert (
            await _refused(kit, f"file://{tmp_path}/weights.bin")
        ).code is ErrorCode.INVALID_MODEL_REFERENCE
        assert (await _refused(kit, f"file://{tmp_path}/text.gguf")).code is ErrorCode.MODEL_CORRUPTED


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
async def test_a_file_without_rights_is_told(tmp_path: Path) -> None:
    (tmp_path / "secret.gguf").write_bytes(gguf())
    (tmp_path / "secret.gguf").chmod(0)
    async with kit_in(tmp_path) as kit:
        error = await _refused(kit, f"file://{tmp_path}/secret.gguf")
    assert error.code is ErrorCode.INVALID_MODEL_PATH and "may not be read" in error.message


async def test_nonsense_is_refused_before_anything_begins(tmp_path: Path) -> None:
    async with kit_in(tmp_path) as kit:
        with pytest.raises(ArrieroError) as refused:
            kit.provisioner.start("ftp://host/m.gguf")
        assert refused.value.code is ErrorCode.INVALID_MODEL_REFERENCE
        assert kit.provisioner.records() == []


# --- Downloads as others see them ------------------------------------------------------------


async def test_simultaneous_requests_share_one_download(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        results: list[tuple[ModelRecord, Path]] = []

        async def ask() -> None:
            results.append(await kit.provisioner.ensure(f"{server.url}/m.gguf"))

        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(ask())
        assert len({record.model_id for record, _ in results}) == 1 and len(results) == 10
        assert len(server.requests) == 1 and len(kit.provisioner.records()) == 1


async def test_frames_tell_the_way_and_every_reader_sees_the_end(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        download_id = kit.provisioner.start(f"{server.url}/m.gguf").download_id
        seen: list[list[DownloadFrame]] = []

        async def read() -> None:
            seen.append([frame async for _, frame in kit.provisioner.frames(download_id)])

        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(read())
        _, path = await kit.provisioner.wait(download_id)
        for frames in seen:
            stages = list(dict.fromkeys(frame.stage for frame in frames))
            assert stages[0] is DownloadState.QUEUED and stages[-1] is DownloadState.COMPLETE
            assert frames[-1].local_path == str(path)
        late = [frame async for _, frame in kit.provisioner.frames(download_id)]
        assert [frame.stage for frame in late] == [DownloadState.COMPLETE]
        wire = msgspec.json.decode(msgspec.json.encode(late[0]))
        assert {
            "stage",
            "bytes_downloaded",
            "bytes_total",
            "speed_mbps",
            "eta_s",
            "local_path",
        } <= wire.keys()


async def test_changes_follow_the_arrows(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        await kit.provisioner.ensure(f"{server.url}/m.gguf")
        states = [change.state for change in kit.changes]
        for before, after in itertools.pairwise(states):
            assert before == after or after in DOWNLOADS.arrows[before]
        assert states[-1] is DownloadState.COMPLETE


async def test_a_failed_download_keeps_its_error_and_can_be_started_again(tmp_path: Path) -> None:
    async with FaultServer(gguf(), [Answer(status=404), Answer()]) as server, kit_in(tmp_path) as kit:
        ref = f"{server.url}/m.gguf"
        await _refused(kit, ref)
        (record,) = kit.provisioner.records()
        assert record.state is DownloadState.FAILED and record.error is not None
        assert record.error.code == "MODEL_NOT_FOUND"
        await kit.provisioner.ensure(ref)
        assert [r.state for r in kit.provisioner.records()] == [DownloadState.COMPLETE, DownloadState.FAILED]


async def test_who_comes_in_the_moment_of_a_failure_begins_anew(tmp_path: Path) -> None:
    async with FaultServer(gguf(), [Answer(status=404), Answer()]) as server, kit_in(tmp_path) as kit:
        ref = f"{server.url}/m.gguf"
        first = kit.provisioner.start(ref)
        with pytest.raises(ArrieroError):
            await kit.provisioner.wait(first.download_id)
        # Nothing was waited for since: the failed one may still be tidying up.
        second = kit.provisioner.start(ref)
        assert second.download_id != first.download_id
        await kit.provisioner.wait(second.download_id)


async def test_a_cancelled_download_stops_and_is_gone_on_with_later(tmp_path: Path) -> None:
    answers = [Answer(stall_after=100_000), Answer()]
    limits = small_limits()
    async with FaultServer(gguf(), answers) as server, kit_in(tmp_path, limits=limits) as kit:
        ref = f"{server.url}/m.gguf"
        download_id = kit.provisioner.start(ref).download_id
        async for _, frame in kit.provisioner.frames(download_id):
            if frame.bytes_downloaded == 100_000:
                break
        record = await kit.provisioner.cancel(download_id)
        assert record.state is DownloadState.CANCELLED
        assert await kit.provisioner.cancel(download_id) == record
        with pytest.raises(ArrieroError) as cancelled:
            await kit.provisioner.wait(download_id)
        assert cancelled.value.code is ErrorCode.REQUEST_CANCELLED
        assert not [task for task in asyncio.all_tasks() if task.get_name() == f"download-{download_id}"]

        _, path = await kit.provisioner.ensure(ref)
        assert path.read_bytes() == gguf() and server.requests[-1].range == "bytes=100000-"


async def test_a_download_cancelled_before_its_first_step_is_cancelled(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        download_id = kit.provisioner.start(f"{server.url}/m.gguf").download_id
        record = await kit.provisioner.cancel(download_id)
        assert record.state is DownloadState.CANCELLED and server.requests == []


async def test_leaving_cancels_what_runs(tmp_path: Path) -> None:
    limits = small_limits()
    async with FaultServer(gguf(), [Answer(is_mute=True)]) as server:
        async with kit_in(tmp_path, limits=limits) as kit:
            kit.provisioner.start(f"{server.url}/m.gguf")
            await server.is_stalling.wait()
        assert kit.changes[-1].state is DownloadState.CANCELLED
        with pytest.raises(ArrieroError) as refused:
            kit.provisioner.start("demo")
        assert refused.value.code is ErrorCode.NOT_RUNNING


async def test_an_unknown_download_is_not_found(tmp_path: Path) -> None:
    async with kit_in(tmp_path) as kit:
        for ask in (kit.provisioner.record, kit.provisioner.frames):
            with pytest.raises(ArrieroError) as refused:
                ask("d-000000000000")
            assert refused.value.code is ErrorCode.NOT_FOUND


async def test_more_downloads_than_allowed_wait_their_turn(tmp_path: Path) -> None:
    limits = dataclasses.replace(small_limits(), downloads_max=1)
    async with (
        FaultServer(gguf(), [Answer(is_mute=True), Answer()]) as server,
        kit_in(tmp_path, limits=limits) as kit,
    ):
        first = kit.provisioner.start(f"{server.url}/a.gguf")
        await server.is_stalling.wait()
        second = kit.provisioner.start(f"{server.url}/b.gguf")
        assert kit.provisioner.record(second.download_id).state is DownloadState.QUEUED
        await kit.provisioner.cancel(first.download_id)
        await kit.provisioner.wait(second.download_id)


# --- Room ------------------------------------------------------------------------------------


async def test_too_little_room_is_told_before_a_byte_is_asked_for(tmp_path: Path) -> None:
    async with HubServer() as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        repo = hub.add("o/r", {"m-Q8_0.gguf": gguf()})
        repo.claimed_sizes["m-Q8_0.gguf"] = 2**60
        error = await _refused(kit, "hf:o/r")
        assert error.code is ErrorCode.INSUFFICIENT_DISK and hub.bytes_sent == 0
        assert error.details["required_mb"] == 2**40
        short_mb = error.details["required_mb"] - error.details["available_mb"]
        assert abs(error.details["shortfall_mb"] - short_mb) <= 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no mount here: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def _enlarge(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=2m", str(folder)], check=True)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
async def test_a_disk_that_fills_up_is_told_and_the_part_is_kept(tmp_path: Path, small_disk: Path) -> None:
    # Without a length nobody can know beforehand.
    answers = [Answer(has_length=False, ignores_range=True), Answer()]
    async with FaultServer(gguf(), answers) as server, kit_in(tmp_path, models_dir=small_disk) as kit:
        error = await _refused(kit, f"{server.url}/m.gguf")
        assert error.code is ErrorCode.INSUFFICIENT_DISK and "became full" in error.message
        assert error.details == {"required_mb": 1, "available_mb": 0, "shortfall_mb": 1}
        (part,) = (small_disk / file for file in kit.files() if file.endswith(".part"))
        kept_bytes = len(part.read_bytes())
        assert 0 < kept_bytes < SIZE_BYTES

        _enlarge(small_disk)
        _, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert path.read_bytes() == gguf()
        assert server.requests[-1].range == f"bytes={kept_bytes}-"


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
async def test_a_disk_that_is_too_small_is_told_by_the_first_answer(tmp_path: Path, small_disk: Path) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path, models_dir=small_disk) as kit:
        error = await _refused(kit, f"{server.url}/m.gguf")
    assert error.code is ErrorCode.INSUFFICIENT_DISK
    assert error.details == {"required_mb": 1, "available_mb": 0, "shortfall_mb": 1}
