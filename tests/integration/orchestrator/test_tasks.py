"""Tasks: their events, their readers, their end, and what a restart does to them."""

import asyncio
import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.integration.orchestrator.scripted import (
    WAIT_S,
    RunningOrchestrator,
    WorkerScript,
    agent,
    download_frame,
    orchestrator,
    read_events,
    sse_lines,
)

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import WorkerExit
from arriero.contracts.states import DownloadState, WorkerState

STREAM = {"Accept": "text/event-stream"}


async def ready(o: RunningOrchestrator) -> None:
    await o.until("/v1/workers", lambda answer: any(w["state"] == "idle" for w in answer["workers"]))


async def post(o: RunningOrchestrator, body: dict[str, Any], **headers: str) -> tuple[int, dict[str, Any]]:
    async with o.session.post(f"{o.url}/v1/tasks", json=body, headers=headers) as response:
        return response.status, await response.json()


async def finished(o: RunningOrchestrator, task_id: str) -> dict[str, Any]:
    record = await o.until(f"/v1/tasks/{task_id}", lambda answer: answer["finished_unix"] is not None)
    assert isinstance(record, dict)
    return record


async def test_the_events_of_a_task_come_in_order_and_its_result_stays(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        await o.until("/v1/nodes", lambda answer: answer["nodes"])
        andes.spawn.worker = WorkerScript(queue_positions=(2, 1))
        async with o.session.post(
            f"{o.url}/v1/tasks", json={"prompt": "x", "max_tokens": 5, "node": "andes"}, headers=STREAM
        ) as response:
            assert response.status == 200
            text = await response.text()
        blocks = [block for block in text.split("\n\n") if block]
        assert [block.split("\n")[0] for block in blocks] == [f"id: 1-{n + 1}" for n in range(len(blocks))]
        assert blocks[-1].endswith("data: [DONE]")
        kinds = [block.split('"type":"')[1].split('"')[0] for block in blocks[:-1]]
        order = ["accepted", "placing", "loading", "placing", "queued", "token", "usage", "end"]
        assert list(dict.fromkeys(kinds)) == list(dict.fromkeys(order))
        assert (kinds.count("token"), kinds.count("queued")) == (5, 2)
        assert "andes has 7.4 GiB free" in text
        task_id = blocks[0].split('"task_id":"')[1].split('"')[0]
        record = await o.get(f"/v1/tasks/{task_id}")
        assert (record["state"], record["text"]) == ("done", "0 1 2 3 4 ")
        assert (record["prompt_tokens"], record["completion_tokens"], record["node"]) == (3, 5, "andes")
        worker = next(iter(andes.workers.values()))
        assert worker.seen[0][2] == {"prompt": "x", "max_tokens": 5, "ignore_eos": False, "queue": True}


async def test_a_reader_goes_on_where_it_stopped_and_loses_and_doubles_nothing(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker(script=WorkerScript(tokens=8, hold_after=3))
        await ready(o)
        status, record = await post(o, {"prompt": "x"})
        assert status == 202
        events_url = f"{o.url}/v1/tasks/{record['task_id']}/events"
        seen: list[str] = []
        last_id = ""
        async with o.session.get(events_url) as response:
            async for line in sse_lines(response):
                if line.startswith("id: "):
                    last_id = line[4:]
                elif line.startswith("data: "):
                    seen.append(line)
                    if '"index":1' in line:
                        break
        worker.go_on.set()
        async with o.session.get(events_url, headers={"Last-Event-ID": last_id}) as response:
            seen += [line async for line in sse_lines(response) if line.startswith("data: ")]
        async with o.session.get(events_url) as response:
            whole = [line async for line in sse_lines(response) if line.startswith("data: ")]
        assert seen == whole
        assert sum('"type":"token"' in line for line in whole) == 8
        async with o.session.get(events_url, headers={"Last-Event-ID": "x"}) as response:
            assert response.status == 400
        assert len(worker.seen) == 1, "reading never starts anything"


async def test_an_owner_that_leaves_cancels_and_another_reader_does_not(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker(script=WorkerScript(hold_after=1))
        await ready(o)
        async with o.session.post(f"{o.url}/v1/tasks", json={"prompt": "x"}, headers=STREAM) as response:
            task_id = response.headers["Location"].rpartition("/")[2]
            async with asyncio.timeout(WAIT_S):
                await worker.held.wait()
            reader = await o.session.get(f"{o.url}/v1/tasks/{task_id}/events")
            reader.close()
            assert (await o.get(f"/v1/tasks/{task_id}"))["state"] == "running"
            response.close()
        record = await finished(o, task_id)
        assert (record["state"], record["text"]) == ("cancelled", "0 ")
        assert record["error"]["code"] == "REQUEST_CANCELLED"
        async with asyncio.timeout(WAIT_S):
            await worker.cut_off.wait()


async def test_cancelling_answers_the_same_twice(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker(script=WorkerScript(hold_after=1))
        await ready(o)
        _, record = await post(o, {"prompt": "x"})
        async with asyncio.timeout(WAIT_S):
            await worker.held.wait()
        for _ in range(2):
            async with o.session.delete(f"{o.url}/v1/tasks/{record['task_id']}") as response:
                assert response.status == 204
        assert (await finished(o, record["task_id"]))["state"] == "cancelled"
        async with o.session.delete(f"{o.url}/v1/tasks/t-0000000000000000") as response:
            assert response.status == 404


async def test_an_idempotency_key_gives_the_same_task(tmp_path: Path) -> None:
    key = {"Idempotency-Key": "order-7"}
    async with agent(tmp_path) as andes:
        async with orchestrator(tmp_path) as o:
            worker = await andes.add_worker()
            await ready(o)
            answers: list[tuple[int, dict[str, Any]]] = []

            async def ask() -> None:
                answers.append(await post(o, {"prompt": "x"}, **key))

            async with asyncio.TaskGroup() as group:
                for number in range(4):
                    group.create_task(ask(), name=f"ask-{number}")
            assert {status for status, _ in answers} == {202}
            (task_id,) = {record["task_id"] for _, record in answers}
            await finished(o, task_id)
            status, refusal = await post(o, {"prompt": "y"}, **key)
            assert (status, refusal["error"]["code"]) == (400, "INVALID_REQUEST")
        async with orchestrator(tmp_path) as o:
            status, record = await post(o, {"prompt": "x"}, **key)
            assert (status, record["task_id"], record["text"]) == (202, task_id, "0 1 2 3 4 ")
        assert len(worker.seen) == 1


async def test_a_worker_that_dies_leaves_what_came_and_one_error(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker(script=WorkerScript(break_after=3))
        await ready(o)
        async with o.session.post(f"{o.url}/v1/tasks", json={"prompt": "x"}, headers=STREAM) as response:
            task_id = response.headers["Location"].rpartition("/")[2]
            async for line in sse_lines(response):
                if '"index":2' in line:
                    break
            exit_ = WorkerExit(exit_code=137, signal="SIGKILL", message="killed by SIGKILL")
            andes.change(worker, state=WorkerState.FAILED, exit=exit_)
            rest = await response.text()
        assert rest.count("event: error") == 1 and "[DONE]" not in rest
        record = await finished(o, task_id)
        assert (record["state"], record["text"], record["completion_tokens"]) == ("failed", "0 1 2 ", 3)
        assert record["error"]["code"] == "WORKER_LOST"
        assert record["error"]["details"]["signal"] == "SIGKILL"


async def test_a_loss_before_the_first_token_is_made_good_and_told(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        first = await andes.add_worker(script=WorkerScript(break_after=0))
        await ready(o)
        async with o.session.post(f"{o.url}/v1/tasks", json={"prompt": "x"}, headers=STREAM) as response:
            events = await read_events(response)
        assert [event["index"] for event in events if event.get("type") == "token"] == list(range(5))
        told = [event["message"] for event in events if "once more" in event.get("message", "")]
        assert len(told) == 1 and first.worker_id in told[0]


async def test_a_full_queue_is_asked_again(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker(script=WorkerScript(refuse=ArrieroError(ErrorCode.QUEUE_FULL)))
        await ready(o)
        _, record = await post(o, {"prompt": "x"})
        async with asyncio.timeout(WAIT_S):
            await worker.asked.wait()
        worker.script.refuse = None
        assert (await finished(o, record["task_id"]))["state"] == "done"


async def test_a_download_is_told_and_its_error_keeps_its_code(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        await o.until("/v1/nodes", lambda answer: answer["nodes"])
        andes.download_frames = [
            download_frame(DownloadState.DOWNLOADING, 400),
            download_frame(DownloadState.VERIFYING, 1000),
            download_frame(DownloadState.COMPLETE, 1000),
        ]
        body = {"prompt": "x", "model": "hf:org/repo:Q4_K_M"}
        async with o.session.post(f"{o.url}/v1/tasks", json=body, headers=STREAM) as response:
            events = await read_events(response)
        bytes_told = [event["bytes_downloaded"] for event in events if event.get("type") == "downloading"]
        assert (bytes_told[0], bytes_told[-1]) == (400, 1000)
        assert andes.downloaded == ["hf:org/repo:Q4_K_M"]
        andes.download_frames = []
        andes.download_error = ArrieroError(ErrorCode.MODEL_ACCESS_DENIED, "the Hub refuses")
        chat = {"model": "hf:org/gated", "stream": True, "messages": []}
        async with o.session.post(f"{o.url}/v1/chat/completions", json=chat) as response:
            assert response.status == 403
            assert (await response.json())["error"]["code"] == "MODEL_ACCESS_DENIED"


async def test_a_download_is_left_also_by_who_went_before_it_was_answered(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        await o.until("/v1/nodes", lambda answer: answer["nodes"])
        andes.download_frames = [download_frame(DownloadState.DOWNLOADING, 400)] * 20
        andes.download_gate.clear()
        _, record = await post(o, {"prompt": "x", "model": "hf:org/repo:Q4_K_M"})
        async with asyncio.timeout(WAIT_S):
            while not andes.downloaded:  # noqa: ASYNC110 - It is asked by another process.
                await asyncio.sleep(0.02)
        async with o.session.delete(f"{o.url}/v1/tasks/{record['task_id']}") as response:
            assert response.status == 204
        assert (await finished(o, record["task_id"]))["state"] == "cancelled"
        andes.download_gate.set()
        async with asyncio.timeout(WAIT_S):
            assert await andes.left.get() == "h-1"


async def test_a_worker_that_is_there_first_takes_what_waits_for_one_that_is_fetched_or_loads(
    tmp_path: Path,
) -> None:
    def is_made(task: dict[str, Any]) -> bool:
        return bool(task["state"] == "provisioning")

    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        await o.until("/v1/nodes", lambda answer: answer["nodes"])
        andes.download_frames = [download_frame(DownloadState.DOWNLOADING, 400)] * 100
        _, fetched = await post(o, {"prompt": "x", "model": "hf:org/repo:Q4_K_M"})
        await o.until(f"/v1/tasks/{fetched['task_id']}", is_made)
        body = {"model": "hf:org/repo:Q4_K_M"}
        async with o.session.post(f"{o.url}/v1/placements:explain", json=body) as response:
            explained = await response.json()
        assert explained["would_join"] == {"node": "andes", "message": "fetches hf:org/repo:Q4_K_M"}
        await andes.add_worker("hf:org/repo:Q4_K_M")
        assert (await finished(o, fetched["task_id"]))["state"] == "done"
        async with asyncio.timeout(5):
            assert await andes.left.get() == "h-1"
        assert andes.spawned == []
        andes.spawn.load_gate = asyncio.Event()
        _, loading = await post(o, {"prompt": "x"})
        await o.until(f"/v1/tasks/{loading['task_id']}", is_made)
        await andes.add_worker()
        assert (await finished(o, loading["task_id"]))["state"] == "done"
        andes.spawn.load_gate.set()


async def test_no_worker_is_made_for_who_was_served_when_the_model_had_just_come(tmp_path: Path) -> None:
    ref = "hf:org/repo:Q4_K_M"

    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:

        async def joins() -> bool:
            async with o.session.post(f"{o.url}/v1/placements:explain", json={"model": ref}) as response:
                return (await response.json())["would_join"] is not None

        await o.until("/v1/nodes", lambda answer: answer["nodes"])
        # It is told of as complete, and not yet as one of its node's models.
        andes.download_frames = [download_frame(DownloadState.COMPLETE, 1000)]
        _, record = await post(o, {"prompt": "x", "model": ref})
        await o.until(f"/v1/tasks/{record['task_id']}", lambda task: task["state"] == "provisioning")
        worker = await andes.add_worker(ref)
        assert (await finished(o, record["task_id"]))["state"] == "done"
        andes.change(worker, state=WorkerState.STOPPED)
        await o.until("/v1/workers", lambda answer: not answer["workers"])
        async with asyncio.timeout(5):
            while await joins():  # noqa: ASYNC110 - Another process.
                await asyncio.sleep(0.02)
        assert andes.spawned == []


async def test_a_deadline_ends_a_task_as_timed_out(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path) as o:
        worker = await andes.add_worker(script=WorkerScript(hold_after=1))
        await ready(o)
        _, record = await post(o, {"prompt": "x", "timeout": 5})
        record = await finished(o, record["task_id"])
        assert (record["state"], record["error"]["code"]) == ("timed_out", "REQUEST_TIMEOUT")
        async with asyncio.timeout(WAIT_S):
            await worker.cut_off.wait()
        assert float(worker.seen[0][1]["x-request-deadline"]) < 5000


async def test_a_wrong_task_is_refused_before_it_is_one(tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str, str | None]] = [
        ({}, "INVALID_REQUEST", "prompt"),
        ({"prompt": "x", "messages": [{}]}, "INVALID_REQUEST", "messages"),
        ({"prompt": "x", "max_tokens": 0}, "INVALID_REQUEST", "max_tokens"),
        ({"prompt": "x", "nonsense": 1}, "INVALID_REQUEST", "nonsense"),
        ({"prompt": "x", "model": "gpt-4"}, "INVALID_MODEL_REFERENCE", None),
    ]
    async with orchestrator(tmp_path) as o:
        for body, code, param in wrong:
            status, answer = await post(o, body, **STREAM)
            assert (status, answer["error"]["code"]) == (400, code)
            assert answer["error"]["details"].get("param") == param


async def tasks_on_disk(database: Path, number: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while True:
            with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
                if connection.execute("SELECT count(*) FROM tasks").fetchone()[0] == number:
                    return
            await asyncio.sleep(0.01)


async def test_after_a_kill_accepted_tasks_run_again_and_owned_ones_are_cancelled(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes:
        worker = await andes.add_worker(script=WorkerScript(hold_after=1))
        async with orchestrator(tmp_path) as o:
            await ready(o)
            _, accepted = await post(o, {"prompt": "x"})
            async with o.session.post(f"{o.url}/v1/tasks", json={"prompt": "x"}, headers=STREAM) as response:
                owned_id = response.headers["Location"].rpartition("/")[2]
                async for line in sse_lines(response):
                    if '"index":0' in line:
                        break
                # An owned task is written down beside its run: only an accepted one is there at once.
                await tasks_on_disk(tmp_path / "orchestrator.db", 2)
                o.process.kill()
                await o.process.wait()
                with pytest.raises(aiohttp.ClientError):
                    await response.content.read()
        worker.script.hold_after = None
        async with orchestrator(tmp_path) as o:
            record = await finished(o, accepted["task_id"])
            assert (record["state"], record["text"]) == ("done", "0 1 2 3 4 ")
            assert (await finished(o, owned_id))["state"] == "cancelled"
            # What was seen of the first run says nothing of the second.
            async with o.session.get(
                f"{o.url}/v1/tasks/{accepted['task_id']}/events", headers={"Last-Event-ID": "1-4"}
            ) as response:
                first = await anext(sse_lines(response))
            assert first == "id: 2-1"


async def test_sigterm_lets_a_stream_end_and_then_ends(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path, stop_grace_s="10") as o:
        worker = await andes.add_worker(script=WorkerScript(hold_after=2))
        await ready(o)
        async with o.session.post(f"{o.url}/v1/tasks", json={"prompt": "x"}, headers=STREAM) as response:
            async with asyncio.timeout(WAIT_S):
                await worker.held.wait()
            o.process.terminate()
            await o.until_refused()
            worker.go_on.set()
            events = await read_events(response)
        assert events[-1] == {"DONE": True}
        async with asyncio.timeout(WAIT_S):
            assert await o.process.wait() == 0
        assert not (tmp_path / "run" / "orchestrator.json").exists()


async def test_sigterm_ends_a_stream_that_does_not_end_itself(tmp_path: Path) -> None:
    async with agent(tmp_path) as andes, orchestrator(tmp_path, stop_grace_s="0.5") as o:
        worker = await andes.add_worker(script=WorkerScript(hold_after=2))
        await ready(o)
        body = {"model": "demo", "stream": True, "messages": []}
        async with o.session.post(f"{o.url}/v1/chat/completions", json=body) as response:
            async with asyncio.timeout(WAIT_S):
                await worker.held.wait()
            o.process.terminate()
            events = await read_events(response)
        assert events[-1]["error"]["code"] == "REQUEST_CANCELLED"
        async with asyncio.timeout(WAIT_S):
            assert await o.process.wait() == 0


async def test_in_the_background_it_leaves_when_there_is_no_work(tmp_path: Path) -> None:
    async with (
        agent(tmp_path) as andes,
        orchestrator(tmp_path, "--background", orchestrator_idle_s="5") as o,
    ):
        worker = await andes.add_worker(script=WorkerScript(hold_after=1))
        await ready(o)
        _, record = await post(o, {"prompt": "x"})
        async with asyncio.timeout(WAIT_S):
            await worker.held.wait()
        # Longer than the idle time: work keeps it.
        await asyncio.sleep(5.3)
        worker.go_on.set()
        assert (await finished(o, record["task_id"]))["state"] == "done"
        async with asyncio.timeout(WAIT_S):
            assert await o.process.wait() == 0


async def test_in_the_background_it_stays_while_a_machine_is_being_added(tmp_path: Path) -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    mute = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    port = mute.sockets[0].getsockname()[1]
    async with (
        mute,
        orchestrator(tmp_path, "--background", orchestrator_idle_s="5", connect_timeout_s="2.5") as o,
    ):
        body = {"name": "far", "ssh": f"u@127.0.0.1:{port}"}
        async with o.session.post(f"{o.url}/v1/nodes", json=body) as response:
            events = await read_events(response)
        # After three attempts, longer than it would stay without them.
        assert events[-1]["error"]["code"] == "NODE_UNREACHABLE"
