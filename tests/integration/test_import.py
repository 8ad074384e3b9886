"""Do models that lie on the machine come in whole, and does nothing else come in with them?"""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import msgspec
import pytest
from tests.integration.model_files import gguf, inspect, kit_in, sha256
from tests.integration.model_stock import Stock, stock_in

from arriero.agent import import_plan
from arriero.agent.catalog import Card
from arriero.agent.import_plan import plan
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import ImportResult, ModelRecord
from arriero.contracts.requests import ImportBody
from arriero.engines.base import ModelFacts
from arriero.testing.agents import wait_for
from arriero.testing.fault_server import FaultServer


async def bring(stock: Stock, path: Path | str, model_ref: str | None = None) -> ImportResult:
    stream = await stock.ask(stock.agent.import_models, ImportBody(path=str(path), model_ref=model_ref))
    return await stock.ask(stream.result)


async def refused(stock: Stock, path: Path | str, model_ref: str | None = None) -> ArrieroError:
    with pytest.raises(ArrieroError) as error:
        await bring(stock, path, model_ref)
    assert stock.kit.files() == [] and await stock.kit.catalog.records() == []
    return error.value


async def other_home(folder: Path, count: int = 2) -> tuple[Path, list[ModelRecord]]:
    """Return the models folder of another state folder, and what lies in it."""
    records = []
    for number in range(count):
        async with FaultServer(gguf(number)) as server, kit_in(folder) as kit:
            record, _ = await kit.provisioner.ensure(f"{server.url}/{number}.gguf")
            records.append(record)
    return folder / "models", records


# --- A file ------------------------------------------------------------------------------------


async def test_a_file_is_copied_and_named_by_where_it_lay(tmp_path: Path) -> None:
    path = tmp_path / "a model #1.gguf"
    path.write_bytes(gguf())
    async with stock_in(tmp_path / "home") as stock:
        (record,) = (await bring(stock, path)).imported
        assert record.model_ref == f"file://{quote(str(path))}"
        assert (record.source, record.provider, record.is_external) == ("import", "file", False)
        assert (record.sha256, record.architecture) == (sha256(gguf()), "llama")
        assert stock.kit.files() == [f"{record.model_id}/a model _1.gguf", f"{record.model_id}/model.json"]
        entry = await stock.kit.catalog.get(record.model_ref)
        assert entry is not None and entry.path.stat().st_nlink == 1
        path.unlink()
        assert (await stock.kit.catalog.verify(record.model_id)).model_id == record.model_id
        again = tmp_path / "again.gguf"
        again.write_bytes(gguf())
        known = await bring(stock, again, record.model_ref)
        assert (known.imported, [model.model_id for model in known.known]) == ([], [record.model_id])


@pytest.mark.parametrize(
    ("model_ref", "provider"),
    [
        ("hf:org/repo:Q4_K_M", "hf"),
        ("hf:org/repo/a.gguf@main", "hf"),
        ("https://host/a.gguf", "https"),
        ("file:///elsewhere/a.gguf", "file"),
    ],
)
async def test_a_file_is_called_as_its_person_says(tmp_path: Path, model_ref: str, provider: str) -> None:
    path = tmp_path / "blob"
    path.write_bytes(gguf())
    async with stock_in(tmp_path / "home") as stock:
        (record,) = (await bring(stock, path, model_ref)).imported
        assert (record.model_ref, record.provider, record.files) == (model_ref, provider, ["blob.gguf"])


