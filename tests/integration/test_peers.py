"""Does a model come from another agent of the pool, and is it clean when that one dies?

Method: real agents in processes of their own, the real fetcher.
"""

import asyncio
import contextlib
import http.client
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.integration.model_files import Kit, kit_in, sha256, small_limits

from arriero.agent.fetch import Fetcher
from arriero.agent.files import in_thread
from arriero.agent.peers import ANSWER_BYTES_MAX, PeerOffer, offers
from arriero.client.api import download_frames
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.peers import reading_token
from arriero.contracts.records import ModelRecord
from arriero.contracts.requests import PeerSource
from arriero.contracts.states import DownloadState
from arriero.engines import gguf as gguf_format
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SeededEntropy
from arriero.runtime.http import Http
from arriero.testing.agents import AgentProcess
from arriero.testing.fault_server import Answer, FaultServer
from arriero.testing.gguf_writer import LlamaShape, write_llama


def _pull(agent: AgentProcess, ref: str) -> ModelRecord:
    client = agent.client
    with client.download_progress(client.start_download(ref).download_id) as stream:
        assert list(download_frames(stream))[-1].stage == "complete"
    (record,) = [model for model in client.models() if model.model_ref == ref]
    return record


def _source(agent: AgentProcess, node: str = "attic") -> PeerSource:
    assert agent.run is not None
    return PeerSource(url=agent.run.url, token=reading_token(agent.run.token), node=node)


async def test_a_model_comes_from_the_agent_that_has_it(tmp_path: Path) -> None:
    content = write_llama(tmp_path / "m.gguf").read_bytes()
    silent: list[str] = []
    async with FaultServer(content) as server, Http() as http:
        ref = f"{server.url}/m.gguf"
        with AgentProcess(tmp_path / "one") as one, AgentProcess(tmp_path / "two") as two:
            await in_thread(lambda: _pull(one, ref))
            asked = len(server.requests)
            peers = [
                PeerSource(url="http://127.0.0.1:1", token="secret", node="gone"),
                _source(two, "empty"),
                _source(one),
                PeerSource(url=_source(one).url, token="wrong", node="stranger"),
                PeerSource(url="ftp://user:secret@host/", node=""),
            ]
            for found in (
                await offers(peers, ref, [], http=http, on_silent=silent.append),
                await offers(peers, None, [sha256(content)], http=http, names=["m.gguf"]),
            ):
                (offer,) = found
                assert (offer.node, [file.name for file in offer.files]) == ("attic", ["m.gguf"])
            async with kit_in(tmp_path / "here", inspect=gguf_format.inspect) as kit:
                path = await _fetched(kit.models_dir, offer)
                assert path.read_bytes() == content and len(server.requests) == asked
    assert [reason.split(" ")[0] for reason in silent] == ["gone", "stranger", "host"]
    assert "status 401" in silent[1] and "secret" not in "".join(silent)


def _status(agent: AgentProcess, method: str, path: str) -> int:
    """Return what an agent answers to who has the token that its neighbours get."""
    source = _source(agent)
    connection = http.client.HTTPConnection(urlsplit(source.url).netloc, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body=b"{}", headers={"Authorization": f"Bearer {source.token}"})
        return connection.getresponse().status


