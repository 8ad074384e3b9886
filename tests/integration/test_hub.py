"""What does each kind of repository lead to, and what is said where there is no model?

Method: the real huggingface_hub client against a tiny Hub on loopback.
"""

import asyncio
import contextlib
import json
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
from tests.integration.model_files import gguf, kit_in, sha256

from arriero.agent.hub import Hub, HubModel
from arriero.agent.hub_http import ANSWER_BYTES_MAX, close_connections
from arriero.agent.retries import AttemptFailed, FailureKind
from arriero.client.api import download_frames
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import DownloadFrame
from arriero.contracts.refs import HfRef, parse
from arriero.testing import gguf_writer
from arriero.testing.agents import AgentProcess
from arriero.testing.gguf_writer import write_llama
from arriero.testing.hub import HubServer

TOKEN = "hf_notASecret"
TWELVE = (
    *("IQ4_XS", "Q2_K", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q4_0", "Q4_K_M", "Q4_K_S", "Q5_K_M", "Q6_K"),
    *("Q8_0", "BF16"),
)


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    yield
    close_connections()


async def _resolve(hub: HubServer, text: str, timeout_s: float = 5.0) -> HubModel:
    ref = parse(text)
    assert isinstance(ref, HfRef)
    return await Hub(hub.url, timeout_s).resolve(ref, now_unix=0.0)


async def _refused(hub: HubServer, text: str) -> ArrieroError:
    with pytest.raises(ArrieroError) as refused:
        await _resolve(hub, text)
    assert TOKEN not in f"{refused.value} {refused.value.details}"
    return refused.value


def _names(model: HubModel) -> list[str]:
    return [file.name for file in model.files]


# --- Which files -----------------------------------------------------------------------------


async def test_files_are_pinned_to_the_commit_with_size_and_checksum() -> None:
    async with HubServer() as hub:
        repo = hub.add("o/r", {"README.md": b"hi", "m-Q8_0.gguf": gguf()})
        model = await _resolve(hub, "hf:o/r")
    (file,) = model.files
    assert (model.revision, model.projector, model.repo) == (repo.commit, "", "o/r")
    assert file.url == f"{hub.url}/o/r/resolve/{repo.commit}/m-Q8_0.gguf"
    assert (file.size_bytes, file.sha256, file.token) == (len(gguf()), sha256(gguf()), None)


@pytest.mark.parametrize(
    ("there", "chosen"), [(TWELVE, "Q4_K_M"), (("Q2_K", "Q8_0"), "Q8_0"), (("Q6_K", "F16"), "Q6_K")]
)
async def test_of_many_quantisations_the_usual_one_is_taken(there: tuple[str, ...], chosen: str) -> None:
    async with HubServer() as hub:
        hub.add("o/r", {f"m-{quant}.gguf": bytes(size) for size, quant in enumerate(there, 10)})
        assert _names(await _resolve(hub, "hf:o/r")) == [f"m-{chosen}.gguf"]


async def test_an_unknown_quantisation_is_told_with_those_there_are_and_the_near_ones() -> None:
    async with HubServer() as hub:
        hub.add("o/r", {f"m-{quant}.gguf": b"x" for quant in TWELVE})
        error = await _refused(hub, "hf:o/r:Q4_K_XL")
    assert error.code is ErrorCode.MODEL_NOT_FOUND and error.details["available"] == sorted(TWELVE)
    assert set(error.details["near"][:2]) <= {"Q4_K_M", "Q4_K_S", "Q3_K_L"}
    assert f"near: {error.details['near'][0]}" in error.message


def _projector(folder: Path) -> bytes:
    file = gguf_writer.llama_file()
    file.set("general.architecture", gguf_writer.STRING, "clip")
    file.set("general.type", gguf_writer.STRING, "mmproj")
    return file.write(folder / "mmproj.gguf").read_bytes()


async def test_a_projector_is_taken_along_and_comes_last(tmp_path: Path) -> None:
    files = {name: gguf(seed) for seed, name in enumerate(("m-Q8_0.gguf", "mmproj-BF16.gguf"), 1)}
    async with HubServer() as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/r", {**files, "mmproj-F16.gguf": gguf(9)})
        model = await _resolve(hub, "hf:o/r:Q8_0")
        assert _names(model) == ["m-Q8_0.gguf", "mmproj-F16.gguf"] and model.projector == "mmproj-F16.gguf"
        hub.add("o/r", files)
        assert (await _resolve(hub, "hf:o/r/m-Q8_0.gguf")).projector == "mmproj-BF16.gguf"
        alone = await _resolve(hub, "hf:o/r/mmproj-BF16.gguf")
        assert (_names(alone), alone.projector) == (["mmproj-BF16.gguf"], "")
        # What comes along is checked as well: this one is no projector.
        with pytest.raises(ArrieroError) as refused:
            await kit.provisioner.ensure("hf:o/r")
        assert refused.value.code is ErrorCode.MODEL_CORRUPTED and "mmproj-BF16.gguf" in refused.value.message
        files["mmproj-BF16.gguf"] = _projector(tmp_path)
        hub.add("o/r", files)
        record, path = await kit.provisioner.ensure("hf:o/r")
        assert (path.parent / record.projector).read_bytes() == files["mmproj-BF16.gguf"]


async def test_names_that_are_equal_but_for_their_folders_stay_apart() -> None:
    async with HubServer() as hub:
        hub.add("o/r", {"Model.gguf": gguf(), "mmproj/model.gguf": gguf(2)})
        model = await _resolve(hub, "hf:o/r")
    assert _names(model) == ["Model.gguf", "mmproj_model.gguf"] and model.projector == "mmproj_model.gguf"


async def test_parts_of_a_split_model_come_whole_and_in_order() -> None:
    parts = [f"Q8_0/m ä-{part:05d}-of-00003.gguf" for part in (1, 2, 3)]
    async with HubServer() as hub:
        hub.add("o/r", {parts[2]: b"3", parts[0]: b"1", parts[1]: b"2"})
        model = await _resolve(hub, "hf:o/r:Q8_0")
        assert _names(model) == [f"m _-{part:05d}-of-00003.gguf" for part in (1, 2, 3)]
        hub.add("o/r", {parts[0]: b"1", parts[2]: b"3"})
        assert "lacks 1 of the 3 parts" in (await _refused(hub, "hf:o/r")).message


async def test_a_safetensors_file_is_fetched_where_it_is_named() -> None:
    async with HubServer() as hub:
        hub.add("o/r", {"model.safetensors": b"1234", "mmproj-F16.gguf": b"x"})
        model = await _resolve(hub, "hf:o/r/model.safetensors")
    assert (_names(model), model.projector) == (["model.safetensors"], "")
    assert model.files[0].sha256 == sha256(b"1234")


async def test_a_small_file_outside_of_the_large_storage_has_no_checksum_beforehand(tmp_path: Path) -> None:
    async with HubServer() as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/r", {"m.gguf": gguf()})
        hub.faults.tells_checksums = hub.faults.tells_sizes = False
        (file,) = (await _resolve(hub, "hf:o/r")).files
        assert (file.size_bytes, file.sha256) == (None, None)
        record, _ = await kit.provisioner.ensure("hf:o/r")
        assert record.sha256 == sha256(gguf())


# --- Repositories that have moved, or have no model ------------------------------------------


async def test_a_renamed_repository_is_found_under_its_new_name(tmp_path: Path) -> None:
    async with HubServer(token=TOKEN) as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("old/name", {"m-Q8_0.gguf": gguf()})
        hub.rename("old/name", "new/title")
        model = await _resolve(hub, "hf:old/name")
        assert model.repo == "new/title" and "/new/title/resolve/" in model.files[0].url
        assert model.files[0].sha256 == sha256(gguf())
        assert "new/title has no quantisation" in (await _refused(hub, "hf:old/name:Q2_K")).message
        _, path = await kit.provisioner.ensure(f"hf:old/name@{hub.repos['new/title'].commit}")
        assert path.read_bytes() == gguf()


@pytest.mark.parametrize(
    ("files", "told", "advice"),
    [
        ([], "o/r is empty", "Check the name"),
        (["config.json", "model.safetensors"], "safetensors, which llama.cpp does not run", "r-GGUF"),
        (["config.json", "pytorch_model.bin"], "pickles (.bin), which run code when loaded", "r-GGUF"),
        (["mmproj-F16.gguf"], "a multimodal projector, which is no model of its own", "r-GGUF"),
        (["README.md"], "holds no GGUF file at all", "r-GGUF"),
    ],
)
@pytest.mark.parametrize("ref", ["hf:o/r", "hf:o/r:Q4_K_M", "hf:o/r/m.gguf"])
async def test_a_repository_without_a_model_says_what_it_holds(
    files: list[str], told: str, advice: str, ref: str
) -> None:
    async with HubServer() as hub:
        hub.add("o/r", dict.fromkeys(files, b"x"))
        error = await _refused(hub, ref)
    assert error.code is ErrorCode.MODEL_NOT_FOUND and told in error.message
    assert advice in error.details["suggested_action"]


@pytest.mark.parametrize(
    ("ref", "near"),
    [
        ("hf:o/r/sub/my-model-Q8_1.gguf", "sub/my-model-Q8_0.gguf"),
        ("hf:o/r/my-model-q8_0.gguf", "sub/my-model-Q8_0.gguf"),
        ("hf:o/r/modle.safetensors", "model.safetensors"),
    ],
)
async def test_a_misspelt_file_is_told_with_the_near_names(ref: str, near: str) -> None:
    async with HubServer() as hub:
        hub.add("o/r", {"sub/my-model-Q8_0.gguf": b"x", "model.safetensors": b"x", "x.gguf": b"x"})
        error = await _refused(hub, ref)
    assert error.details["near"][0] == near and f"near: {near}" in error.message


async def test_a_misspelt_repository_and_a_private_one_look_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    async with HubServer(token=TOKEN) as hub:
        hub.add("o/private", {"m.gguf": b"x"}, private=True)
        missing, private = await _refused(hub, "hf:o/privat"), await _refused(hub, "hf:o/private")
        assert missing.message.replace("privat ", "private ") == private.message
        assert "misspelt, or private and needs HF_TOKEN (or `hf auth login`)" in private.message
        assert missing.code is private.code is ErrorCode.MODEL_NOT_FOUND
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert "HF_TOKEN may not see it" in (await _refused(hub, "hf:o/privat")).message
        (file,) = (await _resolve(hub, "hf:o/private")).files
        assert file.token == TOKEN and TOKEN not in repr(file)


async def test_a_revision_that_is_not_there_is_told() -> None:
    async with HubServer() as hub:
        hub.add("o/r", {"m.gguf": b"x"})
        assert "o/r has no revision v9" in (await _refused(hub, "hf:o/r@v9")).message


# --- Who may ---------------------------------------------------------------------------------


async def test_a_gated_repository_tells_the_page_before_a_byte_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with HubServer(token=TOKEN) as hub:
        repo = hub.add("o/gated", {"m.gguf": gguf()}, gated=True)
        anonymous = await _refused(hub, "hf:o/gated")
        assert anonymous.code is ErrorCode.MODEL_ACCESS_DENIED and anonymous.details["status"] == 401
        assert f"accept its licence on {hub.url}/o/gated, then set HF_TOKEN" in anonymous.message

        monkeypatch.setenv("HF_TOKEN", TOKEN)
        repo.is_accepted = False
        known = await _refused(hub, "hf:o/gated")
        assert known.code is ErrorCode.MODEL_ACCESS_DENIED and known.details["status"] == 403
        assert "the account of HF_TOKEN has not been let in" in known.message
        assert f"{hub.url}/o/gated" in known.details["suggested_action"]

        repo.is_accepted = True
        assert _names(await _resolve(hub, "hf:o/gated")) == ["m.gguf"]
        assert hub.bytes_sent == 0 and hub.leaked == []


async def test_a_wrong_token_is_told_by_where_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with HubServer(token=TOKEN) as hub:
        hub.add("o/r", {"m.gguf": b"x"})
        monkeypatch.setenv("HF_TOKEN", "hf_old")
        error = await _refused(hub, "hf:o/r")
        assert error.code is ErrorCode.MODEL_ACCESS_DENIED
        assert "HF_TOKEN is not valid" in error.message and "hf_old" not in str(error.details)

        monkeypatch.delenv("HF_TOKEN")
        (tmp_path / "token").write_text("hf_older\n")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        assert "the token of `hf auth login` is not valid" in (await _refused(hub, "hf:o/r")).message


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"\xff\xfe\x00", "cannot be read"), ("hf_clé".encode(), "characters that no token has")],
)
async def test_a_token_that_cannot_be_used_is_none_and_told_where_one_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, why: str
) -> None:
    (tmp_path / "token").write_bytes(content)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    async with HubServer(token=TOKEN) as hub:
        hub.add("o/r", {"m.gguf": b"x"})
        hub.add("o/private", {"m.gguf": b"x"}, private=True)
        assert (await _resolve(hub, "hf:o/r")).files[0].token is None
        assert why in (await _refused(hub, "hf:o/private")).message


