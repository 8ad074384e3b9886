"""Does a machine behind a real sshd become part of the pool, stay it, and leave it?  By commands alone."""

import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import OpenAI
from tests.support import cli
from tests.support.home import Home, until
from tests.support.hub import HubProcess
from tests.support.remote import PACKAGE, Remote, other_version, register

from arriero.client.api import Orchestrator
from arriero.testing.gguf_writer import write_llama
from arriero.testing.sshd import sshd_path

pytestmark = pytest.mark.skipif(sshd_path() is None, reason="no sshd is installed")
COUNT = ("infer", "--model", "demo", "--temperature", "0", "Count from 5 to 15.")
ANSWER = "5 6 7 8 9 10 11 12 13 14 15"


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


def node(home: Home, name: str) -> dict[str, Any]:
    found: dict[str, Any] = home.run("nodes", "show", name, "--json").json
    return found


def status_is(home: Home, name: str, status: str) -> None:
    until(f"{name} is {status}", lambda: node(home, name)["status"] == status)


def added(home: Home, remote: Remote, name: str = "far", *more: str) -> None:
    done = remote.add(home, name, *more)
    assert done.code == 0, done


def test_a_machine_joins_computes_and_leaves(home: Home, remote: Remote) -> None:
    done = remote.add(home, "far", "--label", "room=attic", "--json")
    assert done.code == 0, done
    assert done.json["name"] == "far" and done.json["status"] == "ready"
    assert done.json["labels"] == {"room": "attic"} and done.json["ssh"] == remote.server.target
    for said in ("connects to", "let us in", "Python 3", "free at", "agent was started", "part of the pool"):
        assert said in done.err
    answer = home.run(*COUNT, "--node", "far")
    assert (answer.code, answer.out.strip()) == (0, ANSWER), answer
    (worker,) = home.workers()
    assert worker["node"] == "far"
    with OpenAI(base_url=f"{home.url()}/v1", api_key="none", max_retries=0, timeout=60) as sdk:
        attic: dict[str, Any] = {"arriero": {"labels": {"room": "attic"}}}
        answered = sdk.completions.with_raw_response.create(
            model="demo", prompt="5 6 7", max_tokens=3, extra_body=attic
        )
    assert answered.headers["X-Arriero-Node"] == "far"
    assert "worker" in home.run("workers", "logs", worker["worker_id"]).out
    assert "agent_answers" in home.run("nodes", "logs", "far").out
    with (remote.path / "home/logs/agent.log").open("a") as log:
        log.write(("x" * 99 + "\n") * 50_000 + "the newest\n")
    told = home.run("nodes", "logs", "far", "--lines", "100000")
    assert "the newest" in told.out and "earlier lines are left out" in told.err
    assert home.run("nodes", "logs", "far", "--lines", "100000", "--json").json["is_cut"]
    findings = {each["name"]: each for each in home.run("nodes", "doctor", "far", "--json").json["findings"]}
    assert findings["agent"]["is_ok"] and findings["environment"]["is_ok"], findings
    assert "the same machine as box" in findings["memory"]["message"]
    listening = {
        f"{connection.laddr.ip}"
        for process in remote.processes()
        for connection in process.net_connections("inet")
        if connection.status == "LISTEN"
    }
    assert listening == {"127.0.0.1"}
    assert home.run("nodes", "remove", "far", "-q").code == 0
    remote.assert_quiet()
    assert (remote.path / "envs").is_dir(), "without --purge the installation stays"
    assert home.run("nodes", "show", "far", "--json").json["error"]["code"] == "NODE_NOT_FOUND"
    added(home, remote, "again")
    assert home.run("nodes", "remove", "again", "--purge", "-q").code == 0
    remote.assert_quiet()
    assert not remote.path.exists()


