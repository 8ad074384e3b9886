"""The token path against workers that misbehave at a chosen moment."""

import asyncio
import json
from pathlib import Path
from typing import Any

from tests.integration.orchestrator.scripted import (
    WAIT_S,
    RunningOrchestrator,
    WorkerScript,
    agent,
    orchestrator,
    read_events,
    sse_lines,
)

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import WorkerExit
from arriero.contracts.states import WorkerState


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "demo", "stream": True, "messages": [{"role": "user", "content": "x"}], **more}


async def ready(o: RunningOrchestrator) -> None:
    await o.until("/v1/workers", lambda answer: any(w["state"] == "idle" for w in answer["workers"]))


async def test_a_stream_is_passed_on_verbatim_with_ids_and_names(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker()
        await ready(o)
        async with o.session.post(
            f"{o.url}/v1/chat/completions", json=chat(), headers={"X-Request-Id": "mine-1", "X-Secret": "s"}
        ) as response:
            assert response.status == 200
            assert response.headers["X-Arriero-Worker"] == worker.worker_id
            assert response.headers["X-Arriero-Node"] == "andes"
            assert response.headers["X-Request-Id"] == "mine-1"
            lines = [line async for line in sse_lines(response)]
        assert [line for line in lines if line.startswith("id: ")] == [f"id: {n}" for n in range(1, 6)]
        assert lines[-2:] == ["data: [DONE]", ""]
        _, headers, body = worker.seen[0]
        assert headers["x-request-id"] == "mine-1"
        assert "x-secret" not in headers and "user-agent" not in headers
        assert body == chat()


async def test_a_whole_answer_and_an_error_keep_status_and_body(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker()
        await ready(o)
        async with o.session.post(f"{o.url}/v1/chat/completions", json=chat(stream=False)) as response:
            assert response.status == 200
            assert (await response.json())["choices"][0]["message"]["content"] == "0 1 2 3 4"
        worker.script.refuse = ArrieroError(ErrorCode.CONTEXT_LENGTH_EXCEEDED, "9000 tokens, 8192 fit")
        for is_stream in (True, False):
            async with o.session.post(
                f"{o.url}/v1/chat/completions", json=chat(stream=is_stream)
            ) as response:
                assert response.status == 400
                assert (await response.json())["error"]["message"] == "9000 tokens, 8192 fit"


async def test_a_client_that_leaves_a_silent_stream_cuts_off_the_worker(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker(script=WorkerScript(hold_after=2))
        await ready(o)
        async with o.session.post(f"{o.url}/v1/chat/completions", json=chat()) as response:
            assert response.status == 200
            async with asyncio.timeout(WAIT_S):
                await worker.held.wait()
            response.close()
        async with asyncio.timeout(WAIT_S):
            await worker.cut_off.wait()


async def test_a_worker_that_dies_in_the_stream_ends_it_with_one_error_event(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker(script=WorkerScript(break_after=3))
        await ready(o)
        async with o.session.post(f"{o.url}/v1/chat/completions", json=chat()) as response:
            text = ""
            async with asyncio.timeout(WAIT_S):
                while '"2 "' not in text:
                    text += (await response.content.readany()).decode()
                exit_ = WorkerExit(code="OUT_OF_MEMORY", exit_code=137, signal="SIGKILL", message="killed")
                andes.change(worker, state=WorkerState.FAILED, exit=exit_)
                text += (await response.content.read()).decode()
        assert "half an ev" not in text, "half an event went out"
        events = [block for block in text.split("\n\n") if "data: " in block]
        assert len(events) == 4
        assert events[-1].startswith("event: error\ndata: ")
        error = json.loads(events[-1].split("data: ")[1])["error"]
        assert error["code"] == "OUT_OF_MEMORY"
        assert error["details"]["exit_code"] == 137
        assert error["type"] == "server_error"
        assert "[DONE]" not in text


async def test_a_worker_lost_before_the_first_token_is_replaced(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        first = await andes.add_worker(script=WorkerScript(break_after=0))
        await ready(o)
        for is_stream in (True, False):
            async with o.session.post(
                f"{o.url}/v1/chat/completions", json=chat(stream=is_stream)
            ) as response:
                assert response.status == 200
                text = await response.text()
            assert "4" in text and "error" not in text
        assert first.seen, "the first worker was never asked"


async def test_an_unreachable_worker_is_tried_three_times_then_replaced(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        first = await andes.add_worker()
        await ready(o)
        await first.stop()
        async with o.session.post(f"{o.url}/v1/chat/completions", json=chat()) as response:
            assert response.status == 200
            assert "data: [DONE]" in await response.text()
        assert len(andes.spawned) == 1


async def test_the_deadline_shrinks_and_the_orchestrator_gives_up_last(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker(script=WorkerScript(hold_after=1))
        await ready(o)
        async with o.session.post(
            f"{o.url}/v1/chat/completions", json=chat(timeout=30), headers={"X-Request-Deadline": "5000"}
        ) as response:
            events = await read_events(response)
        assert events[-1]["error"]["code"] == "REQUEST_TIMEOUT"
        left_ms = float(worker.seen[0][1]["x-request-deadline"])
        assert 0 < left_ms <= 4900
        async with asyncio.timeout(WAIT_S):
            await worker.cut_off.wait()
        async with o.session.post(
            f"{o.url}/v1/chat/completions", json=chat(), headers={"X-Request-Deadline": "soon"}
        ) as response:
            assert response.status == 400


async def test_loading_is_narrated_and_then_errors_come_as_events(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        await o.until("/v1/nodes", lambda answer: answer["nodes"])
        async with o.session.post(f"{o.url}/v1/chat/completions", json=chat()) as response:
            lines = [line async for line in sse_lines(response)]
        comments = [line for line in lines if line.startswith(": ")]
        assert any(line.startswith(": [orchestrator] andes has 7.4 GiB free") for line in comments), comments
        assert any(line.startswith(": loading fraction=") for line in comments)
        assert any("worker=w-000000000001 node=andes" in line for line in comments)
        assert "data: [DONE]" in lines
        next(iter(andes.workers.values())).script.refuse = ArrieroError(ErrorCode.CONTEXT_LENGTH_EXCEEDED)
        andes.spawn.worker.refuse = ArrieroError(ErrorCode.CONTEXT_LENGTH_EXCEEDED)
        body = chat(model="file:///other.gguf")
        async with o.session.post(f"{o.url}/v1/chat/completions", json=body) as response:
            assert response.status == 200
            events = await read_events(response)
        assert [event["error"]["code"] for event in events] == ["CONTEXT_LENGTH_EXCEEDED"]


async def test_simultaneous_requests_share_one_spawn(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        await o.until("/v1/nodes", lambda answer: answer["nodes"])

        async def ask() -> None:
            async with o.session.post(f"{o.url}/v1/chat/completions", json=chat()) as response:
                assert "data: [DONE]" in await response.text()

        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(ask(), name=f"ask-{number}")
        assert len(andes.spawned) == 1


async def test_what_the_agent_refuses_keeps_its_status(tmp_path: Path) -> None:
    refusals = [
        (ArrieroError(ErrorCode.INSUFFICIENT_RAM, "needs 6000 MB, andes has 4000 MB", required_mb=6000), 507),
        (ArrieroError(ErrorCode.WORKER_START_FAILED, "refused for 60 s"), 500),
        (ArrieroError(ErrorCode.MODEL_CORRUPTED, "the header says nonsense"), 422),
    ]
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        await o.until("/v1/nodes", lambda answer: answer["nodes"])
        for refusal, status in refusals:
            andes.spawn.refuse = refusal
            async with o.session.post(f"{o.url}/v1/chat/completions", json=chat()) as response:
                assert response.status == status
                error = (await response.json())["error"]
            assert (error["code"], error["message"]) == (refusal.code, refusal.message)


async def test_a_load_that_fails_tells_all_who_wait(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        tail = ["llama_model_load: error"]
        andes.spawn.fails_with = WorkerExit(
            code="WORKER_START_FAILED", exit_code=1, message="the engine refused", log_tail=tail
        )
        await o.until("/v1/nodes", lambda answer: answer["nodes"])
        codes: list[tuple[str, Any]] = []

        async def ask() -> None:
            async with o.session.post(f"{o.url}/v1/chat/completions", json=chat(stream=False)) as response:
                error = (await response.json())["error"]
                codes.append((error["code"], error["details"]["log_tail"]))

        async with asyncio.TaskGroup() as group:
            for number in range(3):
                group.create_task(ask(), name=f"ask-{number}")
        assert codes == [("WORKER_START_FAILED", tail)] * 3
        assert len(andes.spawned) == 1


async def test_a_wrong_request_is_told_its_field(tmp_path: Path) -> None:
    wrong: list[tuple[Any, str | None]] = [
        ({"messages": []}, "model"),
        ({"model": 5}, "model"),
        ({"model": "gpt-4"}, "model"),
        ({"model": "demo", "stream": "yes"}, "stream"),
        ({"model": "demo", "arriero": "far"}, "arriero"),
        ({"model": "demo", "arriero": {"nod": "far"}}, "arriero.nod"),
        ({"model": "demo", "arriero": {"labels": {"room": 7}}}, "arriero.labels[...]"),
        ({"model": "demo", "arriero": {"labels": {"my room": "x"}}}, "arriero.labels"),
        (["demo"], None),
    ]
    async with orchestrator(tmp_path) as o:
        for body, param in wrong:
            async with o.session.post(f"{o.url}/v1/completions", json=body) as response:
                assert response.status == 400
                error = (await response.json())["error"]
            assert (error["type"], error.get("param")) == ("invalid_request_error", param)


async def test_a_request_says_where_it_is_to_be_computed(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker()
        await ready(o)
        body = chat(arriero={"node": "andes", "backend": "cpu", "device": "cpu", "labels": {}})
        async with o.session.post(f"{o.url}/v1/chat/completions", json=body) as response:
            assert (response.status, response.headers["X-Arriero-Node"]) == (200, "andes")
        assert worker.seen[0][2] == body, "it goes on as it came"
        refused = {
            "no node is called 'lima'": {"node": "lima"},
            "andes lacks the label room=attic": {"labels": {"room": "attic"}},
            "andes has the backends cpu, cuda was asked for": {"backend": "cuda"},
            "andes has the devices cpu, cuda:1 was asked for": {"device": "cuda:1"},
        }
        for message, place in refused.items():
            async with o.session.post(f"{o.url}/v1/chat/completions", json=chat(arriero=place)) as response:
                error = (await response.json())["error"]
            assert (error["message"], andes.spawned) == (message, [])


async def test_a_body_that_is_nested_without_end_is_a_wrong_request(tmp_path: Path) -> None:
    async with orchestrator(tmp_path) as o:
        deep = b"[" * 100_000 + b"]" * 100_000
        body = b'{"model": "demo", "messages": [{"content": ' + deep + b"}]}"
        for path in ("/v1/chat/completions", "/v1/tasks", "/v1/placements:explain"):
            async with o.session.post(o.url + path, data=body) as response:
                error = (await response.json())["error"]
            assert (response.status, error["message"]) == (400, "the body is nested too deeply")