# --- A Hub that is tired, or hostile ---------------------------------------------------------


async def test_a_tired_hub_says_how_long_to_wait() -> None:
    async with HubServer() as hub:
        hub.add("o/r", {"m.gguf": b"x"})
        hub.faults.failing_lookups, hub.faults.status, hub.faults.retry_after = 1, 429, "7"
        with pytest.raises(AttemptFailed) as failed:
            await _resolve(hub, "hf:o/r")
        assert failed.value.retry_after_s == 7.0 and "429" in failed.value.reason
        assert _names(await _resolve(hub, "hf:o/r")) == ["m.gguf"]


async def test_an_address_that_ran_out_is_replaced_by_a_new_one(tmp_path: Path) -> None:
    async with HubServer() as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/r", {"m.gguf": gguf()})
        hub.faults.address_uses_max, hub.faults.failing_bytes = 1, 1
        _, path = await kit.provisioner.ensure("hf:o/r")
        assert path.read_bytes() == gguf()


GOOD = {"rfilename": "good-Q8_0.gguf", "size": 5, "lfs": {"sha256": "a" * 64, "size": 5, "pointerSize": 1}}


@pytest.mark.parametrize(
    "entry",
    [
        {"rfilename": "../Q4_K_M.gguf"},
        {"rfilename": "/etc/Q4_K_M.gguf"},
        {"rfilename": "a//Q4_K_M.gguf"},
        {"rfilename": "a/../Q4_K_M.gguf"},
        {"rfilename": "a\\Q4_K_M.gguf"},
        {"rfilename": "a\x00Q4_K_M.gguf"},
        {"rfilename": "a\x1b[2JQ4_K_M.gguf"},
        {"rfilename": "a\u202eQ4_K_M.gguf"},
        {"rfilename": "a" * 5000 + "-Q4_K_M.gguf"},
        {"rfilename": ["Q4_K_M.gguf"]},
        {"rfilename": 7},
        {"rfilename": None},
        {"rfilename": "m-Q4_K_M-00001-of-99999.gguf"},
        {"rfilename": "m-Q4_K_M-00001-of-00000.gguf"},
    ],
)
async def test_names_that_nobody_could_mean_are_not_taken(entry: dict[str, object]) -> None:
    async with HubServer() as hub:
        hub.faults.lookup_answer = json.dumps({"id": "o/r", "siblings": [entry, GOOD]}).encode()
        hub.add("o/r", {})
        try:
            assert _names(await _resolve(hub, "hf:o/r")) == ["good-Q8_0.gguf"]
        except ArrieroError as error:
            assert error.code is ErrorCode.MODEL_NOT_FOUND and "senseless number of parts" in error.message