def test_a_drained_node_takes_nothing_new_also_after_a_restart(home: Home, remote: Remote) -> None:
    added(home, remote)
    assert home.run("nodes", "drain", "far", "-q").code == 0
    refused = home.run(*COUNT, "--node", "far", "--json")
    assert refused.json["error"]["code"] == "NODE_DRAINING", refused
    home.kill(home.pid("orchestrator"))
    elsewhere = home.run(*COUNT, "--json")
    assert elsewhere.code == 0 and elsewhere.json["node"] == "box"
    status_is(home, "far", "draining")
    assert home.run("nodes", "undrain", "far").code == 0
    assert home.run(*COUNT, "--node", "far").code == 0


def test_the_link_is_cut_and_nothing_dies(home: Home, remote: Remote) -> None:
    added(home, remote)
    assert home.run(*COUNT, "--node", "far").code == 0
    worker = home.workers()[0]
    remote.server.kill()
    status_is(home, "far", "unreachable")
    shown = node(home, "far")
    assert shown["error"]["code"] == "NODE_UNREACHABLE"
    refused = home.run(*COUNT, "--node", "far", "--json")
    assert (refused.code, refused.json["error"]["code"]) == (1, "NODE_UNREACHABLE")
    assert "`arriero nodes show far`" in refused.json["error"]["details"]["suggested_action"]
    remote.server.start()
    status_is(home, "far", "ready")
    assert node(home, "far")["lease"] > shown["lease"]
    assert [(w["worker_id"], w["pid"]) for w in home.workers()] == [(worker["worker_id"], worker["pid"])]
    assert home.run(*COUNT, "--node", "far").out.strip() == ANSWER


def test_the_orchestrator_dies_and_the_next_one_knows_nodes_and_workers(home: Home, remote: Remote) -> None:
    added(home, remote, "far", "--label", "room=attic")
    assert home.run(*COUNT, "--node", "far").code == 0
    worker = home.workers()[0]["worker_id"]
    before = node(home, "far")
    home.kill(home.pid("orchestrator"))
    assert home.run("up", "-q").code == 0
    status_is(home, "far", "ready")
    after = node(home, "far")
    assert after["labels"] == {"room": "attic"} and after["lease"] > before["lease"]
    assert [w["worker_id"] for w in home.workers()] == [worker]
    assert home.run(*COUNT, "--node", "far").out.strip() == ANSWER


def test_a_killed_agent_comes_back_with_its_worker(home: Home, remote: Remote) -> None:
    added(home, remote)
    assert home.run(*COUNT, "--node", "far").code == 0
    worker = home.workers()[0]["pid"]
    old = remote.kill_agent()
    until("another agent answers", lambda: remote.run_record()["pid"] != old)
    until("it is held", lambda: node(home, "far")["status"] == "ready" and home.workers())
    assert home.workers()[0]["pid"] == worker
    assert home.run(*COUNT, "--node", "far").out.strip() == ANSWER


