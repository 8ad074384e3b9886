"""Does a file come whole, or is the reason told, whatever a server does?

Method: a real server with scripted faults, the real provisioner, real files.
"""

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest
from tests.integration.model_files import SIZE_BYTES, gguf, kit_in, sha256, small_limits

from arriero.agent.fetch import FetchLimits
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.states import DownloadState
from arriero.testing.fault_server import Answer, FaultServer

CONTENT = gguf()
#: Of a file whose size nobody told; the answer tells it.
FIRST_RANGE = f"bytes=0-{FetchLimits().range_bytes - 1}"
DIGEST = {"Repr-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(CONTENT).digest()).decode()}:"}


def _folders(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if not entry.name.startswith("agent.db")]


async def _fails(tmp_path: Path, answers: list[Answer], name: str = "m.gguf", **limits: Any) -> ArrieroError:
    async with (
        FaultServer(CONTENT, answers) as server,
        kit_in(tmp_path, limits=small_limits(**limits)) as kit,
    ):
        with pytest.raises(ArrieroError) as failed:
            await kit.provisioner.ensure(f"{server.url}/{name}")
        assert await kit.catalog.records() == []
        assert not [file for file in kit.files() if not file.startswith(".partial/")]
        assert str(tmp_path) not in f"{failed.value} {failed.value.details}"
    return failed.value


async def test_a_plain_file_comes_whole(tmp_path: Path) -> None:
    async with FaultServer(CONTENT) as server, kit_in(tmp_path) as kit:
        record, path = await kit.provisioner.ensure(f"{server.url}/folder/My%20Model.gguf?x=1")
        assert path.read_bytes() == CONTENT
        assert (record.sha256, record.size_bytes, record.provider) == (sha256(CONTENT), SIZE_BYTES, "https")
        assert (path.name, path.parent) == ("My Model.gguf", kit.models_dir / record.model_id)
        assert kit.files() == sorted([f"{record.model_id}/My Model.gguf", f"{record.model_id}/model.json"])
        assert server.requests[0].headers["Accept-Encoding"] == "identity"

        again, _ = await kit.provisioner.ensure(f"{server.url}/folder/My%20Model.gguf?x=1")
        assert again == record and len(server.requests) == 1


async def test_a_cut_connection_is_gone_on_with(tmp_path: Path) -> None:
    answers = [Answer(cut_after=100_000), Answer(cut_after=50_000), Answer()]
    async with FaultServer(CONTENT, answers) as server, kit_in(tmp_path) as kit:
        record, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert path.read_bytes() == CONTENT and record.sha256 == sha256(CONTENT)
        assert [request.range for request in server.requests] == [
            FIRST_RANGE,
            "bytes=100000-",
            "bytes=150000-",
        ]
        assert server.requests[1].headers["If-Range"] == '"one"'


async def test_a_new_agent_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    async with FaultServer(CONTENT, [Answer(cut_after=120_000), Answer(status=503), Answer()]) as server:
        ref = f"{server.url}/m.gguf"
        async with kit_in(tmp_path, limits=small_limits(attempts=2)) as kit:
            with pytest.raises(ArrieroError) as failed:
                await kit.provisioner.ensure(ref)
            assert failed.value.code is ErrorCode.DOWNLOAD_FAILED
        async with kit_in(tmp_path) as kit:
            _, path = await kit.provisioner.ensure(ref)
            assert path.read_bytes() == CONTENT
        assert server.requests[-1].range == "bytes=120000-"


async def test_a_changed_file_is_fetched_from_the_start(tmp_path: Path) -> None:
    other = gguf(2)
    answers = [Answer(cut_after=100_000), Answer(etag='"two"', content=other)]
    async with FaultServer(CONTENT, answers) as server, kit_in(tmp_path) as kit:
        _, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert path.read_bytes() == other