def split(folder: Path, count: int = 3) -> list[Path]:
    paths = [folder / f"big-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    for number, path in enumerate(paths):
        path.write_bytes(gguf(number, 100_000))
    return paths


async def test_the_parts_of_a_split_model_come_together(tmp_path: Path) -> None:
    paths = split(tmp_path)
    async with stock_in(tmp_path / "home") as stock:
        (record,) = (await bring(stock, paths[0])).imported
        assert record.files == [path.name for path in paths] and record.size_bytes == 300_000
        assert [part.sha256 for part in record.parts] == [sha256(path.read_bytes()) for path in paths]


async def test_another_part_than_the_first_is_refused_and_so_is_a_gap(tmp_path: Path) -> None:
    paths = split(tmp_path)
    async with stock_in(tmp_path / "home") as stock:
        error = await refused(stock, paths[1])
        assert error.code is ErrorCode.INVALID_MODEL_PATH and "big-00001-of-00003.gguf" in error.message
        paths[2].unlink()
        error = await refused(stock, paths[0])
        assert error.code is ErrorCode.INVALID_MODEL_PATH and "big-00003-of-00003.gguf" in error.message


async def test_what_is_no_model_does_not_come_in(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.md").write_text("nothing here")
    os.mkfifo(tmp_path / "pipe.gguf")
    async with stock_in(tmp_path / "home") as stock:
        assert (await refused(stock, tmp_path / "text.gguf")).code is ErrorCode.MODEL_CORRUPTED
        error = await refused(stock, tmp_path / "empty")
        assert error.code is ErrorCode.INVALID_MODEL_PATH and "holds no model" in error.message
        for path in ("pipe.gguf", "nowhere", "text.gguf/x"):
            error = await refused(stock, tmp_path / path)
            assert error.code is ErrorCode.INVALID_MODEL_PATH, path
            assert str(tmp_path) not in f"{error.message} {error.details}"
        for wrong in ("relative.gguf", "~/x.gguf", "/x\0y", "/dev/zero"):
            assert (await refused(stock, wrong)).code is ErrorCode.INVALID_MODEL_PATH
        for ref in ("nonsense", "demo", "hf:../x"):
            error = await refused(stock, tmp_path / "text.gguf", ref)
            assert error.code is ErrorCode.INVALID_MODEL_REFERENCE
        with pytest.raises(ArrieroError) as unknown:
            await stock.ask(stock.agent.send, "POST", "/v1/models/import", body={"path": "/x", "copy": 1})
        assert unknown.value.code is ErrorCode.INVALID_REQUEST


async def test_a_copy_that_the_disk_has_no_room_for_is_not_begun(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    with path.open("wb") as file:
        file.write(gguf())
        file.truncate(2**50 if shutil.disk_usage(tmp_path).free > 2**44 else 2**43)
    async with stock_in(tmp_path / "home", inspect=lambda path: FACTS) as stock:
        error = await refused(stock, path)
        assert error.code is ErrorCode.INSUFFICIENT_DISK
        details = error.details
        assert details["required_mb"] - details["available_mb"] == pytest.approx(
            details["shortfall_mb"], abs=1
        )


FACTS = ModelFacts("llama", 4, 512, 1000, "Q8_0", 1_000_000, 10, True, False)


async def test_an_import_that_is_left_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf())
    is_inspected, may_go_on = threading.Event(), threading.Event()

    def slow(path: Path) -> ModelFacts:
        if ".partial" in path.parts:
            is_inspected.set()
            assert may_go_on.wait(60)
        return inspect(path)

    async with stock_in(tmp_path / "home", inspect=slow) as stock:
        stream = await stock.ask(stock.agent.import_models, ImportBody(path=str(path)))
        assert await stock.ask(is_inspected.wait, 10)
        assert any(".partial/import-" in name for name in stock.kit.files()), "hidden while it is not whole"
        assert await stock.kit.catalog.records() == []
        stream.close()
        # Held until the agent has seen it go: an import that was quicker would rightly be there.
        try:
            await stock.ask(wait_for, lambda: not stock.kit.files(), "nothing is left of it")
        finally:
            may_go_on.set()
        assert await stock.kit.catalog.records() == []


async def test_what_a_crash_left_of_a_copy_is_removed_at_the_next_start(tmp_path: Path) -> None:
    left = tmp_path / "models" / ".partial" / "import-0123"
    left.mkdir(parents=True)
    (left / "m.gguf").write_bytes(gguf())
    other = tmp_path / "models" / ".partial" / "abc"
    other.mkdir()
    async with kit_in(tmp_path):
        assert not left.exists() and other.exists(), "a download goes on with its parts"


# --- A folder ----------------------------------------------------------------------------------


async def test_the_models_folder_of_another_machine_keeps_its_references(tmp_path: Path) -> None:
    folder, records = await other_home(tmp_path / "other", 3)
    async with stock_in(tmp_path / "home") as stock:
        result = await bring(stock, folder)
        assert sorted(r.model_ref for r in result.imported) == sorted(r.model_ref for r in records)
        assert {r.model_id for r in result.imported} == {r.model_id for r in records}
        assert {r.source for r in result.imported} == {"import"} and result.refused == []
        again = await bring(stock, folder)
        assert again.imported == [] and len(again.known) == 3, "the second time there is nothing to do"


async def test_one_bad_model_does_not_keep_the_others(tmp_path: Path) -> None:
    folder, (bad, good) = await other_home(tmp_path / "other")
    (folder / bad.model_id / "0.gguf").write_bytes(gguf(77))
    (folder / "notes.gguf").write_text("no model")
    async with stock_in(tmp_path / "home") as stock:
        result = await bring(stock, folder)
        assert [record.model_ref for record in result.imported] == [good.model_ref]
        told = {row.name.split("/")[-1]: (row.code, row.why) for row in result.refused}
        assert told.keys() == {bad.model_id, "notes.gguf"}
        assert told[bad.model_id][0] == "MODEL_CORRUPTED" and "its card says" in told[bad.model_id][1]
        assert [name for name in stock.kit.files() if ".partial" in name] == []


async def test_a_single_bad_model_is_the_error_itself(tmp_path: Path) -> None:
    folder, (bad,) = await other_home(tmp_path / "other", 1)
    (folder / bad.model_id / "0.gguf").write_bytes(gguf(77))
    async with stock_in(tmp_path / "home") as stock:
        error = await refused(stock, folder)
        assert error.code is ErrorCode.MODEL_CORRUPTED
        assert error.details["refused"][0]["code"] == "MODEL_CORRUPTED"


async def test_a_folder_of_plain_files_below_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "usb"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    split(folder / "deep")
    for name in ("one.gguf", "deep/er/TWO.GGUF", ".hidden/three.gguf", ".four.gguf", "five.bin"):
        (folder / name).write_bytes(gguf())
    (folder / "deep" / "lost-00002-of-00002.gguf").write_bytes(gguf())
    async with stock_in(tmp_path / "home") as stock:
        result = await bring(stock, folder)
        assert sorted(record.files[0] for record in result.imported) == [
            "TWO.GGUF",
            "big-00001-of-00003.gguf",
            "one.gguf",
        ]
        assert [row.name for row in result.refused] == ["usb/deep/lost-00002-of-00002.gguf"]
        with pytest.raises(ArrieroError) as several:
            await bring(stock, folder, "hf:org/repo")
        assert several.value.code is ErrorCode.INVALID_REQUEST and "3" in several.value.message


async def test_one_model_in_a_folder_may_be_called_something(tmp_path: Path) -> None:
    folder, (record,) = await other_home(tmp_path / "other", 1)
    async with stock_in(tmp_path / "home") as stock:
        (called,) = (await bring(stock, folder / record.model_id, "hf:org/repo:Q8_0")).imported
        assert (called.model_ref, called.sha256) == ("hf:org/repo:Q8_0", record.sha256)


async def test_other_content_of_a_reference_is_not_thrown_over_ours(tmp_path: Path) -> None:
    folder, (record,) = await other_home(tmp_path / "other", 1)
    async with stock_in(tmp_path / "home") as stock:
        path = tmp_path / "mine.gguf"
        path.write_bytes(gguf(50))
        await bring(stock, path, record.model_ref)
        with pytest.raises(ArrieroError) as kept:
            await bring(stock, folder)
        assert kept.value.code is ErrorCode.INVALID_REQUEST and "remove it first" in kept.value.message
        (mine,) = await stock.kit.catalog.records()
        assert mine.sha256 == sha256(gguf(50))


def out_of_the_folder(folder: Path, secret: Path) -> Iterator[str]:
    """Make everything that could lead out of a folder; yield the names of what looks like a model."""
    (folder / "link.gguf").symlink_to(secret)
    yield "link.gguf"
    (folder / "broken.gguf").symlink_to(folder / "nowhere")
    yield "broken.gguf"
    (folder / "loop.gguf").symlink_to(folder / "loop.gguf")
    yield "loop.gguf"
    os.mkfifo(folder / "pipe.gguf")
    yield "pipe.gguf"
    (folder / "null.gguf").symlink_to("/dev/null")
    yield "null.gguf"
    (folder / "away").symlink_to(secret.parent)
    (folder / "up").symlink_to("..")


async def test_nothing_comes_from_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    secret = tmp_path / "outside" / "secret.gguf"
    secret.write_bytes(gguf(5))
    folder = tmp_path / "usb"
    (folder / "blobs").mkdir(parents=True)
    names = set(out_of_the_folder(folder, secret))
    (folder / "blobs" / "abc").write_bytes(gguf(6))
    (folder / "inside.gguf").symlink_to("blobs/abc")
    async with stock_in(tmp_path / "home") as stock:
        result = await bring(stock, folder)
        assert [record.files for record in result.imported] == [["inside.gguf"]], "a link within it is fine"
        assert {row.name.removeprefix("usb/") for row in result.refused} == names
        assert {row.code for row in result.refused} == {"INVALID_MODEL_PATH"}
        assert str(tmp_path) not in str(msgspec.to_builtins(result.refused))


async def test_a_card_names_no_file_elsewhere(tmp_path: Path) -> None:
    folder, (record,) = await other_home(tmp_path / "other", 1)
    card = folder / record.model_id / "model.json"
    good = card.read_bytes()
    secret = tmp_path / "secret.gguf"
    secret.write_bytes(gguf())
    async with stock_in(tmp_path / "home") as stock:
        for name in ("../../../secret.gguf", str(secret), "..", "model.json"):
            told = msgspec.json.decode(good, type=Card)
            files = [msgspec.structs.replace(file, name=name) for file in told.files]
            card.write_bytes(msgspec.json.encode(Card(record=told.record, files=files)))
            assert (await refused(stock, folder)).code is ErrorCode.MODEL_CORRUPTED
        card.write_bytes(good)
        model = folder / record.model_id / "0.gguf"
        model.unlink()
        model.symlink_to(secret)
        error = await refused(stock, folder)
        assert error.code is ErrorCode.INVALID_MODEL_PATH and "link out of the folder" in error.message


def test_a_folder_without_end_is_refused(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(import_plan.DEPTH_MAX + 2):
        deep /= "d"
    deep.mkdir(parents=True)
    with pytest.raises(ArrieroError) as too_deep:
        plan(str(tmp_path), None)
    assert too_deep.value.code is ErrorCode.INVALID_MODEL_PATH and "16 folders deep" in too_deep.value.message
    wide = tmp_path / "wide"
    wide.mkdir()
    for number in range(import_plan.ENTRIES_MAX + 1):
        (wide / str(number)).touch()
    with pytest.raises(ArrieroError) as too_many:
        plan(str(wide), None)
    assert "more than 20000 files" in too_many.value.message