def test_an_unknown_host_key_is_shown_and_accepted(home: Home, remote: Remote) -> None:
    server = remote.server
    given = ("nodes", "add", "far", "--ssh", server.target, "--key", str(server.key),
             "--install-path", str(remote.path))  # fmt: skip
    refused = home.run(*given, "--json", HOME=str(remote.folder))
    error = refused.json["error"]
    assert (refused.code, error["code"]) == (1, "SSH_HOST_KEY_UNKNOWN")
    assert error["details"]["fingerprint"] == server.fingerprint()
    wrong = home.run(*given, "--accept-host-key", "SHA256:" + "A" * 43, "--json")
    assert wrong.json["error"]["code"] == "SSH_HOST_KEY_CHANGED"
    assert home.run(*given, "--accept-host-key", server.fingerprint(), "-q").code == 0
    server.kill()
    server.renew_host_keys(["ssh-ed25519"])
    server.start()
    status_is(home, "far", "unreachable")
    until("the reason is told", lambda: node(home, "far")["error"]["code"] == "SSH_HOST_KEY_CHANGED")
    update = ("nodes", "update", "far", "--accept-host-key", server.fingerprint())
    for told in (node(home, "far")["error"], home.run("nodes", "logs", "far", "--json").json["error"]):
        assert f"`arriero {' '.join(update)}`" in told["details"]["suggested_action"], told
    assert home.run(*update).code == 0
    status_is(home, "far", "ready")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"--key": "WRONG"}, "SSH_AUTH_FAILED"),
        ({"--key": "MISSING"}, "SSH_KEY_UNUSABLE"),
        ({"--key": "OPEN"}, "SSH_KEY_UNUSABLE"),
        ({"--ssh": "nobody-of-that-name@127.0.0.1:PORT"}, "SSH_AUTH_FAILED"),
        ({"--ssh": "ana@127.0.0.1:CLOSED"}, "NODE_UNREACHABLE"),
        ({"--ssh": "ana@no-such-host.invalid"}, "NODE_UNREACHABLE"),
        ({"--ssh": "-oProxyCommand=touch${IFS}x"}, "INVALID_REQUEST"),
        ({"--install-path": "$(touch x)"}, "INVALID_REQUEST"),
        ({"--label": "a=$(touch x)"}, "INVALID_REQUEST"),
        ({"--mac": "a cow"}, "INVALID_REQUEST"),
    ],
)
def test_what_cannot_join_is_told_and_not_registered(
    home: Home, remote: Remote, change: dict[str, str], code: str
) -> None:
    server = remote.server
    (remote.folder / "OPEN").write_bytes(server.key.read_bytes())
    (remote.folder / "OPEN").chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        closed_port = closed.getsockname()[1]
    given = {
        "--ssh": server.target, "--key": str(server.key), "--accept-host-key": server.fingerprint(),
        "--install-path": str(remote.path), **change,
    }  # fmt: skip
    given["--ssh"] = given["--ssh"].replace("PORT", str(server.port)).replace("CLOSED", str(closed_port))
    keys = {"WRONG": server.wrong_key, "MISSING": remote.folder / "none", "OPEN": remote.folder / "OPEN"}
    given["--key"] = str(keys.get(given["--key"], given["--key"]))
    words = [word for pair in given.items() for word in pair]
    done = home.run("nodes", "add", "far", *words, "--json")
    assert (done.code, done.json["error"]["code"]) == (1, code), done
    assert done.json["error"]["details"]["suggested_action"]
    # A machine that is silent is waited for half a minute: a person hears of each attempt.
    tries = done.err.count(f"{done.json['error']['message']}: tries again")
    assert tries == (2 if code == "NODE_UNREACHABLE" else 0), done.err
    if home.state.running("orchestrator") is not None:
        names = [each["name"] for each in home.run("nodes", "list", "--json").json["nodes"]]
        assert "far" not in names
    assert not remote.processes()


def test_a_name_or_a_machine_that_is_taken(home: Home, remote: Remote) -> None:
    added(home, remote)
    for name in ("far", "box", "other"):
        done = remote.add(home, name, "--json")
        assert done.json["error"]["code"] == "NODE_ALREADY_EXISTS", name
    spelled = home.run(
        "nodes", "add", "other", "--ssh", remote.server.target.replace("127.0.0.1", "localhost"),
        "--key", str(remote.server.key), "--accept-host-key", remote.server.fingerprint(),
        "--install-path", str(remote.path), "--json",
    )  # fmt: skip
    assert spelled.json["error"]["code"] == "NODE_ALREADY_EXISTS", spelled
    assert spelled.json["error"]["details"]["node"] == "far"
    assert home.run(*COUNT, "--node", "far").code == 0


def test_the_machine_of_another_orchestrator_is_left_alone(home: Home, remote: Remote) -> None:
    added(home, remote)
    agent = remote.run_record()["pid"]
    with Home(node_name="second") as other:
        done = remote.add(other, "mine", "--json")
        assert done.json["error"]["code"] == "LEASE_SUPERSEDED", done
        other.run("down")
    assert remote.run_record()["pid"] == agent
    assert home.run(*COUNT, "--node", "far").code == 0