async def test_a_server_that_ignores_if_range_is_caught_by_its_etag(tmp_path: Path) -> None:
    other = gguf(2)
    lying = Answer(
        status=206,
        etag='"two"',
        content=other,
        content_range=f"bytes 100000-{SIZE_BYTES - 1}/{SIZE_BYTES}",
        claimed_length=SIZE_BYTES - 100_000,
    )
    answers = [Answer(cut_after=100_000), lying, Answer(etag='"two"', content=other)]
    async with FaultServer(CONTENT, answers) as server, kit_in(tmp_path) as kit:
        _, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert path.read_bytes() == other


async def test_without_an_etag_or_a_digest_nothing_is_continued(tmp_path: Path) -> None:
    answers = [Answer(cut_after=100_000, etag=""), Answer(etag="")]
    async with FaultServer(CONTENT, answers) as server, kit_in(tmp_path) as kit:
        _, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert path.read_bytes() == CONTENT
        assert [request.range for request in server.requests] == [FIRST_RANGE, None]


async def test_a_weak_etag_is_no_proof(tmp_path: Path) -> None:
    answers = [Answer(cut_after=100_000, etag='W/"one"'), Answer(etag='W/"one"')]
    async with FaultServer(CONTENT, answers) as server, kit_in(tmp_path) as kit:
        await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert [request.range for request in server.requests] == [FIRST_RANGE, None]


async def test_a_server_without_ranges_sends_it_again(tmp_path: Path) -> None:
    answers = [Answer(cut_after=100_000), Answer(ignores_range=True)]
    async with FaultServer(CONTENT, answers) as server, kit_in(tmp_path) as kit:
        _, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert path.read_bytes() == CONTENT


async def test_a_server_that_always_cuts_and_knows_no_ranges_is_given_up(tmp_path: Path) -> None:
    error = await _fails(tmp_path, [Answer(cut_after=100_000, ignores_range=True)])
    assert error.code is ErrorCode.DOWNLOAD_FAILED
    assert [entry["attempt"] for entry in error.details["attempts"]] == [1, 2, 3]


async def test_attempts_start_anew_after_progress(tmp_path: Path) -> None:
    limits = small_limits(attempts=2, progress_bytes=10_000)
    async with (
        FaultServer(CONTENT, [Answer(cut_after=30_000)]) as server,
        kit_in(tmp_path, limits=limits) as kit,
    ):
        _, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert path.read_bytes() == CONTENT and len(server.requests) == 10


async def test_a_body_without_a_length_that_is_cut_is_no_model(tmp_path: Path) -> None:
    error = await _fails(tmp_path, [Answer(cut_after=100_000, has_length=False, ignores_range=True)])
    assert error.code is ErrorCode.MODEL_CORRUPTED


async def test_a_body_without_a_length_is_fine_when_whole(tmp_path: Path) -> None:
    async with FaultServer(CONTENT, [Answer(has_length=False)]) as server, kit_in(tmp_path) as kit:
        _, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("claimed", [SIZE_BYTES + 1, 10 * SIZE_BYTES])
async def test_a_length_that_promises_too_much_is_found_out(tmp_path: Path, claimed: int) -> None:
    error = await _fails(tmp_path, [Answer(claimed_length=claimed, ignores_range=True)])
    assert error.code is ErrorCode.DOWNLOAD_FAILED


async def test_a_length_that_promises_too_little_is_found_out(tmp_path: Path) -> None:
    error = await _fails(tmp_path, [Answer(claimed_length=SIZE_BYTES - 5)])
    assert error.code in (ErrorCode.MODEL_CORRUPTED, ErrorCode.DOWNLOAD_FAILED)


@pytest.mark.parametrize(
    "content_range", ["bytes 0-299999/300000", "bytes 100000-200000/300000", "nonsense", "bytes */300000"]
)
async def test_a_wrong_range_is_not_appended(tmp_path: Path, content_range: str) -> None:
    answers = [Answer(cut_after=100_000), Answer(content_range=content_range), Answer()]
    async with FaultServer(CONTENT, answers) as server, kit_in(tmp_path) as kit:
        _, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert path.read_bytes() == CONTENT


