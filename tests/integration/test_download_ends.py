"""What is left of a download when its end goes wrong: the database fails, a source is damaged, it is left?

Method: real files, a real database that another connection breaks, held servers.
"""

import os
import sqlite3
import string
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from tests.integration.model_files import SIZE_BYTES, Kit, gguf, kit_in, sha256

from arriero.agent import partial_folder
from arriero.agent.partial import Mark, Partial
from arriero.agent.provisioner import Ticket
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import DownloadFrame
from arriero.contracts.states import DownloadState
from arriero.engines.base import ModelFacts
from arriero.testing.fault_server import Answer, FaultServer
from arriero.testing.hub import HubServer


def _break(database: Path, statement: str) -> None:
    """Change the schema behind the agent's back: from now on some of its statements fail."""
    connection = sqlite3.connect(database)
    connection.execute(statement)
    connection.commit()
    connection.close()


async def _seen(kit: Kit, ticket: Ticket, is_it: Callable[[DownloadFrame], bool]) -> None:
    """Return once a download has told what is waited for."""
    async with aclosing(kit.provisioner.frames(ticket.download_id)) as frames:
        async for _, frame in frames:
            if is_it(frame):
                return
    raise AssertionError("the download ended before")


async def test_a_database_that_fails_at_the_end_does_not_undo_a_download(tmp_path: Path) -> None:
    async with (
        FaultServer(gguf(), [Answer(hold_after=100_000), Answer()]) as server,
        kit_in(tmp_path) as kit,
    ):
        ticket = kit.provisioner.start(f"{server.url}/m.gguf")
        await _seen(kit, ticket, lambda frame: frame.bytes_downloaded > 0)
        _break(tmp_path / "agent.db", "DROP TABLE downloads")
        server.go_on.set()
        _, path = await kit.provisioner.wait(ticket.download_id)
        assert path.read_bytes() == server.content
        # The next one fails, and the agent lives on.
        with pytest.raises(ArrieroError):
            await kit.provisioner.ensure(f"{server.url}/other.gguf")
        assert (await kit.provisioner.ensure(f"{server.url}/m.gguf"))[1] == path


async def test_a_fault_in_one_download_is_told_and_ends_no_other(tmp_path: Path) -> None:
    def inspect(path: Path) -> ModelFacts:
        raise LookupError("a fault of ours")

    async with FaultServer(gguf()) as server, kit_in(tmp_path, inspect=inspect) as kit:
        for name in ("one", "two"):
            with pytest.raises(ArrieroError) as refused:
                await kit.provisioner.ensure(f"{server.url}/{name}.gguf")
            assert refused.value.code is ErrorCode.INTERNAL_ERROR
        assert {record.state for record in kit.provisioner.records()} == {DownloadState.FAILED}


async def test_a_model_that_could_not_be_entered_is_entered_when_it_is_asked_for_again(
    tmp_path: Path,
) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        _break(
            tmp_path / "agent.db",
            "CREATE TRIGGER full BEFORE INSERT ON models BEGIN SELECT missing() ; END",
        )
        with pytest.raises(ArrieroError):
            await kit.provisioner.ensure(f"{server.url}/m.gguf")
        asked = len(server.requests)
        _break(tmp_path / "agent.db", "DROP TRIGGER full")
        _, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        assert path.read_bytes() == server.content
        assert len(server.requests) == asked, "what is here whole is not fetched again"


async def test_a_damaged_copy_of_the_same_content_is_not_taken_for_it(tmp_path: Path) -> None:
    content = gguf()
    async with HubServer() as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        hub.add("o/r", {"m-Q8_0.gguf": content})
        hub.add("o/same", {"m-Q8_0.gguf": content})
        record, path = await kit.provisioner.ensure("hf:o/r")
        before = path.stat()
        # As a disk that forgets bits does it: size and time are what they were.
        path.write_bytes(bytes(len(content)))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        other, other_path = await kit.provisioner.ensure("hf:o/same")
        assert other_path.read_bytes() == content and other.sha256 == sha256(content) == record.sha256


async def test_a_failed_clean_download_takes_nothing_from_the_one_that_comes_after_it(tmp_path: Path) -> None:
    content = gguf()
    async with HubServer(rate_bytes_per_s=SIZE_BYTES) as hub, kit_in(tmp_path, hf_endpoint=hub.url) as kit:
        for repo in ("o/r", "o/same"):
            hub.add(repo, {"m-Q8_0.gguf": content})
        # So much to remove that the next one has begun before it is done.
        folder = partial_folder.path_of(kit.models_dir, sha256(content))
        folder.mkdir(parents=True)
        (folder / "m-Q8_0.gguf.part").touch()
        for name in string.ascii_lowercase:
            (folder / name).mkdir(parents=True)
            for number in range(500):
                (folder / name / str(number)).touch()
        hub.faults.failing_bytes, hub.faults.retry_after = 1000, "1"
        first = kit.provisioner.start("hf:o/r", clean=True)
        await _seen(kit, first, lambda frame: frame.retry_reason is not None)
        second = kit.provisioner.start("hf:o/same")
        await _seen(kit, second, lambda frame: frame.source == "hub")  # It waits for its turn, and tells so.
        hub.faults.failing_bytes = 2
        _, path = await kit.provisioner.wait(second.download_id)
        assert path.read_bytes() == content
        assert kit.provisioner.record(first.download_id).state is DownloadState.FAILED


async def test_a_folder_of_other_content_that_cannot_be_removed_stays(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        ref = f"{server.url}/m.gguf"
        record, path = await kit.provisioner.ensure(ref)
        # Somebody put a file in the folder's place.
        path.unlink()
        (path.parent / "model.json").unlink()
        path.parent.rmdir()
        path.parent.write_bytes(b"no folder")
        server.content = gguf(2)
        other, _ = await kit.provisioner.ensure(ref)
        assert other.model_id != record.model_id
        # What stands there is no model's folder, and not ours to remove.
        assert path.parent.read_bytes() == b"no folder"


async def test_a_journal_that_tells_nonsense_costs_what_it_tells_of(tmp_path: Path) -> None:
    # Without a length nothing but the journal says how far a part may lie.
    mark = Mark(url="https://models.example/m.gguf", etag='"one"')
    partial = await Partial.open(tmp_path, "m.gguf", mark, 16)
    await partial.write([(0, [b"0123456789"])], mark=mark)
    await partial.close()
    with (tmp_path / "m.gguf.journal").open("ab") as journal:
        journal.write(b"999999999999999999 5 3\n")
    partial = await Partial.open(tmp_path, "m.gguf", mark, 16)
    try:
        assert partial.parts.done_bytes == 10
    finally:
        await partial.close()


async def test_files_that_cannot_be_removed_are_told(tmp_path: Path) -> None:
    async with FaultServer(gguf()) as server, kit_in(tmp_path) as kit:
        record, path = await kit.provisioner.ensure(f"{server.url}/m.gguf")
        path.parent.rename(tmp_path / "elsewhere")
        path.parent.write_bytes(b"no folder")
        with pytest.raises(ArrieroError) as refused:
            await kit.catalog.remove(record.model_id)
        assert refused.value.code is ErrorCode.STATE_DIR_UNUSABLE