def test_a_lost_database_does_not_lose_its_machines_for_ever(home: Home, remote: Remote) -> None:
    added(home, remote)
    agent = remote.run_record()["pid"]
    home.kill(home.pid("orchestrator"))
    for file in home.state.home.glob("orchestrator.db*"):
        file.unlink()
    assert home.run("up", "-q").code == 0
    until("who held it is missed", lambda: remote.add(home, "anew", "-q").code == 0)
    assert remote.run_record()["pid"] == agent
    assert home.run(*COUNT, "--node", "anew").out.strip() == ANSWER


def test_interrupting_the_adding_leaves_nothing(home: Home, remote: Remote, tmp_path: Path) -> None:
    assert home.run("up", "-q").code == 0
    adding = home.start(
        "nodes", "add", "far", "--ssh", remote.server.target, "--key", str(remote.server.key),
        "--accept-host-key", remote.server.fingerprint(), "--install-path", str(remote.path),
    )  # fmt: skip
    until("the agent is being started", (remote.path / "home/run").exists)
    done = cli.interrupt(adding, signal.SIGINT)
    assert done.code == 130 and "far is taken back" in done.err, done
    remote.assert_quiet()
    names = [each["name"] for each in home.run("nodes", "list", "--json").json["nodes"]]
    assert names == ["box"]
    added(home, remote)


def test_another_version_is_told_and_upgraded(home: Home, remote: Remote, tmp_path: Path) -> None:
    added(home, remote)
    assert home.run("down").code == 0
    register(home, "away", "ana@127.0.0.1:9")
    newer = other_version(tmp_path / "newer", "0.2.0")
    remote.prepare(newer)
    new = {"PYTHONPATH": str(newer)}
    assert home.run("up", "-q", **new).code == 0
    shown = until(
        "the mismatch is told",
        lambda: (found := home.run("nodes", "show", "far", "--json", **new).json).get("error") and found,
    )
    assert shown["error"]["code"] == "VERSION_MISMATCH"
    assert shown["error"]["details"]["suggested_action"] == "arriero nodes upgrade far"
    for version in ("0.1.0", "0.2.0"):
        assert version in shown["error"]["message"]
    refused = home.run(*COUNT, "--node", "far", "--json", **new)
    assert refused.json["error"]["code"] == "VERSION_MISMATCH", refused
    looked = home.run("nodes", "doctor", "far", "--json", **new)
    (wrong,) = (each for each in looked.json["findings"] if not each["is_ok"])
    assert (looked.code, wrong["code"]) == (1, "VERSION_MISMATCH"), looked
    assert wrong["advice"] == "arriero nodes upgrade far"
    done = home.run("nodes", "upgrade", "--all", "--json", **new)
    # The one that cannot be reached keeps no other from its upgrade.
    assert done.code == 1, done
    assert {name: error["code"] for name, error in done.json["failed"].items()} == {
        "away": "NODE_UNREACHABLE"
    }
    assert "not upgraded: away" in done.err
    assert [(each["name"], each["version"], each["status"]) for each in done.json["nodes"]] == [
        ("far", "0.2.0", "ready")
    ]
    assert home.run(*COUNT, "--node", "far", **new).out.strip() == ANSWER
    assert str((remote.path / "current").readlink()).startswith(("envs/0.2.0-", f"{remote.path}/envs/0.2.0-"))
    again = home.run("nodes", "upgrade", "far", **new)
    assert again.code == 0 and "is arriero 0.2.0 already" in again.err, again
    assert "takes no new work" not in again.err, "there was nothing to do"