async def test_a_part_that_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    # Without an ETag the rest cannot be asked for after a cut, so the whole is.
    part = Answer(status=206, etag="", content_range="bytes 0-299999/300000")
    error = await _fails(tmp_path, [Answer(cut_after=100_000, etag=""), part])
    assert error.code is ErrorCode.DOWNLOAD_FAILED


async def test_a_compressed_answer_is_refused(tmp_path: Path) -> None:
    error = await _fails(tmp_path, [Answer(is_gzipped=True)])
    assert error.code is ErrorCode.DOWNLOAD_FAILED
    assert "compressed" in error.message


async def test_a_range_beyond_the_end_means_whole_or_from_the_start(tmp_path: Path) -> None:
    # No length: the first attempt cannot know that it was whole.
    headers = {"Content-Length": str(SIZE_BYTES + 7)}
    answers = [Answer(has_length=False, ignores_range=True, headers=headers), Answer()]
    async with FaultServer(CONTENT, answers) as server, kit_in(tmp_path) as kit:
        _, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert path.read_bytes() == CONTENT
        assert server.requests[1].range == f"bytes={SIZE_BYTES}-"


async def test_a_shrunken_file_is_fetched_from_the_start(tmp_path: Path) -> None:
    shrunken = gguf(3, 50_000)
    beyond = Answer(status=416, content_range="bytes */50000")
    answers = [Answer(cut_after=100_000), beyond, Answer(content=shrunken, etag='"two"')]
    async with FaultServer(CONTENT, answers) as server, kit_in(tmp_path) as kit:
        _, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert path.read_bytes() == shrunken


async def test_wrong_bytes_are_thrown_away_and_fetched_again(tmp_path: Path) -> None:
    wrong = Answer(content=gguf(2), headers=DIGEST)
    async with FaultServer(CONTENT, [wrong, Answer(headers=DIGEST)]) as server, kit_in(tmp_path) as kit:
        record, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert path.read_bytes() == CONTENT and record.sha256 == sha256(CONTENT)
        states = [change.state for change in kit.changes]
        assert states.index(DownloadState.VERIFYING) < len(states) - 1 - states[::-1].index(
            DownloadState.DOWNLOADING
        )


async def test_bytes_that_stay_wrong_are_corrupted(tmp_path: Path) -> None:
    error = await _fails(tmp_path, [Answer(content=gguf(2), headers=DIGEST)])
    assert error.code is ErrorCode.MODEL_CORRUPTED
    assert len(error.details["attempts"]) == 3


async def test_an_error_page_is_refused_by_its_first_bytes(tmp_path: Path) -> None:
    error = await _fails(tmp_path, [Answer(content=b"<html>please log in</html>")])
    assert error.code is ErrorCode.MODEL_CORRUPTED
    assert "<htm" in error.message


async def test_what_is_whole_but_no_model_is_not_kept(tmp_path: Path) -> None:
    content = b"GGUF" + b"\xff" * 1000
    async with FaultServer(content) as server, kit_in(tmp_path) as kit:
        with pytest.raises(ArrieroError) as failed:
            await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert failed.value.code is ErrorCode.MODEL_CORRUPTED
        assert kit.files() == []


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, ErrorCode.MODEL_NOT_FOUND), (410, ErrorCode.MODEL_NOT_FOUND), (401, ErrorCode.MODEL_ACCESS_DENIED),
     (403, ErrorCode.MODEL_ACCESS_DENIED), (451, ErrorCode.DOWNLOAD_FAILED)],
)  # fmt: skip
async def test_a_refusal_is_told_at_once(tmp_path: Path, status: int, code: ErrorCode) -> None:
    async with FaultServer(CONTENT, [Answer(status=status)]) as server, kit_in(tmp_path) as kit:
        with pytest.raises(ArrieroError) as failed:
            await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert failed.value.code is code
        assert len(server.requests) == 1


