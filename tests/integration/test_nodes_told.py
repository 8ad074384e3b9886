"""What does a person read who gives `arriero nodes` something that it cannot use?  By commands alone."""

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.home import Home, until
from tests.support.remote import Remote, register

from arriero.contracts.fence import FENCE_HEADER, Fence
from arriero.runtime.state_dir import StateDir
from arriero.testing.sshd import sshd_path

pytestmark = pytest.mark.skipif(sshd_path() is None, reason="no sshd is installed")


@pytest.fixture
def home() -> Iterator[Home]:
    with Home() as made:
        yield made
        made.run("down")


def shown(home: Home) -> dict[str, Any]:
    found: dict[str, Any] = home.run("nodes", "show", "far", "--json").json
    return found


@contextlib.contextmanager
def taken_over(remote: Remote) -> Iterator[None]:
    """Hold a node's events under a larger number of its own holder."""
    record = remote.run_record()

    def events(fence: Fence) -> Any:
        headers = {"Authorization": f"Bearer {record['token']}", FENCE_HEADER: str(fence)}
        return urllib.request.urlopen(
            urllib.request.Request(f"{record['url']}/v1/events", headers=headers), timeout=60
        )

    with pytest.raises(urllib.error.HTTPError) as refused:
        events(Fence("0" * 16, 1))
    lease = json.load(refused.value)["error"]["details"]
    with events(Fence(lease["holder"], lease["number"] + 1)):
        yield


def completed(home: Home, *words: str) -> list[str]:
    """Return what a shell would offer instead of the last word."""
    asked = {"_ARRIERO_COMPLETE": "zsh_complete", "COMP_WORDS": " ".join(["arriero", *words])}
    done = home.run(COMP_CWORD=str(len(words)), **asked)
    assert (done.code, done.err) == (0, ""), done
    # A kind, a value, a help.
    return done.out.splitlines()[1::3]


def test_a_group_without_a_command_shows_its_help_as_it_is_laid_out(home: Home) -> None:
    done = home.run("nodes")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("Usage: arriero nodes [OPTIONS] COMMAND"), done
    assert "\n  add " in done.err and "error:" not in done.err
    told = home.run("nodes", "--json")
    assert told.code == 2


@pytest.mark.parametrize(
    "label", ["room", "=attic", "ro om=attic", "größe=ja", "a=$(touch x)", "a=" + "b" * 64]
)
def test_a_label_is_refused_in_the_words_of_the_command(home: Home, label: str) -> None:
    done = home.run("nodes", "update", "far", "--label", label, "--json")
    error = done.json["error"]
    assert (done.code, error["code"]) == (1, "INVALID_REQUEST")
    assert error["message"].startswith("--label ") and "KEY" in error["message"]


def test_nothing_is_offered_and_nothing_said_where_nothing_runs(home: Home) -> None:
    assert completed(home, "infer", "--node", "") == []
    assert home.processes() == []


def test_each_part_of_an_address_is_refused_as_what_it_is(home: Home) -> None:
    for words, told in (
        (("--accept-host-key", "SHA256:xyz"), "'SHA256:xyz' is no fingerprint of a host key"),
        (("--install-path", "my files"), "'my files' is no install path"),
        (("--ssh", "ana@"), "'ana@' is no address of a machine"),
        (("--ssh", ""), "'' is no address of a machine"),
    ):
        done = home.run("nodes", "add", "far", "--ssh", "ana@127.0.0.1:9", *words, "--json")
        error = done.json["error"]
        assert (done.code, error["code"]) == (1, "INVALID_REQUEST")
        assert error["message"].startswith(told), error
    assert home.state.running("orchestrator") is None, "nothing is started for what cannot be"
    sum_ = home.run("engines", "install", "--sha256", "zz", "--json").json["error"]
    assert sum_["message"] == "--sha256 'zz' is no checksum: 64 hexadecimal digits"
    closed = home.run("nodes", "add", "far", "--ssh", "ana@127.0.0.1:9", "--json").json["error"]
    assert "`ssh -p 9 ana@127.0.0.1`" in closed["details"]["suggested_action"], closed
    for name in ("", "a/b", ".."):
        assert home.run("nodes", "show", name, "--json").json["error"]["code"] == "NODE_NOT_FOUND", name
    own = home.run("nodes", "add", "box", "--ssh", "ana@127.0.0.1:9", "--json").json["error"]
    assert own["code"] == "NODE_ALREADY_EXISTS" and "remove" not in own["details"]["suggested_action"]


