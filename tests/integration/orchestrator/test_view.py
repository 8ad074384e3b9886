"""What the orchestrator knows of its nodes and workers, and what it passes on to them."""

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.integration.orchestrator.scripted import (
    WAIT_S,
    RunningOrchestrator,
    ScriptedAgent,
    WorkerScript,
    agent,
    download_frame,
    orchestrator,
    read_events,
    sse_lines,
)
from yarl import URL

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import WorkerChanged
from arriero.contracts.records import ModelRecord
from arriero.contracts.states import DownloadState, WorkerState
from arriero.contracts.version import __version__

CHAT = {"model": "demo", "stream": True, "messages": []}


async def node_is(o: RunningOrchestrator, state: str) -> None:
    await o.until("/v1/nodes", lambda answer: [node["status"] for node in answer["nodes"]] == [state])


async def test_a_silent_node_is_unreachable_and_comes_back(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path, node_timeout_s="3") as o:
        await andes.add_worker()
        await node_is(o, "ready")
        async with o.session.get(f"{o.url}/ready") as response:
            assert response.status == 200
        andes.is_silent = True
        await node_is(o, "unreachable")
        async with o.session.get(f"{o.url}/ready") as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "NODE_UNREACHABLE"
        async with o.session.post(f"{o.url}/v1/chat/completions", json=CHAT) as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "NODE_UNREACHABLE"
        andes.is_silent = False
        await node_is(o, "ready")
        async with o.session.post(f"{o.url}/v1/chat/completions", json=CHAT) as response:
            assert "[DONE]" in await response.text()


async def test_a_node_that_is_held_was_connected_just_now(tmp_path: Path) -> None:
    async with agent(tmp_path), orchestrator(tmp_path) as o:
        await node_is(o, "ready")
        first = (await o.get("/v1/nodes"))["nodes"][0]["last_connected_unix"]
        await o.until("/v1/nodes", lambda answer: answer["nodes"][0]["last_connected_unix"] > first)


async def test_an_agent_is_replaced_while_a_stream_flows(tmp_path: Path) -> None:
    async with agent(tmp_path) as old, orchestrator(tmp_path, node_timeout_s="3") as o:
        kept = await old.add_worker(script=WorkerScript(hold_after=2))
        lost = await old.add_worker("file:///lost.gguf")
        await node_is(o, "ready")
        async with o.session.post(f"{o.url}/v1/chat/completions", json=CHAT) as response:
            async with asyncio.timeout(WAIT_S):
                await kept.held.wait()
            await old.stop()
            await node_is(o, "unreachable")
            new = ScriptedAgent(tmp_path)
            new.workers = {kept.worker_id: kept}
            async with asyncio.TaskGroup() as group:
                await new.start(group)
                await node_is(o, "ready")
                kept.go_on.set()
                events = await read_events(response)
                ended = await o.get(f"/v1/workers/{lost.worker_id}")
                listed = await o.get("/v1/workers")
                with_ended = await o.get("/v1/workers?all=1")
                await new.stop()
        assert events[-1] == {"DONE": True} and len(events) == 6
        assert (ended["state"], ended["exit"]["code"]) == ("failed", "WORKER_LOST")
        assert [worker["worker_id"] for worker in listed["workers"]] == [kept.worker_id]
        assert len(with_ended["workers"]) == 2


