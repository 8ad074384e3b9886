"""Pins, prune, verify as events, and the client's methods for them, over real HTTP."""

import os
import threading
from pathlib import Path

import msgspec
import pytest
from tests.integration.model_files import gguf, kit_in
from tests.integration.model_stock import Stock, stock_in

from arriero.agent.pruning import prune
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import ModelRecord
from arriero.contracts.requests import ImportBody, PruneBody
from arriero.runtime.sse import CONTENT_TYPE, SseParser
from arriero.testing.fault_server import FaultServer

SIZE = 300_000


async def brought(stock: Stock, folder: Path, count: int) -> list[ModelRecord]:
    """Import models, the first one the longest ago."""
    found = []
    for number in range(count):
        path = folder / f"{number}.gguf"
        path.write_bytes(gguf(number))
        result = (await stock.ask(stock.agent.import_models, ImportBody(path=str(path)))).result
        (record,) = (await stock.ask(result)).imported
        found.append(record)
    return found


async def test_a_model_is_shown_and_pinned(tmp_path: Path) -> None:
    async with stock_in(tmp_path) as stock:
        (record,) = await brought(stock, tmp_path, 1)
        assert await stock.ask(stock.agent.model, record.model_id) == record
        pinned = await stock.ask(stock.agent.pin_model, record.model_id, is_pinned=True)
        assert pinned == msgspec.structs.replace(record, is_pinned=True)
        assert await stock.ask(stock.agent.model, record.model_id) == pinned


async def test_a_model_that_a_worker_has_is_not_removed(tmp_path: Path) -> None:
    async with stock_in(tmp_path) as stock:
        (record,) = await brought(stock, tmp_path, 1)
        stock.used.add(record.model_ref)
        with pytest.raises(ArrieroError) as refused:
            await stock.ask(stock.agent.remove_model, record.model_id)
        assert (refused.value.code, refused.value.details["status"]) == (ErrorCode.MODEL_IN_USE, 409)
        assert (stock.kit.models_dir / record.model_id / "0.gguf").exists()
        stock.used.clear()
        await stock.ask(stock.agent.remove_model, record.model_id)
        assert stock.kit.files() == []


@pytest.mark.parametrize("is_dry_run", [True, False])
async def test_room_is_made_by_what_was_not_used_for_longest(tmp_path: Path, is_dry_run: bool) -> None:
    async with stock_in(tmp_path) as stock:
        old, pinned, used, young, last = await brought(stock, tmp_path, 5)
        await stock.kit.catalog.set_pinned(pinned.model_id, True)
        stock.used.add(used.model_id)
        await stock.kit.catalog.touch(old.model_id)
        body = PruneBody(free_bytes=SIZE + 1, dry_run=is_dry_run)
        result = await stock.ask(stock.agent.prune_models, body)
        assert [record.model_id for record in result.removed] == [young.model_id, last.model_id]
        assert (result.freed_bytes, result.wanted_bytes, result.is_dry_run) == (
            2 * SIZE,
            SIZE + 1,
            is_dry_run,
        )
        left = {record.model_id for record in await stock.ask(stock.agent.models)}
        gone = set() if is_dry_run else {young.model_id, last.model_id}
        assert left == {record.model_id for record in (old, pinned, used, young, last)} - gone
        folders = {path.name for path in stock.kit.models_dir.iterdir() if path.name.startswith("m-")}
        assert folders == left


async def test_as_much_as_may_go_goes_and_the_numbers_tell(tmp_path: Path) -> None:
    async with stock_in(tmp_path) as stock:
        (record, pinned) = await brought(stock, tmp_path, 2)
        await stock.kit.catalog.set_pinned(pinned.model_id, True)
        result = await stock.ask(stock.agent.prune_models, PruneBody(free_bytes=10**12))
        assert (result.freed_bytes, result.wanted_bytes) == (SIZE, 10**12)
        assert [gone.model_id for gone in result.removed] == [record.model_id]


async def test_a_file_with_another_name_frees_nothing(tmp_path: Path) -> None:
    async with stock_in(tmp_path) as stock:
        (first, second) = await brought(stock, tmp_path, 2)
        os.link(stock.kit.models_dir / first.model_id / "0.gguf", tmp_path / "mine.gguf")
        result = await stock.ask(stock.agent.prune_models, PruneBody(free_bytes=SIZE))
        assert [gone.model_id for gone in result.removed] == [second.model_id]
        assert result.freed_bytes == SIZE


async def test_the_workers_are_looked_at_where_they_come_and_go(tmp_path: Path) -> None:
    asked_in: list[threading.Thread] = []

    def in_use() -> set[str]:
        asked_in.append(threading.current_thread())
        return set()

    async with kit_in(tmp_path) as kit:
        await prune(kit.catalog, in_use, free_bytes=1)
    assert asked_in == [threading.current_thread()], "no thread beside the event loop reads what it changes"