def test_a_machine_that_was_added_keeps_its_name_before_the_one_we_run_on(home: Home) -> None:
    register(home, "box", "ana@127.0.0.1:9")
    assert home.run("up", "-q").code == 0
    found = {each["name"]: each for each in home.run("nodes", "list", "--json").json["nodes"]}
    assert {name: each["is_remote"] for name, each in found.items()} == {"box": True, "box-local": False}
    assert found["box"]["ssh"] == "ana@127.0.0.1:9" and found["box"]["status"] != "ready"
    told = home.run("nodes", "list").err
    assert "box-local: this machine's agent is called box" in told and "node_name" in told
    answer = home.run("infer", "--model", "demo", "--temperature", "0", "Count from 5 to 7.", "--json")
    assert answer.code == 0 and answer.json["node"] == "box-local", answer
    # What a person wishes of it is kept by that name; and a drained one is no failed start.
    assert home.run("nodes", "drain", "box-local", "-q").code == 0
    assert home.run("down").code == 0
    assert home.run("up", "-q").code == 0
    listed = home.run("nodes", "list", "--json").json["nodes"]
    assert [(each["name"], each["is_drained"]) for each in listed] == [("box", False), ("box-local", True)]


def test_a_machine_is_one_node_by_whatever_address(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Remote(tmp_path / "far") as remote:
        remote.prepare()
        # The key's path begins where the command does, not where the orchestrator does.
        monkeypatch.chdir(tmp_path)
        server = remote.server
        given = (
            "--key", "far/key", "--accept-host-key", server.fingerprint(), "--install-path", str(remote.path),
        )  # fmt: skip
        joined = home.run("nodes", "add", "far", "--ssh", server.target, *given, "--json")
        assert joined.code == 0, joined
        assert joined.json["key_path"] == str(tmp_path / "far/key")
        assert "the same machine as box: its memory is shared" in joined.err
        assert joined.json["same_machine_as"] == ["box"]
        lease = joined.json["lease"]
        again = home.run("nodes", "add", "near", "--ssh", f"localhost:{server.port}", *given, "--json")
        error = again.json["error"]
        assert error["code"] == "NODE_ALREADY_EXISTS", again
        assert "as far" in error["message"]
        assert "nodes update far --ssh localhost" in error["details"]["suggested_action"]
        assert (shown(home)["status"], shown(home)["lease"]) == ("ready", lease)
        with taken_over(remote):
            # A newer stream of its own holder has the node: that is told, and no mismatch of versions.
            until(
                "the reason is told",
                lambda: (error := shown(home)["error"]) and error["code"] == "LEASE_SUPERSEDED",
            )
        until("it is held again", lambda: shown(home)["status"] == "ready")
        assert (
            home.run("nodes", "update", "far", "--label", "room=attic").err
            == "[orchestrator] far is changed\n"
        )
        for words in (("infer", "--node"), ("nodes", "show"), ("engines", "list", "--node")):
            assert completed(home, *words, "f") == ["far"], words
        assert completed(home, "explain", "--label", "r") == ["room=attic"]
        home.run("nodes", "drain", "far")
        assert home.run("nodes", "undrain", "far").err == "[orchestrator] far takes work again\n"
        # A command that starts the next orchestrator waits until the machine that it names has joined.
        home.kill(home.pid("orchestrator"))
        for way in (("--node", "far"), ("--label", "room=attic")):
            answer = home.run("infer", "--model", "demo", "--temperature", "0", *way, "Count from 5 to 7.")
            assert (answer.code, answer.out.strip()) == (0, "5 6 7"), answer
            home.kill(home.pid("orchestrator"))
        assert home.run("up", "-q").code == 0
        server.kill()
        kept = home.run("nodes", "remove", "far", "--json").json["error"]
        assert kept["code"] == "NODE_UNREACHABLE"
        assert "nodes remove far --force" in kept["details"]["suggested_action"]
        assert home.run("nodes", "remove", "far", "--force", "-q").code == 0
        assert "nothing to upgrade" in home.run("nodes", "upgrade", "--all").err
        # What went on there meanwhile is found again, under whatever name.
        server.start()
        (worker,) = (run.record.worker_id for run in StateDir(remote.path / "home").worker_runs())
        again = home.run("nodes", "add", "again", "--ssh", server.target, *given, "-q")
        assert again.code == 0, again
        assert [(each["worker_id"], each["node"]) for each in home.workers()] == [(worker, "again")]
        answer = home.run(
            "infer", "--model", "demo", "--temperature", "0", "--node", "again", "Count from 5 to 7."
        )
        assert (answer.code, answer.out.strip()) == (0, "5 6 7"), answer
        assert home.run("nodes", "remove", "again", "-q").code == 0
