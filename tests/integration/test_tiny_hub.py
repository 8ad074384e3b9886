"""Does the tiny Hub do what the real one does, and go wrong as it is told to?"""

import asyncio
from pathlib import Path

import aiohttp
import pytest

from arriero.testing.hub import HubServer
from arriero.testing.hub_content import part_of

CONTENT = bytes(range(256)) * 1000


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (None, None),
        ("bytes=10-19", (10, 20)),
        ("bytes=10-", (10, 100)),
        ("bytes=-10", (90, 100)),
        ("bytes=90-1000", (90, 100)),
        ("bytes=0-0", (0, 1)),
        ("bytes=100-", (100, 100)),
        ("bytes=1-2,4-5", None),
        ("bytes=-", None),
    ],
)
def test_the_part_that_a_range_asks_for(header: str | None, part: tuple[int, int] | None) -> None:
    assert part_of(header, 100) == part


async def _get(session: aiohttp.ClientSession, url: str, wanted: str | None = None) -> tuple[int, bytes]:
    headers = {"Range": wanted} if wanted else {}
    async with session.get(url, headers=headers) as response:
        return response.status, await response.read()


async def test_parts_of_a_file_on_the_disk_come_over_several_connections_at_once(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(CONTENT)
    async with HubServer(rate_bytes_per_s=1_000_000) as hub, aiohttp.ClientSession() as session:
        hub.add("o/r", {"m.gguf": tmp_path / "m.gguf", "README.md": b"hello"})
        url = f"{hub.url}/o/r/resolve/main/m.gguf"
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(_get(session, url, f"bytes={start}-{start + 63_999}"))
                for start in range(0, len(CONTENT), 64_000)
            ]
        assert b"".join(task.result()[1] for task in tasks) == CONTENT
        assert {task.result()[0] for task in tasks} == {206} and hub.connections_max > 1
        assert (await _get(session, url, "bytes=256000-"))[0] == 416
        assert await _get(session, f"{hub.url}/o/r/resolve/main/README.md") == (200, b"hello")


async def test_addresses_run_out_by_use_and_by_age() -> None:
    async with HubServer() as hub, aiohttp.ClientSession() as session:
        hub.add("o/r", {"m.gguf": CONTENT})
        url = f"{hub.url}/o/r/resolve/main/m.gguf"
        async with session.get(url, allow_redirects=False) as answer:
            address = answer.headers["Location"]
            assert answer.headers["X-Linked-Size"] == str(len(CONTENT))
        hub.faults.address_uses_max = 2
        assert [(await _get(session, address))[0] for _ in range(3)] == [200, 200, 403]
        hub.faults.address_uses_max, hub.faults.address_life_s = None, 0.0
        assert (await _get(session, address))[0] == 403 == (await _get(session, url))[0]
        hub.faults.address_life_s, hub.faults.tells_linked = 60.0, False
        async with session.get(url) as answer:
            assert answer.status == 200 and "X-Linked-Etag" not in answer.history[0].headers


async def test_requests_fail_as_often_as_they_are_told_to() -> None:
    async with HubServer() as hub, aiohttp.ClientSession() as session:
        hub.add("o/r", {"m.gguf": CONTENT})
        hub.faults.failing_bytes, hub.faults.status, hub.faults.retry_after = 2, 429, "3"
        url = f"{hub.url}/o/r/resolve/main/m.gguf"
        async with session.get(url) as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (429, "3")
        assert [(await _get(session, url))[0] for _ in range(2)] == [429, 200]