def test_a_neighbour_reads_models_and_does_nothing_else(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf")
    with AgentProcess(tmp_path / "one") as one:
        record = _pull(one, f"file://{tmp_path}/m.gguf")
        model = f"/v1/models/{record.model_id}"
        file = f"{model}/files/{record.files[0]}"
        for path in ("/v1/models", file):
            assert _status(one, "GET", path) == 200, path
        for method, path in (
            ("GET", "/v1/health"), ("GET", "/v1/capabilities"), ("GET", "/v1/events"), ("GET", "/metrics"),
            ("GET", model), ("GET", f"{model}/estimate"), ("DELETE", model), ("PUT", f"{model}/pin"),
            ("DELETE", file), ("POST", "/v1/models"), ("POST", "/v1/models/download"),
            ("POST", "/v1/models/import"), ("POST", "/v1/models/prune"), ("GET", "/v1/workers"),
            ("POST", "/v1/workers"), ("GET", "/v1/engines"), ("POST", "/v1/admin/shutdown"),
            ("GET", "/v1/models/"), ("GET", "//v1/models"), ("GET", f"{model}/files/../estimate"),
            ("GET", f"{model}%2Festimate"), ("GET", f"{file}/../../estimate"),
        ):  # fmt: skip
            assert _status(one, method, path) == 401, f"{method} {path}"
        assert [model.model_id for model in one.client.models()] == [record.model_id]
        assert one.client.workers() == []


async def test_a_file_of_another_machine_is_not_meant_by_the_same_path(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf")
    with AgentProcess(tmp_path / "one") as one:
        record = await in_thread(lambda: _pull(one, f"file://{tmp_path}/m.gguf"))
        async with Http() as http:
            assert await offers([_source(one)], record.model_ref, [], http=http) == []
            (offer,) = await offers([_source(one)], None, [record.sha256], http=http)
            assert offer.files[0].size_bytes == record.size_bytes


async def test_a_peer_that_dies_in_the_middle_is_a_clean_failure(tmp_path: Path) -> None:
    large = LlamaShape(layers=4, embedding=1024, heads=16, heads_kv=4, feed_forward=3072)
    path = await in_thread(lambda: write_llama(tmp_path / "m.gguf", large))
    with AgentProcess(tmp_path / "one") as one:
        record = await in_thread(lambda: _pull(one, f"file://{path}"))
        async with Http() as http:
            (offer,) = await offers([_source(one)], None, [record.sha256], http=http)
        folder = tmp_path / "here"
        with pytest.raises(ArrieroError) as failed:
            await _fetched(folder, offer, on_bytes=one.kill)
        assert failed.value.code is ErrorCode.DOWNLOAD_FAILED
        assert failed.value.details["attempts"] and str(_source(one).token) not in str(failed.value.details)
        assert not (folder / "m.gguf").exists()


@contextlib.asynccontextmanager
async def _copied(folder: Path, peer_back_s: float) -> AsyncGenerator[tuple[Kit, AgentProcess, str], None]:
    """Give a copy that is under way, the agent that it comes from, and its id; its source is gone."""
    whole = write_llama(folder / "m.gguf")
    with whole.open("ab") as file:
        file.truncate(12_000_000)
    limits = small_limits(peer_back_s=peer_back_s, rate_bytes_per_s=4e6, progress_bytes=2**20)
    with AgentProcess(folder / "one") as one:
        async with FaultServer(await in_thread(whole.read_bytes)) as server:
            ref = f"{server.url}/m.gguf"
            await in_thread(lambda: _pull(one, ref))
        async with (
            asyncio.timeout(60),
            kit_in(folder / "here", limits=limits, inspect=gguf_format.inspect) as kit,
        ):
            ticket = kit.provisioner.start(ref, peers=[_source(one)])
            async for _, frame in kit.provisioner.frames(ticket.download_id):
                if frame.bytes_downloaded > 4_500_000:
                    break
            yield kit, one, ticket.download_id


async def test_a_copy_goes_on_when_the_agent_that_gives_it_is_back(tmp_path: Path) -> None:
    async with _copied(tmp_path, peer_back_s=60.0) as (kit, one, download_id):
        await in_thread(one.kill)
        async for _, frame in kit.provisioner.frames(download_id):
            if frame.retry_reason and "node attic was lost" in frame.retry_reason:
                break
        assert kit.provisioner.record(download_id).wants_peers
        seen = len(kit.changes)
        # It has another port, and another token.
        await in_thread(one.start)
        kit.provisioner.tell_peers(download_id, [_source(one)])
        model, _ = await kit.provisioner.wait(download_id)
        assert model.source == "node attic"
        record = kit.provisioner.record(download_id)
        assert record.state is DownloadState.COMPLETE and not record.wants_peers
        came = [told.bytes_downloaded for told in kit.changes[seen:] if told.state == "downloading"]
        assert min(filter(None, came)) > 4_000_000, "it went on, and did not begin anew"


async def test_an_agent_that_does_not_come_back_is_told_of_besides_the_source(tmp_path: Path) -> None:
    async with _copied(tmp_path, peer_back_s=0.2) as (kit, one, download_id):
        await in_thread(one.kill)
        with pytest.raises(ArrieroError) as failed:
            await kit.provisioner.wait(download_id)
    error = failed.value
    assert error.code is ErrorCode.DOWNLOAD_FAILED and error.details["lost"] == "node attic"
    assert error.message.startswith("node attic was lost while the model came from it, and did not come back")
    assert "elsewhere: fetching m.gguf: 127.0.0.1:" in error.message


async def _fetched(folder: Path, offer: PeerOffer, on_bytes: Callable[[], None] = lambda: None) -> Path:
    """Fetch the one file of an offer with the real fetcher; `on_bytes` is called once bytes have come."""
    await in_thread(lambda: folder.mkdir(parents=True, exist_ok=True))
    (remote,) = offer.files
    async with _fetcher() as fetcher:
        return (await fetcher.fetch(remote, folder, _Watch(on_bytes))).path


@contextlib.asynccontextmanager
async def _fetcher() -> AsyncGenerator[Fetcher, None]:
    limits = small_limits(progress_bytes=2**40).fetch
    async with Http() as http:
        yield Fetcher(http.session(), SystemClock(), SeededEntropy(7), limits)


class _Watch:
    def __init__(self, on_bytes: Callable[[], None]) -> None:
        self._on_bytes = on_bytes
        self._has_begun = False

    def attempting(self, attempt: int) -> None: ...

    def waiting(self, reason: str, delay_s: float) -> None: ...

    def downloading(self) -> None: ...

    def verifying(self) -> None: ...

    def advance(self, downloaded_bytes: int, total_bytes: int | None) -> None:
        if downloaded_bytes > 0 and not self._has_begun:
            self._has_begun = True
            self._on_bytes()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Answer(is_mute=True), "did not answer within"),
        (Answer(stall_after=3), "did not answer within"),
        (Answer(cut_after=3), "is not reachable"),
        (Answer(content=b"hello"), "no list of models"),
        (Answer(content=b'{"models": [{"model_id": 7}]}'), "no list of models"),
        (Answer(content=b"[" * 100_000), "no list of models"),
        (Answer(content=b" " * (ANSWER_BYTES_MAX + 1)), "more than"),
        (Answer(status=302, headers={"Location": "http://127.0.0.1:1/"}), "status 302"),
        (Answer(status=500), "status 500"),
    ],
)
async def test_a_peer_that_answers_nonsense_is_left_out_and_why_is_told(answer: Answer, why: str) -> None:
    silent: list[str] = []
    async with FaultServer(b"x" * 100, [answer]) as server, Http() as http, asyncio.timeout(60):
        peers = [PeerSource(url=server.url, token="secret", node="old")]
        assert await offers(peers, "hf:o/r", [], http=http, timeout_s=0.5, on_silent=silent.append) == []
        assert server.requests[0].headers["Authorization"] == "Bearer secret"
    (reason,) = silent
    assert reason.startswith("old ") and why in reason