async def test_the_late_news_of_an_end_cuts_nobody_off_who_has_that_port_now(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker()
        await o.until("/v1/workers", lambda answer: answer["workers"])
        gone = msgspec.structs.replace(worker.record, worker_id="w-ffffffffffff")
        andes.tell(WorkerChanged(worker=gone, worker_token="t"))
        stopped = msgspec.structs.replace(gone, state=WorkerState.STOPPED)
        andes.tell(WorkerChanged(worker=stopped, worker_token=""))
        await o.until(f"/v1/workers/{gone.worker_id}", lambda answer: answer.get("state") == "stopped")
        async with o.session.post(f"{o.url}/v1/chat/completions", json=CHAT) as response:
            assert "[DONE]" in await response.text()


@pytest.mark.parametrize(
    ("says", "version"),
    [
        ({"workers": 7}, __version__),
        ({"type": "parley"}, __version__),
        ({"capabilities": {"name": "andes", "version": "0.0.9"}}, "0.0.9"),
    ],
)
async def test_an_agent_that_is_not_understood_is_told_with_both_versions(
    tmp_path: Path, says: dict[str, Any], version: str
) -> None:
    async with agent(tmp_path) as andes:
        andes.says = says
        async with orchestrator(tmp_path) as o:
            await node_is(o, "unreachable")
            (node,) = (await o.get("/v1/nodes"))["nodes"]
    error = node["error"]
    assert (node["name"], error["code"]) == ("andes", "VERSION_MISMATCH")
    told = (error["details"]["agent_version"], error["details"]["orchestrator_version"])
    assert told == (version, __version__)
    assert f"is arriero {version}, the orchestrator is {__version__}; it " in error["message"]
    assert "arriero down" in error["details"]["suggested_action"]


async def test_a_killed_orchestrator_rebuilds_its_view(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes:
        await andes.add_worker()
        views = []
        for _ in range(2):
            async with orchestrator(tmp_path) as o:
                await node_is(o, "ready")
                found = (await o.get("/v1/workers"))["workers"]
                views.append([(worker["worker_id"], worker["state"]) for worker in found])
                o.process.kill()
                await o.process.wait()
        assert views[0] == views[1] == [("w-000000000001", "idle")]


async def test_the_proxy_brings_any_request_to_the_worker(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker()
        await o.until("/v1/workers", lambda answer: answer["workers"])
        record = await o.get(f"/v1/workers/{worker.worker_id}")
        assert record["url"] == f"{o.url}/v1/workers/{worker.worker_id}/proxy"
        async with o.session.put(
            f"{record['url']}/v1/echo/a/b?x=1&y=%20", data="hello", headers={"Authorization": "Bearer forged"}
        ) as response:
            assert response.status == 200
            assert response.headers["X-Arriero-Worker"] == worker.worker_id
            answer = await response.json()
        assert answer == {"method": "PUT", "path": "/v1/echo/a/b?x=1&y=%20", "body": "hello"}
        async with o.session.post(f"{record['url']}/v1/inference/stream", json={"prompt": "x"}) as response:
            events = await read_events(response)
        assert events[0]["started"] is True and events[-1] == {"DONE": True}
        async with o.session.get(f"{record['url']}/nowhere") as response:
            assert response.status == 404
        async with o.session.get(f"{o.url}/v1/workers/w-ffffffffffff/proxy/v1/health") as response:
            assert response.status == 404
            assert (await response.json())["error"]["code"] == "WORKER_NOT_FOUND"
        await worker.stop()
        async with o.session.get(f"{record['url']}/v1/health") as response:
            assert response.status == 502
            assert (await response.json())["error"]["code"] == "HEALTH_CHECK_ERROR"


async def test_leaving_a_proxied_stream_cuts_off_the_worker(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker(script=WorkerScript(hold_after=1))
        await o.until("/v1/workers", lambda answer: answer["workers"])
        url = f"{o.url}/v1/workers/{worker.worker_id}/proxy/v1/inference/stream"
        async with o.session.post(url, json={"prompt": "x"}) as response:
            async with asyncio.timeout(WAIT_S):
                await worker.held.wait()
            response.close()
        async with asyncio.timeout(WAIT_S):
            await worker.cut_off.wait()


async def test_workers_are_started_stopped_and_their_logs_read(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        await node_is(o, "ready")
        for query, body in (
            ("", {"model_ref": "demo", "node": "andes"}),
            ("?node=andes", {"model_ref": "demo"}),
        ):
            async with o.session.post(f"{o.url}/v1/workers{query}", json=body) as response:
                assert response.status == 202
                record = await response.json()
            assert (record["state"], record["node"]) == ("starting", "andes")
        assert [body.model_ref for body in andes.spawned] == ["demo", "demo"]
        url = f"{o.url}/v1/workers/{record['worker_id']}"
        async with o.session.get(f"{url}/logs?lines=5") as response:
            assert await response.text() == f"log of {record['worker_id']} lines=5\n"
        for status in (202, 204):
            async with o.session.delete(url) as response:
                assert response.status == status
            await o.until(f"/v1/workers/{record['worker_id']}", lambda answer: answer["state"] == "stopped")
        refused: list[tuple[dict[str, Any], int, str]] = [
            ({"model_ref": "demo", "node": "cusco"}, 404, "NODE_NOT_FOUND"),
            ({"model_ref": "demo", "backend": "cuda"}, 400, "BACKEND_UNAVAILABLE"),
            ({"model_ref": "demo", "slots": 0}, 400, "INVALID_REQUEST"),
            ({"model_ref": "demo", "nonsense": 1}, 400, "INVALID_REQUEST"),
            ({"model_ref": "nonsense"}, 400, "INVALID_MODEL_REFERENCE"),
        ]
        for wrong, status, code in refused:
            async with o.session.post(f"{o.url}/v1/workers", json=wrong) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (status, code)
        andes.spawn.refuse = ArrieroError(ErrorCode.MODEL_NOT_FOUND, "andes does not have it")
        async with o.session.post(f"{o.url}/v1/workers", json={"model_ref": "hf:a/b"}) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (404, "MODEL_NOT_FOUND")


async def test_a_download_is_started_and_followed_through_the_orchestrator(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        await node_is(o, "ready")
        andes.download_frames = [download_frame(DownloadState.COMPLETE, 1000)]
        async with o.session.post(f"{o.url}/v1/downloads", json={"model_ref": "hf:a/b"}) as response:
            assert response.status == 202
            accepted = await response.json()
        assert (accepted["node"], andes.downloaded) == ("andes", ["hf:a/b"])
        for path in (accepted["progress_url"], f"/v1/downloads/{accepted['download_id']}/progress"):
            async with o.session.get(o.url + path) as response:
                assert response.headers["X-Arriero-Node"] == "andes"
                assert [frame["stage"] for frame in await read_events(response)] == ["complete"]
        assert (await o.get("/v1/downloads"))["downloads"][0]["model_ref"] == "hf:a/b"
        async with o.session.get(f"{o.url}/v1/downloads/progress?download_id=d-ffffffffffff") as response:
            assert response.status == 404


@pytest.mark.parametrize(
    "path",
    [
        "v1/events", "v1/workers", "v1/models/../events", "v1/models/%2e%2e/events", "v1", "", "v1/modelsx",
        "v1/engines/../events", "v1/enginesx",
    ],
)  # fmt: skip
async def test_of_an_agent_nothing_but_its_models_and_engines_is_passed_on(tmp_path: Path, path: str) -> None:
    """Its events carry the workers' tokens, which are nobody's but the orchestrator's."""
    async with agent(tmp_path), orchestrator(tmp_path) as o:
        await node_is(o, "ready")
        async with o.session.get(URL(f"{o.url}/v1/nodes/andes/proxy/{path}", encoded=True)) as response:
            assert response.status == 404 and "token" not in await response.text()
        async with o.session.get(f"{o.url}/v1/nodes/andes/proxy/v1/models") as response:
            assert response.status == 200 and "models" in await response.json()


async def test_the_feed_begins_with_everything_and_tells_every_change(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker()
        await o.until("/v1/workers", lambda answer: answer["workers"])
        async with o.session.get(f"{o.url}/v1/events") as response:
            told: list[dict[str, Any]] = []
            async for line in sse_lines(response):
                if not line.startswith("data: "):
                    continue
                told.append(json.loads(line[6:]))
                if told[-1]["type"] == "snapshot":
                    andes.change(worker, state=WorkerState.BUSY)
                elif told[-1]["type"] == "worker" and told[-1]["worker"]["state"] == "busy":
                    async with o.session.post(f"{o.url}/v1/tasks", json={"prompt": "x"}) as accepted:
                        assert accepted.status == 202
                elif told[-1]["type"] == "task" and told[-1]["task"]["state"] == "done":
                    break
        assert told[0]["nodes"][0]["name"] == "andes"
        assert "token" not in told[0]["workers"][0]
        states = [event["task"]["state"] for event in told if event["type"] == "task"]
        assert states == ["placing", "running", "done"]


async def test_models_placements_and_the_rest_of_the_questions(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        await node_is(o, "ready")
        andes.has_models(
            ModelRecord(
                model_id="m-0123456789ab",
                model_ref="hf:org/repo:Q4",
                provider="hf",
                files=["a.gguf"],
                size_bytes=20 * 1024**3,
                sha256="0" * 64,
                added_unix=7.0,
            )
        )
        # Told once, when the catalog changed: nobody asks for it again.
        listed = await o.until("/v1/models", lambda answer: len(answer["data"]) == 2)
        assert [model["id"] for model in listed["data"]] == ["demo", "hf:org/repo:Q4"]
        for path in ("/v1/models/hf:org/repo:Q4", "/v1/models/hf%3Aorg%2Frepo%3AQ4"):
            async with o.session.get(URL(o.url + path, encoded=True)) as response:
                assert (response.status, (await response.json())["created"]) == (200, 7)
        async with o.session.get(f"{o.url}/v1/models/file:///no/such.gguf") as response:
            assert (response.status, (await response.json())["error"]["code"]) == (404, "MODEL_NOT_FOUND")
        async with o.session.post(
            f"{o.url}/v1/placements:explain", json={"model": "hf:org/repo:Q4", "prompt": "x"}
        ) as response:
            explained = await response.json()
        assert explained["code"] == "INSUFFICIENT_RAM"
        assert explained["refused_nodes"][0]["why"] == "has 7.4 GiB free, the model needs 20.0 GiB"
        assert andes.spawned == []
        async with o.session.get(f"{o.url}/metrics") as response:
            assert 'arriero_nodes{state="ready"} 1.0' in await response.text()
        described = await o.get("/openapi.json")
        assert {"/v1/tasks", "/v1/chat/completions", "/v1/workers"} <= set(described["paths"])
        asked = described["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]
        assert asked["schema"]["properties"] == {"arriero": {"$ref": "#/components/schemas/Place"}}
        assert "labels" in described["components"]["schemas"]["Place"]["properties"]
        async with o.session.get(f"{o.url}/health", headers={"Host": "evil.example"}) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (403, "FORBIDDEN")


async def test_a_log_that_was_let_grow_is_cut_and_kept_once(tmp_path: Path) -> None:
    log = tmp_path / "logs/orchestrator.log"
    log.parent.mkdir()
    log.write_text("of yesterday\n" * 100)
    async with orchestrator(tmp_path, log_bytes_max="1000") as o:
        await o.until("/health", lambda _: log.stat().st_size == 0)
    assert (tmp_path / "logs/orchestrator.log.1").read_text() == "of yesterday\n" * 100
