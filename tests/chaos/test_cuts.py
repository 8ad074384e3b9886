"""300 cuts at random offsets, by reset, by stall and by kill -9: the right bytes, hardly one of them twice.

Method: a real server, a relay that cuts at a given byte and counts what it relayed, the real
provisioner, for the kills a real agent process.  Offsets are random by a seed, told in the test's name.
"""

import asyncio
import dataclasses
import hashlib
import random
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from tests.integration.model_files import gguf, kit_in, sha256, small_limits

from arriero.client.api import download_frames
from arriero.contracts.records import ModelRecord
from arriero.contracts.states import DownloadState
from arriero.testing.agents import AgentProcess
from arriero.testing.fault_proxy import Cut, FaultProxy
from arriero.testing.fault_server import FaultServer
from arriero.testing.gguf_writer import LlamaShape, write_llama

#: What one cut may cost.
CUT_COST_MAX = 16 << 20
#: What a cut of these small files may cost: four connections' buffers, and the two ends of the relay.
SMALL_COST_MAX = 4 * (512 << 10)
KIB = 1024
SMALL = gguf(5, 3_000_000)
CUTS_A_RUN = 9
RUNS = 31
KILL_RUNS, KILLS_A_RUN = 3, 7


def test_there_are_300_cuts() -> None:
    assert CUTS_A_RUN * RUNS + KILL_RUNS * KILLS_A_RUN == 300


def _port(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


def _offsets(chance: random.Random, count: int, size_bytes: int) -> list[int]:
    return sorted(chance.randrange(size_bytes) for _ in range(count))


def _assert_nothing_half_is_visible(models_dir: Path) -> None:
    """Whole models have a folder with a card; anything else lies in the hidden one."""
    visible = [entry.name for entry in models_dir.iterdir() if entry.name != ".partial"]
    assert visible == []


@pytest.mark.parametrize("seed", range(RUNS))
async def test_cuts_by_reset_and_stall(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    limits = small_limits(attempts=20, stall_s=0.2, progress_bytes=64 * KIB)
    fetch = dataclasses.replace(
        limits.fetch, part_bytes=64 * KIB, range_bytes=chance.choice([128, 512]) * KIB, connections=4
    )
    limits = dataclasses.replace(limits, fetch=fetch)
    async with FaultServer(SMALL) as server, FaultProxy(_port(server.url)) as proxy:
        for offset in _offsets(chance, CUTS_A_RUN, len(SMALL)):
            cut = chance.choice([Cut.RESET, Cut.RESET, Cut.STALL])
            proxy.cut_at(offset, cut, is_for_all=chance.random() < 0.7)
        async with kit_in(tmp_path, limits=limits) as kit:
            download_id = kit.provisioner.start(f"{proxy.url}/m.gguf").download_id
            async for _, frame in kit.provisioner.frames(download_id):
                if frame.stage is DownloadState.DOWNLOADING:
                    _assert_nothing_half_is_visible(kit.models_dir)
            record, path = await kit.provisioner.wait(download_id)
        assert record.sha256 == sha256(SMALL) and path.read_bytes() == SMALL
        assert len(proxy.cuts) == CUTS_A_RUN
        heads_bytes = 1000 * proxy.connections
        assert proxy.relayed_bytes - heads_bytes - len(SMALL) <= CUTS_A_RUN * SMALL_COST_MAX


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real model of 90 MiB."""
    shape = LlamaShape(layers=8, embedding=512, heads=8, heads_kv=8, feed_forward=2800)
    return write_llama(tmp_path_factory.mktemp("large") / "large.gguf", shape).read_bytes()


def _fetch_to_the_end(agent: AgentProcess, ref: str) -> ModelRecord:
    download_id = agent.client.start_download(ref).download_id
    with agent.client.download_progress(download_id, silence_s=60.0) as stream:
        last = list(download_frames(stream))[-1]
    assert last.stage is DownloadState.COMPLETE, last
    (model,) = agent.client.models()
    return model


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(KILL_RUNS))
async def test_cuts_by_kill(tmp_path: Path, large: bytes, seed: int) -> None:
    chance = random.Random(1000 + seed)
    agent = AgentProcess(tmp_path / "home")
    async with (
        FaultServer(large) as server,
        FaultProxy(_port(server.url), rate_bytes_per_s=80e6) as proxy,
        asyncio.timeout(280),
    ):
        ref = f"{proxy.url}/large.gguf"
        try:
            for offset in _offsets(chance, KILLS_A_RUN, len(large)):
                await asyncio.to_thread(agent.start)
                await asyncio.to_thread(agent.client.start_download, ref)
                await proxy.reached(offset)
                await asyncio.to_thread(agent.kill)
                _assert_nothing_half_is_visible(agent.state.models)
            await asyncio.to_thread(agent.start)
            model = await asyncio.to_thread(_fetch_to_the_end, agent, ref)
        finally:
            await asyncio.to_thread(agent.clean_up)
        assert model.sha256 == hashlib.sha256(large).hexdigest()
        (path,) = (agent.state.models / model.model_id).glob("*.gguf")
        assert path.read_bytes() == large
        again_bytes = proxy.relayed_bytes - len(large)
        assert again_bytes <= KILLS_A_RUN * CUT_COST_MAX
        assert again_bytes <= len(large) // 2, "without a journal it would be nearly all of it"
