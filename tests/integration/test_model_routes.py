"""Do the agent's routes for models say what section 3 of the design says?  Over real HTTP."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from tests.integration.model_files import Kit, gguf, kit_in

from arriero.agent.routes.catalog import catalog_routes
from arriero.agent.routes.downloads import DownloadAccepted, download_routes
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import DownloadList, DownloadRecord, ModelList, ModelRecord
from arriero.contracts.requests import DownloadBody
from arriero.contracts.states import DownloadState
from arriero.runtime.asgi import Guard
from arriero.runtime.http import Http, Peer
from arriero.runtime.litestar_app import make_app
from arriero.runtime.serve import bind, serve, url_of
from arriero.runtime.sse import SseEvent
from arriero.runtime.tasks import start_ready
from arriero.testing.fault_server import Answer, FaultServer


@dataclass(slots=True)
class Served:
    kit: Kit
    peer: Peer

    async def start(self, ref: str) -> DownloadAccepted:
        return await self.peer.call(
            "POST", "/v1/models/download", answer=DownloadAccepted, body=DownloadBody(model_ref=ref)
        )

    async def events(self, path: str) -> list[SseEvent]:
        return [event async for event in self.peer.events(path)]

    async def fetched(self, ref: str) -> ModelRecord:
        await self.events((await self.start(ref)).progress_url)
        (record,) = (await self.peer.call("GET", "/v1/models", answer=ModelList)).models
        return record

    async def get(self, path: str, **headers: str) -> tuple[int, Mapping[str, str], bytes]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.peer.request("GET", path, headers=sent) as response:
            return response.status, response.headers, await response.read()


@asynccontextmanager
async def served_in(tmp_path: Path) -> AsyncGenerator[Served, None]:
    async with kit_in(tmp_path) as kit:
        app: Any = make_app(
            [*catalog_routes(kit.catalog), *download_routes(kit.provisioner, kit.catalog, beat_s=0.05)],
            title="agent",
        )
        stop, sock = asyncio.Event(), bind("127.0.0.1", 0)

        async def run(announce: Any) -> None:
            async def on_started() -> None:
                announce(url_of(sock))

            await serve(Guard(app), sock, stop=stop, grace_s=1, on_started=on_started)

        async with asyncio.TaskGroup() as group, Http() as http:
            url = await start_ready(group, run, name="serve")
            try:
                yield Served(kit, http.peer(url))
            finally:
                stop.set()


async def test_a_download_is_accepted_followed_and_listed(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, served_in(tmp_path) as served:
        accepted = await served.start(f"{server.url}/m.gguf")
        assert accepted.progress_url == f"/v1/models/download/progress?download_id={accepted.download_id}"
        events = await served.events(accepted.progress_url)
        told = [event for event in events if event.comment is None]
        ids = [int(event.event_id) for event in told]
        assert told[-1].data == "[DONE]" and ids == sorted(set(ids)) and ids[0] >= 1
        last = msgspec.json.decode(told[-2].data)
        assert last["stage"] == "complete" and Path(last["local_path"]).name == "m.gguf"

        listed = await served.peer.call("GET", "/v1/downloads", answer=DownloadList)
        assert [record.state for record in listed.downloads] == [DownloadState.COMPLETE]
        late = await served.events(accepted.progress_url)
        assert [event.data for event in late if event.comment is None][-1] == "[DONE]"


async def test_a_reader_that_comes_back_gets_what_it_has_not_seen(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, served_in(tmp_path) as served:
        accepted = await served.start(f"{server.url}/m.gguf")
        told = [e for e in await served.events(accepted.progress_url) if e.comment is None]
        last = told[-2]
        assert '"complete"' in last.data

        async def again(last_event_id: str) -> list[str]:
            events = served.peer.events(accepted.progress_url, headers={"Last-Event-ID": last_event_id})
            return [event.data async for event in events if event.comment is None]

        assert await again(last.event_id) == ["[DONE]"]
        assert await again(str(int(last.event_id) - 1)) == [last.data, "[DONE]"]
        for never_told in ("99999", "nonsense", "-1", "9" * 30):
            assert await again(never_told) == [last.data, "[DONE]"]


async def test_the_last_one_to_leave_a_download_cancels_it(tmp_path: Path) -> None:
    async with (
        FaultServer(gguf(), [Answer(stall_after=1000)]) as server,
        served_in(tmp_path) as served,
    ):
        first, second, third = [await served.start(f"{server.url}/m.gguf") for _ in range(3)]
        assert first.download_id == second.download_id == third.download_id

        async def leave(query: str) -> DownloadRecord:
            path = f"/v1/downloads/{first.download_id}{query}"
            return await served.peer.call("DELETE", path, answer=DownloadRecord)

        assert (await leave(f"?holder={first.holder}")).holders == 2
        # Leaving twice is as leaving once.
        assert (await leave(f"?holder={first.holder}")).holders == 2
        assert (await leave("")).state is DownloadState.DOWNLOADING
        last = await leave("")
        assert last.state is DownloadState.CANCELLED and last.holders == 0


async def test_a_download_that_is_to_be_clean_leaves_nothing(tmp_path: Path) -> None:
    async with (
        FaultServer(gguf(), [Answer(stall_after=100_000)]) as server,
        served_in(tmp_path) as served,
    ):
        for clean in (False, True):
            body = {"model_ref": f"{server.url}/m.gguf", "clean": clean}
            server.is_stalling.clear()
            accepted = await served.peer.call(
                "POST", "/v1/models/download", body=body, answer=DownloadAccepted
            )
            await server.is_stalling.wait()
            await served.peer.call("DELETE", f"/v1/downloads/{accepted.download_id}")
            assert bool(served.kit.files()) is not clean


async def test_a_failed_download_ends_with_its_error(tmp_path: Path) -> None:
    async with FaultServer(gguf(), [Answer(status=404)]) as server, served_in(tmp_path) as served:
        events = await served.events((await served.start(f"{server.url}/m.gguf")).progress_url)
        assert events[-1].event == "error"
        error = msgspec.json.decode(events[-1].data)["error"]
        assert error["code"] == "MODEL_NOT_FOUND" and error["details"]["suggested_action"]
        assert not any(event.is_done for event in events)


async def test_a_silent_download_beats_and_can_be_cancelled(tmp_path: Path) -> None:
    async with (
        FaultServer(gguf(), [Answer(is_mute=True)]) as server,
        served_in(tmp_path) as served,
    ):
        accepted = await served.start(f"{server.url}/m.gguf")
        stream = served.peer.events(accepted.progress_url)
        async for event in stream:
            if event.comment is not None:
                break
        record = await served.peer.call(
            "DELETE", f"/v1/downloads/{accepted.download_id}", answer=DownloadRecord
        )
        assert record.state is DownloadState.CANCELLED
        last = [event async for event in stream][-1]
        assert last.event == "error" and "REQUEST_CANCELLED" in last.data


@pytest.mark.parametrize(
    ("method", "path", "body", "code"),
    [
        ("POST", "/v1/models/download", {"model_ref": "nonsense"}, ErrorCode.INVALID_MODEL_REFERENCE),
        ("POST", "/v1/models/download", {"model": "demo"}, ErrorCode.INVALID_REQUEST),
        ("GET", "/v1/models/download/progress?download_id=d-1", None, ErrorCode.NOT_FOUND),
        ("GET", "/v1/models/download/progress", None, ErrorCode.INVALID_REQUEST),
        ("DELETE", "/v1/downloads/d-1", None, ErrorCode.NOT_FOUND),
        ("DELETE", "/v1/models/m-1", None, ErrorCode.MODEL_NOT_FOUND),
        ("POST", "/v1/models/m-1/verify", None, ErrorCode.MODEL_NOT_FOUND),
        ("GET", "/v1/models/m-1/files/x", None, ErrorCode.MODEL_NOT_FOUND),
        ("GET", "/v1/models/m-1", None, ErrorCode.MODEL_NOT_FOUND),
        ("PUT", "/v1/models/m-1/pin", {"is_pinned": True}, ErrorCode.MODEL_NOT_FOUND),
        ("PUT", "/v1/models/m-1/pin", {"is_pinned": 1}, ErrorCode.INVALID_REQUEST),
    ],
)
async def test_wrong_requests_get_their_status(
    tmp_path: Path, method: str, path: str, body: object, code: ErrorCode
) -> None:
    async with served_in(tmp_path) as served:
        with pytest.raises(ArrieroError) as refused:
            await served.peer.call(method, path, body=body)
    assert refused.value.code is code


async def test_a_model_is_verified_and_removed(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, served_in(tmp_path) as served:
        record = await served.fetched(f"{server.url}/m.gguf")
        path = f"/v1/models/{record.model_id}"
        assert await served.peer.call("POST", f"{path}/verify", answer=ModelRecord) == record
        file = served.kit.models_dir / record.model_id / "m.gguf"
        file.write_bytes(gguf(2))
        with pytest.raises(ArrieroError) as corrupted:
            await served.peer.call("POST", f"{path}/verify")
        assert corrupted.value.code is ErrorCode.MODEL_CORRUPTED
        await served.peer.call("DELETE", path)
        assert (await served.peer.call("GET", "/v1/models", answer=ModelList)).models == []
        assert served.kit.files() == []


async def test_a_file_is_sent_whole_and_in_ranges(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, served_in(tmp_path) as served:
        record = await served.fetched(f"{server.url}/m.gguf")
        path = f"/v1/models/{record.model_id}/files/m.gguf"
        status, headers, content = await served.get(path)
        assert (status, content) == (200, gguf())
        assert headers["ETag"] == f'"{record.sha256}"' and headers["Accept-Ranges"] == "bytes"
        assert (await served.get(path, Range="bytes=10-19"))[::2] == (206, gguf()[10:20])
        status, headers, content = await served.get(path, Range="bytes=299990-")
        assert (status, headers["Content-Range"], content) == (
            206,
            "bytes 299990-299999/300000",
            gguf()[-10:],
        )
        assert (await served.get(path, Range="bytes=0-9", If_Range='"other"'))[0] == 200
        assert (await served.get(path, Range="bytes=0-9", If_Range=f'"{record.sha256}"'))[0] == 206
        status, headers, content = await served.get(path, Range="bytes=300000-")
        assert (status, headers["Content-Range"]) == (416, "bytes */300000")
        assert msgspec.json.decode(content)["error"]["code"] == "INVALID_REQUEST"


@pytest.mark.parametrize("name", ["model.json", "..", "../agent.db", "/etc/passwd", "M.GGUF", "m.gguf\0"])
async def test_no_other_file_is_sent(tmp_path: Path, name: str) -> None:
    async with FaultServer(gguf()) as server, served_in(tmp_path) as served:
        record = await served.fetched(f"{server.url}/m.gguf")
        path = f"/v1/models/{record.model_id}/files/{quote(name, safe='')}"
        status, _, content = await served.get(path)
        # A client resolves ".." itself and lands on the route of the model's record.
        assert status == 404 or (name, status) == ("..", 200)
        assert "error" in msgspec.json.decode(content) or name == ".."


async def test_another_agent_fetches_a_model_from_here(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    async with FaultServer(gguf()) as server, served_in(tmp_path / "one") as served:
        record = await served.fetched(f"{server.url}/m.gguf")
        async with kit_in(tmp_path / "other") as other:
            ref = f"{served.peer.url}/v1/models/{record.model_id}/files/m.gguf"
            copied, path = await other.provisioner.ensure(ref)
            assert copied.sha256 == record.sha256 and path.read_bytes() == gguf()
