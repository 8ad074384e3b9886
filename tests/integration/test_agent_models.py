"""A real agent with its models: what workers have stays, what would fit is told, what was lost is said."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.agent_scripts import QUICK, scripted

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import ImportBody, PruneBody
from arriero.contracts.states import WorkerState as S
from arriero.testing.agents import AgentProcess, agent, wait_for
from arriero.testing.gguf_writer import LlamaShape, write_llama

FAKE = {"engine": "fake", "engine_options": '{"memory_mb": 123}', "stop_grace_s": "1"}


def imported(running: AgentProcess, folder: Path, name: str = "m") -> str:
    """Import a small model under a reference of the Hub; return its id."""
    path = write_llama(folder / f"{name}.gguf")
    body = ImportBody(path=str(path), model_ref=f"hf:org/{name}")
    (record,) = running.client.import_models(body).result().imported
    return record.model_id


def test_a_model_that_a_worker_has_is_neither_removed_nor_pruned(tmp_path: Path) -> None:
    with agent(FAKE) as running:
        client = running.client
        used, free = imported(running, tmp_path, "used"), imported(running, tmp_path, "free")
        worker = running.spawn("hf:org/used", slots=1)
        with pytest.raises(ArrieroError) as refused:
            client.remove_model(used)
        assert (refused.value.code, refused.value.details["status"]) == (ErrorCode.MODEL_IN_USE, 409)
        running.wait_worker(worker.worker_id, S.IDLE)
        with pytest.raises(ArrieroError) as refused:
            client.remove_model(used)
        assert refused.value.code is ErrorCode.MODEL_IN_USE and "hf:org/used" in refused.value.message
        result = client.prune_models(PruneBody(free_bytes=2**40))
        assert [record.model_id for record in result.removed] == [free]
        assert (running.state.models / used / "used.gguf").exists()

        client.stop_worker(worker.worker_id)
        running.wait_worker(worker.worker_id, S.STOPPED)
        client.remove_model(used)
        assert client.models() == [] and not (running.state.models / used).exists()


def test_a_demo_that_a_worker_loads_is_not_forgotten(tmp_path: Path) -> None:
    with agent(QUICK) as running:
        worker = running.spawn(scripted(tmp_path), slots=1)
        (record,) = running.client.models()
        with pytest.raises(ArrieroError) as refused:
            running.client.remove_model(record.model_id)
        assert refused.value.code is ErrorCode.MODEL_IN_USE and record.is_external
        running.client.stop_worker(worker.worker_id)
        running.wait_worker(worker.worker_id, S.STOPPED)


def test_what_a_model_needs_is_told_for_each_device(tmp_path: Path) -> None:
    with agent(FAKE) as running:
        client = running.client
        model_id = imported(running, tmp_path)
        told = client.model_estimate(model_id)
        assert (told.model_id, told.model_ref, told.slots, told.context_tokens) == (
            model_id,
            "hf:org/m",
            4,
            4096,
        )
        devices = {device.id: device for device in client.capabilities().devices}
        assert [row.device for row in told.devices] == list(devices)
        (cpu,) = (row for row in told.devices if row.device == "cpu")
        assert (cpu.host_mb, cpu.device_mb, cpu.fits, cpu.code) == (223, 0, True, None)
        chosen = client.model_estimate(model_id, context_tokens=64, slots=1)
        assert (chosen.context_tokens, chosen.slots) == (64, 1)


def test_where_a_model_does_not_fit_the_spawns_own_error_says_why(tmp_path: Path) -> None:
    with agent({**FAKE, "engine_options": '{"memory_mb": 900000000}'}) as running:
        model_id = imported(running, tmp_path)
        (cpu,) = (row for row in running.client.model_estimate(model_id).devices if row.device == "cpu")
        assert (cpu.fits, cpu.code, cpu.host_mb) == (False, "INSUFFICIENT_RAM", 900000100)
        assert "900000100 MB" in cpu.why
        with pytest.raises(ArrieroError) as refused:
            running.spawn("hf:org/m")
        assert refused.value.code == cpu.code


def test_the_engine_itself_is_asked(tmp_path: Path) -> None:
    with agent() as running:
        path = write_llama(tmp_path / "m.gguf", LlamaShape(context=16384))
        (record,) = running.client.import_models(ImportBody(path=str(path))).result().imported
        small = running.client.model_estimate(record.model_id, context_tokens=512, slots=1)
        large = running.client.model_estimate(record.model_id, context_tokens=1_048_576, slots=8)
        (low,), (high,) = ([row for row in told.devices if row.device == "cpu"] for told in (small, large))
        assert 0 < low.host_mb < high.host_mb, "the cache grows with context and slots"
        assert running.client.model_estimate(record.model_id).context_tokens == 8192


@pytest.mark.parametrize(
    ("query", "limit"),
    [("context_tokens=63", "64"), ("context_tokens=1048577", "1048576"), ("slots=0", "1"), ("slots=65", "64"), ("slots=x", "int")],
)  # fmt: skip
def test_a_wish_out_of_bounds_names_the_limit(shared: AgentProcess, query: str, limit: str) -> None:
    (record,) = shared.client.models()
    with pytest.raises(ArrieroError) as refused:
        shared.client.send("GET", f"/v1/models/{record.model_id}/estimate?{query}")
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert limit in refused.value.message and query.split("=")[0] in refused.value.message


def test_an_unknown_model_has_no_estimate(shared: AgentProcess) -> None:
    with pytest.raises(ArrieroError) as unknown:
        shared.client.model_estimate("m-000000000000")
    assert unknown.value.code is ErrorCode.MODEL_NOT_FOUND


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    with agent(FAKE) as running:
        imported(running, tmp_path_factory.mktemp("models"))
        yield running


def test_a_corrupt_catalog_is_set_aside_said_and_made_anew(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(agent(FAKE))
        model_id = imported(running, tmp_path)
        running.client.pin_model(model_id, is_pinned=True)
        assert running.terminate() == 0
        running.state.catalog_db.write_bytes(b"\xa5" * 8192)
        running.start()
        (record,) = wait_for(running.client.models, "the model is read through and entered again")
        assert (record.model_id, record.is_pinned, record.architecture) == (model_id, True, "llama")
        assert (running.state.home / "catalog.db.corrupt-1").exists()
        assert "set aside as catalog.db.corrupt-1" in running.log
        assert "read through, entered again" in running.log
        page = running.client.raw("GET", "/metrics").content.decode()
        assert 'arriero_agent_models{kind="own"} 1.0' in page
        assert f'arriero_agent_models_bytes{{kind="own"}} {float(record.size_bytes)}' in page
