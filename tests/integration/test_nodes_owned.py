"""Whose is a machine, what was there before, and what goes with whom?  By commands alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support import cli
from tests.support.home import Home, until
from tests.support.remote import Remote, other_version

from arriero.testing.sshd import sshd_path

pytestmark = [
    # Two machines come up and down, on one that may be busy.
    pytest.mark.timeout(180),
    pytest.mark.skipif(sshd_path() is None, reason="no sshd is installed"),
]
COUNT = ("infer", "--model", "demo", "--temperature", "0", "--node", "far", "Count from 5 to 7.")


@pytest.fixture
def home() -> Iterator[Home]:
    with Home() as made:
        yield made
        made.run("down")


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    with Remote(tmp_path / "far") as made:
        made.prepare()
        yield made


def node(home: Home, **env: str) -> dict[str, Any]:
    found: dict[str, Any] = home.run("nodes", "show", "far", "--json", **env).json
    return found


def answers(home: Home, **env: str) -> bool:
    return home.run(*COUNT, **env).out.strip() == "5 6 7"


def test_with_cascade_nothing_of_ours_goes_on_there_and_the_next_one_has_it_back(
    home: Home, remote: Remote
) -> None:
    # So long is a machine waited for that is reached for the first time; what failed is not.
    home.env["ARRIERO_CONNECT_TIMEOUT_S"] = "60"
    with home.start("orchestrator", "--cascade") as daemon:
        until("it serves", lambda: home.state.running("orchestrator"))
        assert remote.add(home, "far", "-q").code == 0
        assert answers(home)
        daemon.terminate()
        assert daemon.wait(30) == 0
    # No agent, no worker, and nobody who would start them again.
    remote.assert_quiet()
    assert answers(home), "the command that starts the next one has it there"


def test_what_another_orchestrator_holds_by_now_is_neither_upgraded_nor_removed(
    home: Home, remote: Remote
) -> None:
    assert remote.add(home, "far", "-q").code == 0
    assert home.run("down").code == 0
    with Home(node_name="second") as other:
        assert remote.add(other, "far", "-q").code == 0
        agent = remote.run_record()["pid"]
        assert home.run("up", "-q").code == 0
        until("it is told", lambda: (e := node(home)["error"]) and e["code"] == "LEASE_SUPERSEDED")
        for word in ("upgrade", "remove"):
            error = home.run("nodes", word, "far", "--json").json["error"]
            assert error["code"] == "LEASE_SUPERSEDED", word
            assert "`arriero nodes remove far --force`" in error["details"]["suggested_action"]
        forced = home.run("nodes", "remove", "far", "--purge", "--force")
        assert forced.code == 0 and "is left" in forced.out + forced.err, forced
        assert node(home)["error"]["code"] == "NODE_NOT_FOUND"
        assert (remote.run_record()["pid"], node(other)["status"]) == (agent, "ready")
        other.run("down")


def exchanged(remote: Remote, tag: str, source: Path) -> None:
    """Have an environment run the arriero of another folder than it was prepared with."""
    (pointer,) = (remote.path / "envs" / tag).glob("lib/*/site-packages/here.pth")
    _, site = pointer.read_text().split()
    pointer.write_text(f"{source}\n{site}\n")


def test_an_upgrade_that_fails_goes_back_to_what_ran_before_or_not_at_all(
    home: Home, remote: Remote, tmp_path: Path
) -> None:
    assert remote.add(home, "far", "-q").code == 0
    tag = (remote.path / "current").readlink().name
    # It only lies there: nobody knows since when, or why.
    other = remote.prepare(other_version(tmp_path / "other", "0.0.1"))
    exchanged(remote, tag, other_version(tmp_path / "strange", "0.0.9"))
    remote.kill_agent()
    until("it is another one", lambda: remote.run_record()["version"] == "0.0.9", 30)
    error = home.run("nodes", "upgrade", "far", "--json").json["error"]
    assert error["code"] == "VERSION_MISMATCH", error
    assert error["details"]["left"] == f"there is nothing to go back to: {tag} stays there"
    assert (remote.path / "current").readlink().name == tag
    assert {path.name for path in (remote.path / "envs").iterdir()} == {tag, other}


def test_an_upgrade_whose_connection_is_lost_goes_back_over_another_one(
    home: Home, remote: Remote, tmp_path: Path
) -> None:
    assert remote.add(home, "far", "-q").code == 0
    before = (remote.path / "current").readlink().name
    assert home.run("down").code == 0
    newer = other_version(tmp_path / "newer", "0.2.0")
    remote.prepare(newer)
    new = {"PYTHONPATH": str(newer)}
    assert home.run("up", "-q", **new).code == 0
    upgrading = home.start("nodes", "upgrade", "far", "--json", **new)
    assert upgrading.stderr is not None
    assert any(b"the agent has ended" in line for line in upgrading.stderr)
    remote.server.kill()
    remote.server.start()
    error = cli.finish(upgrading).json["error"]
    assert error["code"] == "NODE_UNREACHABLE", error
    assert error["details"]["left"] == f"{before} runs again"
    assert remote.run_record()["version"] == "0.1.0"


def test_adding_a_machine_exchanges_the_older_agent_that_runs_there_or_leaves_it_as_it_was(
    home: Home, remote: Remote, tmp_path: Path
) -> None:
    assert remote.add(home, "before", "-q").code == 0
    before = (remote.path / "current").readlink().name
    assert home.run("down").code == 0
    for file in home.state.home.glob("orchestrator.db*"):
        file.unlink()
    newer = other_version(tmp_path / "newer", "0.2.0")
    new = {"PYTHONPATH": str(newer)}
    assert home.run("up", "-q", **new).code == 0
    # What is installed as the new version is another one.
    exchanged(remote, remote.prepare(newer), other_version(tmp_path / "strange", "0.0.9"))
    error = remote.add(home, "far", "--json", **new).json["error"]
    assert error["code"] == "VERSION_MISMATCH", error
    assert error["details"]["left"] == "nothing new is left there"
    assert "give the same command again" in error["details"]["suggested_action"]
    assert (remote.path / "current").readlink().name == before
    told = remote.run_record()
    assert (
        told["version"] == "0.1.0" and psutil.Process(told["pid"]).environ()["ARRIERO_NODE_NAME"] == "before"
    )
    remote.prepare(newer)
    done = remote.add(home, "far", "--json", **new)
    assert done.code == 0 and done.json["version"] == "0.2.0", done
    assert answers(home, **new)