def test_models_go_from_neighbour_to_neighbour(home: Home, remote: Remote, tmp_path: Path) -> None:
    with Remote(tmp_path / "third") as third:
        third.prepare()
        (tmp_path / "repo").mkdir()
        write_llama(tmp_path / "repo/tiny-Q8_0.gguf")
        with HubProcess(org__tiny=tmp_path / "repo") as hub:
            # Only this machine can reach the source at all.
            home.env["HF_ENDPOINT"] = hub.url
            added(home, remote)
            added(home, third, "third")
            assert home.run("models", "pull", "hf:org/tiny:Q8_0", "--node", "box", "-q").code == 0
        for target, source in (("far", "box"), ("third", "far")):
            if source == "far":
                assert home.run("models", "rm", "hf:org/tiny:Q8_0", "--node", "box").code == 0
            done = home.run("models", "pull", "hf:org/tiny:Q8_0", "--node", target, "--json")
            assert done.code == 0, done
            assert done.json["source"] == f"node {source}"
        assert home.run("models", "rm", "hf:org/tiny:Q8_0", "--node", "far").code == 0
        done = home.run("models", "pull", "hf:org/tiny:Q8_0", "--node", "box", "--json")
        assert done.json["source"] == "node third", done


def test_a_copy_outlasts_cuts_of_either_machine(home: Home, remote: Remote, tmp_path: Path) -> None:
    (tmp_path / "repo").mkdir()
    with write_llama(tmp_path / "repo/big-Q8_0.gguf").open("ab") as file:
        file.truncate(160_000_000)
    ref = "hf:org/big:Q8_0"

    def comes() -> None:
        def look() -> int:
            (download,) = [each for each in client.downloads() if each.node == "third"]
            assert download.error is None, download
            assert download.state != "complete", "too quick for what is asked about"
            is_coming = download.state == "downloading" and download.source == "node far"
            return download.bytes_downloaded if is_coming and not download.retry_reason else 0

        here = until("it comes", look)
        until("bytes come", lambda: look() > here + 1_000_000)

    with Remote(tmp_path / "third") as third:
        third.prepare()
        # What is asked for at once comes at once; with so much more to come it is not over before the cuts.
        (third.folder / "config.toml").write_text("download_rate_max_mbps = 16\n")
        with HubProcess(org__big=tmp_path / "repo") as hub:
            home.env["HF_ENDPOINT"] = hub.url
            added(home, remote)
            added(home, third, "third")
            assert home.run("models", "pull", ref, "--node", "box", "-q").code == 0
        assert home.run("models", "pull", ref, "--node", "far", "-q").code == 0
        assert home.run("models", "rm", ref, "--node", "box").code == 0
        client = Orchestrator(home.url(), "")
        pull = home.start("models", "pull", ref, "--node", "third", "--json")
        # As a prompt that needs it does, for which a machine is named.
        infer = home.start("infer", "--model", ref, "--node", "third", "--max-tokens", "1", "x")
        until("it is there", lambda: any(each.node == "third" for each in client.downloads()))
        comes()
        for name, machine in (("far", remote), ("third", third)):
            # The one that gives; then the one that fetches: what it goes on with is told it from here.
            machine.server.kill()
            missed(client, name)
            machine.server.start()
            comes()
        # The agent after this one knows no ways either, and nobody reaches the model's source.
        (third.folder / "config.toml").write_text("")
        third.kill_agent()
        done = cli.finish(pull)
        assert done.code == 0, done
        assert done.json["source"] == "node far"
        assert (told := cli.finish(infer)).code == 0, told


def missed(client: Orchestrator, name: str) -> None:
    """Wait until a node is known to be gone."""
    until(f"{name} is missed", lambda: (name, "unreachable") in {(n.name, n.status) for n in client.nodes()})


def said(process: subprocess.Popen[bytes], words: str) -> None:
    """Wait until a command has told a step."""
    assert process.stderr is not None
    assert any(words in line.decode() for line in process.stderr), f"never said: {words}"


def test_a_node_is_there_for_the_command_that_starts_the_pool(home: Home, remote: Remote) -> None:
    added(home, remote)
    assert home.run("down").code == 0
    done = home.run(*COUNT, "--node", "far")
    assert (done.code, done.out.strip()) == (0, ANSWER), done


def test_a_removal_that_is_interrupted_leaves_a_node_that_works(home: Home, remote: Remote) -> None:
    added(home, remote)
    with home.start("nodes", "remove", "far") as removing:
        said(removing, "let us in")
        removing.kill()
    until("it computes", lambda: home.run(*COUNT, "--node", "far").code == 0)


