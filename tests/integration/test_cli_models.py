"""Do the commands that keep a machine's models in order do what they say?  Real programs alone."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.home import Home, until
from tests.support.other_programs import ollama, sha256

from arriero.testing.gguf_writer import write_llama


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with Home(engine="fake") as made:
        # The agent's person: other programs' models are looked for below.
        made.env["HOME"] = str(tmp_path / "person")
        for name in ("HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS", "LLAMA_CACHE", "XDG_CACHE_HOME"):
            made.env.pop(name, None)
        (tmp_path / "person").mkdir()
        yield made
        made.run("down")


def imported(home: Home, path: Path, ref: str) -> dict[str, Any]:
    done = home.run("models", "import", str(path), "--as", ref, "--json")
    assert done.code == 0, done
    (record,) = done.json["imported"]
    found: dict[str, Any] = record
    return found


def refs(home: Home) -> set[str]:
    return {record["model_ref"] for record in home.run("models", "list", "--json").json["models"]}


def test_a_model_is_imported_shown_pinned_pruned_and_removed(home: Home, tmp_path: Path) -> None:
    file = write_llama(tmp_path / "tiny.gguf")
    first = imported(home, file, "hf:o/first:Q8_0")
    second = imported(home, file, "hf:o/second:Q8_0")
    assert first["source"] == "import" and not first["is_external"]

    shown = home.run("models", "show", "hf:o/first:Q8_0", "--context", "512", "--slots", "2")
    assert shown.code == 0, shown
    assert f"sha256        {first['sha256']}" in shown.out.splitlines()
    assert "on box, 2 slots of 512 tokens:" in shown.out.splitlines()
    as_json = home.run("models", "show", first["model_id"], "--context", "512", "--slots", "2", "--json").json
    (estimate,) = as_json["estimates"]
    assert (estimate["node"], estimate["context_tokens"], estimate["slots"]) == ("box", 512, 2)
    cpu = next(device for device in estimate["devices"] if device["device"] == "cpu")
    assert cpu["fits"] and cpu["host_mb"] > 0

    assert home.run("models", "pin", first["model_id"]).out == "pinned hf:o/first:Q8_0\n"
    dry = home.run("models", "prune", "1", "--dry-run", "--json").json
    assert [record["model_ref"] for record in dry["removed"]] == ["hf:o/second:Q8_0"]
    assert refs(home) == {"hf:o/first:Q8_0", "hf:o/second:Q8_0"}
    pruned = home.run("models", "prune", "100G")
    assert pruned.code == 1 and "removed hf:o/second:Q8_0" in pruned.out and "freed" in pruned.err
    assert refs(home) == {"hf:o/first:Q8_0"}
    assert home.run("models", "unpin", "hf:o/first:Q8_0").code == 0
    assert home.run("models", "prune", "1").code == 0
    assert refs(home) == set() and second["sha256"] == first["sha256"]

    again = imported(home, file, "hf:o/first:Q8_0")
    removed = home.run("models", "rm", "hf:o/first:Q8_0")
    assert removed.code == 0 and removed.out.startswith("removed hf:o/first:Q8_0 (")
    assert not (home.state.models / again["model_id"]).exists() and file.exists()
    missing = home.run("models", "rm", "hf:o/frist:Q8_0")
    assert missing.code == 1 and "error: MODEL_NOT_FOUND: " in missing.err
    for wrong in ("much", "0", "-1G", "1X"):
        assert home.run("models", "prune", "--", wrong).code == 2


def test_a_file_that_rots_is_told_and_the_others_are_read_all_the_same(home: Home, tmp_path: Path) -> None:
    bad = imported(home, write_llama(tmp_path / "bad.gguf"), "hf:o/bad:Q8_0")
    imported(home, write_llama(tmp_path / "good.gguf"), "hf:o/good:Q8_0")
    assert home.run("models", "verify", "--all").code == 0
    file = home.state.models / bad["model_id"] / bad["files"][0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    told = home.run("models", "verify", "--all", "--json")
    assert told.code == 1
    errors = {entry["model"]["model_ref"]: entry["error"] for entry in told.json["verified"]}
    assert errors["hf:o/bad:Q8_0"]["code"] == "MODEL_CORRUPTED" and errors["hf:o/good:Q8_0"] is None
    plain = home.run("models", "verify", "hf:o/bad:Q8_0", "hf:o/good:Q8_0")
    assert "error: MODEL_CORRUPTED: " in plain.err and "good  hf:o/good:Q8_0" in plain.out
    assert home.run("models", "verify").code == 2


def test_a_loaded_model_is_neither_removed_nor_pruned(home: Home, tmp_path: Path) -> None:
    imported(home, write_llama(tmp_path / "tiny.gguf"), "hf:o/loaded:Q8_0")
    assert home.run("infer", "--model", "hf:o/loaded:Q8_0", "--max-tokens", "2", "Count.").code == 0
    refused = home.run("models", "rm", "hf:o/loaded:Q8_0")
    assert refused.code == 1 and "error: MODEL_IN_USE: " in refused.err
    assert home.run("models", "prune", "1", "--json").json["removed"] == []
    assert home.run("workers", "stop", "--all").code == 0
    assert home.run("models", "rm", "hf:o/loaded:Q8_0").code == 0


def test_models_of_other_programs_are_found_and_used_in_place(home: Home, tmp_path: Path) -> None:
    person = Path(home.env["HOME"])
    theirs = person / ".ollama" / "models"
    content = write_llama(tmp_path / "tiny.gguf").read_bytes()
    ollama(theirs, "registry.ollama.ai/library/tiny/latest", content)
    blob = theirs / "blobs" / f"sha256-{sha256(content)}"
    before = blob.stat()
    dry = home.run("models", "scan", "--dry-run", "--json").json["found"]
    assert [(model["source"], model["status"]) for model in dry] == [("ollama", "new")]
    assert refs(home) == set()
    scanned = home.run("models", "scan")
    assert scanned.code == 0 and "entered" in scanned.out
    (ref,) = refs(home)
    again = home.run("models", "scan", "--json").json["found"]
    assert [model["status"] for model in again] == ["known"]
    (record,) = home.run("models", "list", "--json").json["models"]
    assert record["is_external"] and record["source"].startswith("ollama tiny")

    answered = home.run("infer", "--model", ref, "--max-tokens", "2", "Count.")
    assert answered.code == 0, answered
    assert home.run("workers", "stop", "--all").code == 0
    assert home.run("models", "prune", "1", "--json").json["removed"] == []
    assert "its files stay" in home.run("models", "rm", ref).out
    after = blob.stat()
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (
        before.st_mtime_ns,
        before.st_size,
        before.st_ino,
    )


def test_the_catalog_is_backed_up_and_restored(home: Home, tmp_path: Path) -> None:
    record = imported(home, write_llama(tmp_path / "tiny.gguf"), "hf:o/kept:Q8_0")
    backup = tmp_path / "catalog.db"
    done = home.run("models", "backup", str(backup), "--json")
    assert done.json == {"file": str(backup), "size_bytes": backup.stat().st_size, "models": 1}
    home.run("down")
    # The database is lost, and the card too, which alone would bring the model back.
    for path in home.state.catalog_db.parent.glob(f"{home.state.catalog_db.name}*"):
        path.unlink()
    (home.state.models / record["model_id"] / "model.json").unlink()
    restored = home.run("models", "restore", str(backup))
    assert restored.code == 0 and restored.out == "restored hf:o/kept:Q8_0\n", restored
    assert refs(home) == {"hf:o/kept:Q8_0"}
    assert "is in the catalog already" in home.run("models", "restore", str(backup)).err

    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(backup.read_bytes()[:5000] + os.urandom(1000))
    assert home.run("models", "restore", str(damaged)).code == 1
    assert refs(home) == {"hf:o/kept:Q8_0"}
    nowhere = home.run("models", "backup", "/nonexistent/x.db")
    assert nowhere.code == 1 and "error: STATE_DIR_UNUSABLE: " in nowhere.err
    assert home.run("models", "restore", "/nonexistent/x.db").code == 1


def test_a_damaged_catalog_is_rebuilt_and_said_aloud(home: Home, tmp_path: Path) -> None:
    record = imported(home, write_llama(tmp_path / "tiny.gguf"), "hf:o/kept:Q8_0")
    home.run("down")
    home.state.catalog_db.write_bytes(b"SQLite format 3\0" + os.urandom(20_000))
    home.up()
    until("the model is read and entered again", lambda: refs(home) == {"hf:o/kept:Q8_0"})
    listed = home.run("models", "list")
    assert "note: the catalog was corrupt: set aside as catalog.db.corrupt-1" in listed.err
    again = home.run("models", "list", "--json").json["models"][0]
    assert (again["sha256"], again["model_id"]) == (record["sha256"], record["model_id"])
    assert home.state.catalog_db.with_name("catalog.db.corrupt-1").stat().st_size == 20_016


def test_a_whole_models_folder_comes_in_by_a_stick(home: Home, tmp_path: Path) -> None:
    with Home(engine="fake", node_name="attic") as attic:
        for name in ("one", "two"):
            imported(attic, write_llama(tmp_path / f"{name}.gguf"), f"hf:o/{name}:Q8_0")
        attic.run("down")
        done = home.run("models", "import", str(attic.state.models))
        assert done.code == 0, done
        assert refs(home) == {"hf:o/one:Q8_0", "hf:o/two:Q8_0"}
        assert "is here already" in home.run("models", "import", str(attic.state.models)).err
    empty = tmp_path / "empty"
    empty.mkdir()
    nothing = home.run("models", "import", str(empty))
    assert nothing.code == 1 and "error: INVALID_MODEL_PATH: " in nothing.err


def test_through_the_orchestrator_all_is_the_same(home: Home, tmp_path: Path) -> None:
    imported(home, write_llama(tmp_path / "tiny.gguf"), "hf:o/r:Q8_0")
    for command in (("verify", "--all"), ("show", "hf:o/r:Q8_0"), ("pin", "hf:o/r:Q8_0"), ("list",)):
        done = home.run("models", *command, "--node", "box")
        assert done.code == 0 and "hf:o/r:Q8_0" in done.out, done
    nowhere = home.run("models", "list", "--node", "nowhere")
    assert nowhere.code == 1 and "error: NODE_NOT_FOUND: " in nowhere.err