async def test_an_external_model_is_never_pruned(tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(gguf())
    async with stock_in(tmp_path) as stock:
        await stock.kit.provisioner.ensure(path.as_uri())
        result = await stock.ask(stock.agent.prune_models, PruneBody(free_bytes=1))
        assert (result.removed, result.freed_bytes, path.exists()) == ([], 0, True)


@pytest.mark.parametrize(
    "body", [{}, {"free_bytes": 0}, {"free_bytes": 2**61}, {"free_bytes": "1"}, {"free": 1}]
)
async def test_a_wrong_wish_for_room_names_the_field(tmp_path: Path, body: dict[str, object]) -> None:
    async with stock_in(tmp_path) as stock:
        with pytest.raises(ArrieroError) as refused:
            await stock.ask(stock.agent.send, "POST", "/v1/models/prune", body=body)
        assert refused.value.code is ErrorCode.INVALID_REQUEST and "free" in refused.value.message


async def test_verifying_is_followed_as_events(tmp_path: Path) -> None:
    async with stock_in(tmp_path) as stock:
        (record,) = await brought(stock, tmp_path, 1)
        path = f"/v1/models/{record.model_id}/verify"
        answer = await stock.ask(stock.agent.raw, "POST", path, headers={"Accept": CONTENT_TYPE})
        assert answer.headers["content-type"].startswith(CONTENT_TYPE)
        events = [event for event in SseParser().feed(answer.content) if event.comment is None]
        assert [event.event_id for event in events] == [str(number + 1) for number in range(len(events))]
        *frames, told, done = events
        assert done.is_done and msgspec.json.decode(told.data, type=ModelRecord) == record
        last = msgspec.json.decode(frames[-1].data)
        assert last == {"what": record.model_ref, "bytes_read": SIZE, "bytes_total": SIZE}

        stream = await stock.ask(stock.agent.verify_model_stream, record.model_id)
        assert await stock.ask(stream.result) == record
        assert await stock.ask(stock.agent.verify_model, record.model_id) == record, "and as JSON"


async def test_a_failure_in_the_middle_is_an_error_event_and_one_before_has_its_status(
    tmp_path: Path,
) -> None:
    async with stock_in(tmp_path) as stock:
        (record,) = await brought(stock, tmp_path, 1)
        (stock.kit.models_dir / record.model_id / "0.gguf").write_bytes(gguf(9))
        stream = await stock.ask(stock.agent.verify_model_stream, record.model_id)
        with pytest.raises(ArrieroError) as corrupted:
            await stock.ask(stream.result)
        assert corrupted.value.code is ErrorCode.MODEL_CORRUPTED
        with pytest.raises(ArrieroError) as unknown:
            await stock.ask(stock.agent.verify_model_stream, "m-000000000000")
        assert (unknown.value.code, unknown.value.details["status"]) == (ErrorCode.MODEL_NOT_FOUND, 404)


async def test_ranges_of_every_form(tmp_path: Path) -> None:
    content = gguf()
    async with FaultServer(content) as server, stock_in(tmp_path) as stock:
        record, path = await stock.kit.provisioner.ensure(f"{server.url}/m.gguf")
        url = f"/v1/models/{record.model_id}/files/m.gguf"
        etag = f'"{record.sha256}"'
        cases = [
            ("bytes=0-0", "", 206, content[:1]),
            ("bytes=-5", "", 206, content[-5:]),
            (f"bytes=-{2 * SIZE}", "", 206, content),
            ("bytes=5-4", "", 200, content),
            ("bytes=299999-900000", "", 206, content[-1:]),
            ("Bytes=1-2", "", 206, content[1:3]),
            ("bytes=0-1,5-6", "", 200, content),
            ("lines=0-1", "", 200, content),
            ("bytes=0-1", etag, 206, content[:2]),
            ("bytes=0-1", f"W/{etag}", 200, content),
            ("bytes=0-1", '"other"', 200, content),
            ("bytes=-0", "", 416, None),
            ("bytes=300000-", "", 416, None),
            ("bytes=300000-", '"other"', 200, content),
        ]
        for wanted, condition, status, expected in cases:
            headers = {"Range": wanted} | ({"If-Range": condition} if condition else {})
            answer = await stock.ask(stock.agent.raw, "GET", url, headers=headers)
            assert answer.status == status, (wanted, condition)
            assert expected is None or answer.content == expected, (wanted, condition)

        parts = [(start, min(start + 50_000, SIZE)) for start in range(0, SIZE, 50_000)] * 4
        answers = await stock.ask(lambda: parallel(stock, url, parts))
        assert answers == [content[start:end] for start, end in parts]

        path.write_bytes(content + b"more")
        answer = await stock.ask(stock.agent.raw, "GET", url)
        assert (answer.status, "MODEL_CORRUPTED" in answer.content.decode()) == (422, True)
        path.unlink()
        path.symlink_to("/etc/hostname")
        assert (await stock.ask(stock.agent.raw, "GET", url)).status == 422


def parallel(stock: Stock, url: str, parts: list[tuple[int, int]]) -> list[bytes]:
    """Read parts of a file over as many connections."""
    from concurrent.futures import ThreadPoolExecutor

    def read(part: tuple[int, int]) -> bytes:
        return stock.agent.raw("GET", url, headers={"Range": f"bytes={part[0]}-{part[1] - 1}"}).content

    with ThreadPoolExecutor(max_workers=len(parts)) as pool:
        return list(pool.map(read, parts))


async def test_a_models_folder_that_vanished_is_told(tmp_path: Path) -> None:
    async with stock_in(tmp_path) as stock:
        path = tmp_path / "m.gguf"
        path.write_bytes(gguf())
        stock.kit.models_dir.rename(tmp_path / "elsewhere")
        with pytest.raises(ArrieroError) as refused:
            answer = await stock.ask(stock.agent.import_models, ImportBody(path=str(path)))
            await stock.ask(answer.result)
        assert refused.value.code is ErrorCode.STATE_DIR_UNUSABLE