def test_an_upgrade_that_dies_with_its_orchestrator_drains_nothing_for_good(
    home: Home, remote: Remote, tmp_path: Path
) -> None:
    added(home, remote)
    assert home.run("down").code == 0
    newer = other_version(tmp_path / "newer", "0.2.0")
    remote.prepare(newer)
    assert home.run("up", "-q", PYTHONPATH=str(newer)).code == 0
    with home.start("nodes", "upgrade", "far", PYTHONPATH=str(newer)) as upgrading:
        said(upgrading, "takes no new work")
        home.kill(home.pid("orchestrator"))
        upgrading.kill()
    # The agent before runs, and fits the orchestrator before.
    assert home.run("down").code == 0
    assert home.run("up", "-q").code == 0
    status_is(home, "far", "ready")


def test_what_a_machine_told_last_is_known_to_the_next_orchestrator(home: Home, remote: Remote) -> None:
    added(home, remote)
    assert home.run("nodes", "drain", "far", "-q").code == 0
    before = node(home, "far")
    assert home.run("down").code == 0
    remote.server.kill()
    assert home.run("up", "-q").code == 0
    after = node(home, "far")
    assert after["last_connected_unix"] >= before["last_connected_unix"] > 0
    assert after["is_drained"] and after["version"] == before["version"]


def test_an_upgrade_that_does_not_do_goes_back(home: Home, remote: Remote, tmp_path: Path) -> None:
    added(home, remote)
    before = (remote.path / "current").readlink()
    assert home.run("down").code == 0
    newer = other_version(tmp_path / "newer", "0.2.0")
    # What answers as it should, and cannot join.
    strange = other_version(tmp_path / "strange", "0.2.0")
    agent = strange / "arriero/agent/app.py"
    snapshot, strangely = (
        "capabilities=self._machine.capabilities()",
        "msgspec.structs.replace({}, api_version=99)",
    )
    assert snapshot in agent.read_text()
    words = agent.read_text().replace(
        snapshot, f"capabilities={strangely.format(snapshot.partition('=')[2])}"
    )
    agent.write_text(words.replace("import asyncio\n", "import asyncio\nimport msgspec\n", 1))
    new = {"PYTHONPATH": str(newer)}
    assert home.run("up", "-q", **new).code == 0
    # What is installed as the new version starts, and is the old one; or never joins.
    for source in (PACKAGE.parent, strange):
        tag = remote.prepare(newer)
        (pointer,) = (remote.path / "envs" / tag).glob("lib/*/site-packages/here.pth")
        pointer.write_text(pointer.read_text().replace(str(newer), str(source)))
        done = home.run("nodes", "upgrade", "far", "--json", **new)
        assert done.json["error"]["code"] == "VERSION_MISMATCH", done
        assert "runs again" in done.json["error"]["details"]["left"]
        assert (remote.path / "current").readlink().name == before.name
        assert not (remote.path / "envs" / tag).exists()
        until("the old one is held, and refused", lambda: "0.1.0" in str(node(home, "far")["error"]))
        assert node(home, "far")["error"]["code"] == "VERSION_MISMATCH"
        assert str(before.name) in " ".join(psutil.Process(remote.run_record()["pid"]).cmdline())


def test_a_machine_that_cannot_be_reached_is_removed_only_by_force(home: Home, remote: Remote) -> None:
    added(home, remote)
    remote.server.kill()
    refused = home.run("nodes", "remove", "far", "--json")
    assert refused.json["error"]["code"] == "NODE_UNREACHABLE", refused
    assert "--force" in refused.json["error"]["details"]["suggested_action"]
    assert node(home, "far")["name"] == "far"
    forced = home.run("nodes", "remove", "far", "--force")
    assert forced.code == 0 and "is left" in forced.err + forced.out, forced
    assert [each["name"] for each in home.run("nodes", "list", "--json").json["nodes"]] == ["box"]