async def test_a_tired_server_is_asked_again_when_it_says(tmp_path: Path) -> None:
    answers = [Answer(status=503, headers={"Retry-After": "1"}), Answer(status=500), Answer()]
    async with FaultServer(CONTENT, answers) as server, kit_in(tmp_path) as kit:
        started = kit.provisioner.start(f"{server.url}/m.gguf")
        waits = [
            frame
            async for _, frame in kit.provisioner.frames(started.download_id)
            if frame.retry_in_s is not None
        ]
        assert waits[0].retry_in_s == 1.0
        assert waits[0].retry_reason is not None and "503" in waits[0].retry_reason
        assert len(server.requests) == 3


async def test_silence_in_every_attempt_is_a_timeout(tmp_path: Path) -> None:
    error = await _fails(tmp_path, [Answer(is_mute=True), Answer(stall_after=1000)], stall_s=0.5)
    assert error.code is ErrorCode.DOWNLOAD_TIMEOUT
    assert len(error.details["attempts"]) == 3


async def test_a_stall_is_followed_by_the_rest(tmp_path: Path) -> None:
    async with (
        FaultServer(CONTENT, [Answer(stall_after=100_000), Answer()]) as server,
        kit_in(tmp_path, limits=small_limits(stall_s=1.0)) as kit,
    ):
        _, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert path.read_bytes() == CONTENT
        assert server.requests[1].range == "bytes=100000-"


async def test_nobody_at_the_address_is_told(tmp_path: Path) -> None:
    async with FaultServer(CONTENT) as server:
        url = server.url
    async with kit_in(tmp_path) as kit:
        with pytest.raises(ArrieroError) as failed:
            await kit.provisioner.ensure(f"{url}/m.gguf")
    assert failed.value.code is ErrorCode.DOWNLOAD_FAILED
    assert "cannot be connected to: connection refused" in failed.value.message


async def test_redirects_have_an_end(tmp_path: Path) -> None:
    error = await _fails(tmp_path, [Answer(status=302, headers={"Location": "/m.gguf"})])
    assert error.code is ErrorCode.DOWNLOAD_FAILED
    assert "redirects more than" in error.message


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/m.gguf", "http://[broken", ""])
async def test_redirects_lead_to_http_alone(tmp_path: Path, location: str) -> None:
    error = await _fails(tmp_path, [Answer(status=302, headers={"Location": location})], attempts=1)
    assert error.code is ErrorCode.DOWNLOAD_FAILED


@pytest.mark.parametrize(
    "name", ["..%2F..%2Fescape.gguf", "%2e%2e%5cescape.gguf", ".hidden.gguf", "a%00b.gguf", "%F0%9F%A6%99"]
)
async def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    async with FaultServer(CONTENT) as server, kit_in(tmp_path) as kit:
        record, path = await kit.provisioner.ensure(f"{server.url}/{name}")
        assert path.parent == kit.models_dir / record.model_id
        assert path.name.endswith(".gguf") and not path.name.startswith(".")
        assert _folders(tmp_path) == ["models"]


async def test_a_pickle_is_refused_before_a_byte_is_asked_for(tmp_path: Path) -> None:
    async with FaultServer(CONTENT) as server, kit_in(tmp_path) as kit:
        with pytest.raises(ArrieroError) as failed:
            await kit.provisioner.ensure(f"{server.url}/pytorch_model.bin")
        assert failed.value.code is ErrorCode.INVALID_MODEL_REFERENCE
        assert server.requests == []


async def test_a_source_that_gave_nothing_leaves_nothing(tmp_path: Path) -> None:
    async with FaultServer(CONTENT, [Answer(status=500)]) as server, kit_in(tmp_path) as kit:
        with pytest.raises(ArrieroError):
            await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert kit.files() == []