@pytest.mark.parametrize(
    ("size", "digest"),
    [(-1, "A" * 64), (2**63, "a" * 63), (1.5, "../" * 21), ("7", 7), (True, None), ([], []), ({}, {})],
)
async def test_sizes_and_checksums_that_cannot_be_count_as_not_told(size: object, digest: object) -> None:
    entry = {"rfilename": "m.gguf", "size": size, "lfs": {"sha256": digest, "size": size, "pointerSize": 1}}
    async with HubServer() as hub:
        hub.faults.lookup_answer = json.dumps(
            {"id": "../x", "sha": "../../main", "siblings": [entry]}
        ).encode()
        hub.add("o/r", {})
        model = await _resolve(hub, "hf:o/r")
    assert (model.files[0].size_bytes, model.files[0].sha256) == (None, None)
    assert (model.repo, model.revision) == ("o/r", "")
    assert model.files[0].url == f"{hub.url}/o/r/resolve/main/m.gguf"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b"[]",
        b"7",
        b"{}",
        b'{"id": "o/r", "siblings": [7]}',
        b'{"id": "o/r", "siblings": {"a": 1}}',
        b'{"id": "o/r", "siblings": [{"rfilename": "m.gguf", "lfs": 7}]}',
        b"[" * 100_000,
        b'{"id": "o/r", "lastModified": "yesterday", "siblings": []}',
    ],
)
async def test_an_answer_without_sense_is_a_failed_attempt(answer: bytes) -> None:
    async with HubServer() as hub:
        hub.add("o/r", {})
        hub.faults.lookup_answer = answer
        with pytest.raises(AttemptFailed, match="makes no sense"):
            await _resolve(hub, "hf:o/r")


