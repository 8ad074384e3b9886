"""Does `arriero models pull` bring a model, once, and say what happens meanwhile?  Real programs alone."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support import cli
from tests.support.home import Home, until
from tests.support.hub import HubProcess
from tests.support.scripted_http import Connection, Request, ScriptedServer

from arriero.cli import pulling
from arriero.cli.narrator import Narrator
from arriero.client.api import Orchestrator
from arriero.contracts.events import DownloadFrame
from arriero.contracts.requests import DownloadBody
from arriero.contracts.states import DownloadState
from arriero.testing.gguf_writer import write_llama

TOKEN = "hf_notASecret"


@pytest.fixture
def home() -> Iterator[Home]:
    with Home(engine="fake") as made:
        yield made
        made.run("down")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    folder.mkdir()
    write_llama(folder / "tiny-Q8_0.gguf")
    return folder


@pytest.fixture
def big_repo(tmp_path: Path) -> Path:
    """A model of some 20 MB: at a limited rate it takes long enough to be left in the middle."""
    folder = tmp_path / "big"
    folder.mkdir()
    whole = write_llama(folder / "big-Q8_0.gguf")
    with whole.open("ab") as file:
        file.truncate(20_000_000)
    return folder


def downloads(home: Home) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = home.run("downloads", "list", "--json").json["downloads"]
    return found


def in_the_middle(home: Home, least_bytes: int = 1) -> dict[str, Any]:
    """Wait until a download has so many bytes and is not over; return it."""

    def look() -> dict[str, Any] | None:
        running = [download for download in downloads(home) if download["state"] == "downloading"]
        return next((d for d in running if d["bytes_downloaded"] >= least_bytes), None)

    return until("a download is under way", look)


def test_a_model_is_fetched_told_and_used_without_a_network(home: Home, repo: Path) -> None:
    with HubProcess(o__r=repo) as hub:
        home.env["HF_ENDPOINT"] = hub.url
        pulled = home.run("models", "pull", "hf:o/r:Q8_0")
        assert pulled.code == 0, pulled
        lines = pulled.err.splitlines()
        assert any("starting orchestrator and agent" in line for line in lines)
        assert "[box] hf:o/r:Q8_0 comes from hub" in lines
        assert any(line.startswith("[checking] 100%") for line in lines)
        model_id = pulled.out.strip()
        assert model_id.startswith("m-") and len(model_id) == 14

        again = home.run("models", "pull", "hf:o/r:Q8_0", "--json", "-q")
        assert (again.code, again.err) == (0, "")
        assert again.json["model"]["model_id"] == model_id and again.json["source"] == "this machine"
        # Another name of the same file: linked, not fetched.
        other = home.run("models", "pull", "hf:o/r/tiny-Q8_0.gguf", "--json").json
        assert other["source"] == "this machine" and other["model"]["model_id"] != model_id

    answered = home.run("infer", "--model", "hf:o/r:Q8_0", "--max-tokens", "4", "Count.")
    assert answered.code == 0 and answered.out.strip()
    (listed,) = [m for m in home.run("models", "list", "--json").json["models"] if m["model_id"] == model_id]
    assert (listed["times_used"], listed["source"], len(listed["revision"])) == (1, "hub", 40)
    home.run("down")
    home.assert_clean()


def test_a_waiting_request_tells_of_the_download_and_its_failed_attempts(home: Home, repo: Path) -> None:
    with HubProcess("--failing-lookups=2", "--failing-bytes=1", o__r=repo) as hub:
        home.env["HF_ENDPOINT"] = hub.url
        asked = home.run("infer", "--model", "hf:o/r:Q8_0", "--max-tokens", "4", "Count.")
    assert asked.code == 0, asked
    lines = asked.err.splitlines()
    for told in (
        "[box] fetches hf:o/r:Q8_0: the Hub answered 503, tries again (attempt 2)",
        "[box] fetches hf:o/r:Q8_0 from hub",
    ):
        assert lines.count(told) == 1, lines


def test_what_cannot_be_had_is_one_clear_error(home: Home, repo: Path) -> None:
    with HubProcess(f"--gated=o/gated={repo}", f"--token={TOKEN}", o__r=repo) as hub:
        home.env["HF_ENDPOINT"] = hub.url
        home.up()
        for ref, code, words in (
            ("nonsense", "INVALID_MODEL_REFERENCE", "hf:org/repo"),
            ("hf:o/r:Q5_K_M", "MODEL_NOT_FOUND", "Q8_0"),
            ("hf:o/nothing", "MODEL_NOT_FOUND", "HF_TOKEN"),
            ("hf:o/gated", "MODEL_ACCESS_DENIED", "licence"),
        ):
            done = home.run("models", "pull", ref)
            assert (done.code, done.out) == (1, ""), done
            assert f"error: {code}: " in done.err and words in done.err and "hint: " in done.err
            told = home.run("models", "pull", ref, "--json")
            assert told.code == 1 and told.json["error"]["code"] == code
        assert home.run("models", "pull").code == 2


def test_an_interrupted_pull_leaves_the_download_and_the_next_goes_on(home: Home, big_repo: Path) -> None:
    with HubProcess("--rate=200000", o__r=big_repo) as hub:
        home.env["HF_ENDPOINT"] = hub.url
        home.up()
        pull = home.start("models", "pull", "hf:o/r")
        in_the_middle(home)
        ended = cli.interrupt(pull)
        assert (ended.code, ended.out) == (130, "")
        (left,) = downloads(home)
        assert left["state"] == "cancelled" and left["bytes_downloaded"] > 0

        kept = home.start("models", "pull", "--keep", "hf:o/r")
        # What was kept is read through once more before it counts.
        again = in_the_middle(home, left["bytes_downloaded"])
        ended = cli.interrupt(kept)
        assert ended.code == 130 and "goes on fetching hf:o/r" in ended.err
        assert (
            next(d for d in downloads(home) if d["download_id"] == again["download_id"])["state"]
            == "downloading"
        )
        # Who comes now joins it, and the last to leave takes it along.
        joined = home.start("models", "pull", "-q", "--clean", "hf:o/r")
        until("it is joined", lambda: downloads(home)[0]["holders"] == 2)
        joined.send_signal(signal.SIGTERM)
        assert cli.finish(joined).code == 143
        assert downloads(home)[0]["state"] == "downloading"


def test_an_agent_that_was_killed_goes_on_with_its_downloads(home: Home, big_repo: Path) -> None:
    with HubProcess("--rate=2000000", o__r=big_repo) as hub:
        home.env["HF_ENDPOINT"] = hub.url
        home.up()
        pull = home.start("models", "pull", "--json", "hf:o/r")
        left = in_the_middle(home)
        home.kill(home.pid("agent"))
        assert home.run("models", "list").code == 1
        home.up()
        done = cli.finish(pull)
    assert done.code == 0, done
    assert "no news of the download" in done.err
    # The same download, seen to its end by the command that began it; nobody asked for it anew.
    (download,) = downloads(home)
    assert (download["download_id"], download["state"]) == (left["download_id"], "complete")


def test_twenty_pulls_share_one_download(home: Home, big_repo: Path) -> None:
    with HubProcess("--rate=5000000", o__r=big_repo) as hub:
        home.env["HF_ENDPOINT"] = hub.url
        home.up()
        pulls = [home.start("models", "pull", "--json", "hf:o/r")]
        in_the_middle(home)
        # However long it takes the others to begin: nothing comes before they are there.
        with hub.frozen():
            pulls += [home.start("models", "pull", "--json", "hf:o/r") for _ in range(19)]
            until("all have joined", lambda: downloads(home)[0]["holders"] == 20)
        done = [cli.finish(pull) for pull in pulls]
    assert [one.code for one in done] == [0] * 20, done
    assert len({one.json["model"]["model_id"] for one in done}) == 1
    assert all("[checking] 100%" in one.err for one in done)
    (download,) = [d for d in downloads(home) if d["source"] == "hub"]
    assert download["state"] == "complete"


def test_a_model_is_copied_from_another_agent(home: Home, repo: Path) -> None:
    with Home(engine="fake", node_name="attic") as attic:
        with HubProcess(o__r=repo) as hub:
            attic.env["HF_ENDPOINT"] = home.env["HF_ENDPOINT"] = hub.url
            first = attic.run("models", "pull", "hf:o/r:Q8_0", "--json").json
        # The Hub is gone: only the other agent has it.
        pulled = home.run("models", "pull", "--from", str(attic.state.home), "hf:o/r:Q8_0", "--json")
        assert pulled.code == 0, pulled
        second = pulled.json["model"]
        assert second["sha256"] == first["model"]["sha256"] and second["files"] == first["model"]["files"]
        assert second["source"] == "node attic"
        assert home.run("models", "verify", "--all").code == 0
        attic.run("down")
    nobody = home.run("models", "pull", "--from", "/nonexistent", "hf:o/r:Q4_K_M")
    assert nobody.code == 1 and "error: NOT_RUNNING: " in nobody.err


def test_patience_begins_with_the_break_and_not_with_the_last_news() -> None:
    """A download that waits for its turn, or for `Retry-After`, has no news for long."""
    frame = DownloadFrame(
        stage=DownloadState.DOWNLOADING, bytes_downloaded=1, bytes_total=2, speed_mbps=0.0, eta_s=None,
        download_id="d-000000000001",
    )  # fmt: skip

    def script(request: Request, connection: Connection) -> None:
        if request.method == "POST":
            connection.answer(202, {"download_id": frame.download_id, "progress_url": "/x", "node": "andes"})
            return
        streams = len(server.requests) - 1
        stage = DownloadState.DOWNLOADING if streams == 1 else DownloadState.COMPLETE
        connection.begin_stream()
        connection.event(msgspec.to_builtins(msgspec.structs.replace(frame, stage=stage)))
        if streams == 1:
            connection.stopping.wait(5.2)  # Longer than the patience; then it breaks.
        else:
            connection.event("[DONE]")
            connection.end_stream()

    with ScriptedServer(script) as server:
        client = Orchestrator(server.url, "t")
        body = DownloadBody(model_ref="hf:o/r")
        _, last = pulling.pull(client, body, narrator=Narrator(is_quiet=True), keep=True, patience_s=5)
    assert last.stage is DownloadState.COMPLETE