async def test_a_hundred_thousand_files_are_looked_through() -> None:
    entries = [{"rfilename": f"a/{number:06d}-IQ{number % 9}_S.gguf", "size": 9} for number in range(100_000)]
    async with HubServer() as hub:
        hub.add("o/r", {})
        hub.faults.lookup_answer = json.dumps({"id": "o/r", "siblings": [GOOD, *entries]}).encode()
        assert _names(await _resolve(hub, "hf:o/r")) == ["good-Q8_0.gguf"]
        error = await _refused(hub, "hf:o/r/a/000001-IQ1_M.gguf")
        assert len(error.details["available"]) <= 100 and len(error.message) < 10_000
        assert error.details["near"]


async def test_an_endless_answer_is_not_read_to_its_end() -> None:
    async with HubServer() as hub:
        hub.add("o/r", {})
        hub.faults.lookup_answer = b" " * (ANSWER_BYTES_MAX + 1)
        with pytest.raises(AttemptFailed, match="is refused: more than"):
            await _resolve(hub, "hf:o/r")


@contextlib.asynccontextmanager
async def _dripping() -> AsyncGenerator[str, None]:
    """A server that sends a byte of its answer now and then, without end."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_an_answer_that_drips_is_given_up_and_nobody_goes_on_reading() -> None:
    threads = set(threading.enumerate())
    async with _dripping() as url:
        with pytest.raises(AttemptFailed, match="did not end its answer") as failed:
            await Hub(url, timeout_s=0.1).resolve(HfRef("o/r"), 0.0)
        assert failed.value.kind is FailureKind.STALLED
        async with asyncio.timeout(60):
            await asyncio.get_running_loop().shutdown_default_executor()
    assert set(threading.enumerate()) <= threads


# --- As it is used ---------------------------------------------------------------------------


@contextlib.contextmanager
def _hub_process(*arguments: str) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "arriero.testing.hub", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate(timeout=10)


def test_an_agent_asks_where_and_as_whom_the_environment_says(tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    write_llama(tmp_path / "repo" / "m-Q8_0.gguf")
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(stat.S_IRUSR)
    flags = ("--private", f"o/r={tmp_path / 'repo'}", "--moved", "o/r=o/new", "--token", TOKEN)
    with _hub_process(*flags, "--failing-lookups", "1", "--no-sizes", "--no-linked") as url:
        env = {"HF_ENDPOINT": url, "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_TOKEN": ""}
        with AgentProcess(tmp_path / "home", env) as agent:
            assert _pull(agent, "hf:o/r").stage == "complete"
        with AgentProcess(tmp_path / "other", {**env, "HF_HUB_OFFLINE": "1"}) as agent:
            with pytest.raises(ArrieroError) as refused:
                _pull(agent, "hf:o/r")
            assert refused.value.code is ErrorCode.DOWNLOAD_FAILED
            assert "HF_HUB_OFFLINE is set" in refused.value.message


def _pull(agent: AgentProcess, ref: str) -> DownloadFrame:
    client = agent.client
    with client.download_progress(client.start_download(ref).download_id) as stream:
        return list(download_frames(stream))[-1]


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://host", "http://", " "])
async def test_an_endpoint_that_is_no_address_is_named_at_once(endpoint: str) -> None:
    with pytest.raises(ArrieroError) as refused:
        await Hub(endpoint).resolve(HfRef("o/r"), now_unix=0.0)
    assert refused.value.code is ErrorCode.DOWNLOAD_FAILED
    assert refused.value.details["suggested_action"].startswith("Unset HF_ENDPOINT")


async def test_a_hub_that_cannot_be_reached_is_named_without_credentials() -> None:
    with pytest.raises(AttemptFailed) as failed:
        await Hub("http://user:password@127.0.0.1:9", 5.0).resolve(HfRef("o/r"), now_unix=0.0)
    assert "the Hub at 127.0.0.1:9 cannot be reached" in str(failed.value)
    assert "password" not in str(failed.value)
