"""Do `up`, `down`, `status` and their kin keep their word, with real daemons?"""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import cli
from tests.support.home import Home, until
from tests.support.remote import other_version

from arriero.contracts.version import __version__
from arriero.runtime import processes


@pytest.fixture
def home() -> Iterator[Home]:
    with Home() as made:
        yield made


def test_up_status_down(home: Home) -> None:
    first = home.run("up")
    assert first.code == 0
    lines = first.out.splitlines()
    assert [line.split()[0] for line in lines] == ["orchestrator", "agent"]
    assert all("http://127.0.0.1:" in line for line in lines)
    assert "starting the orchestrator" in first.err

    again = home.run("up")
    assert (again.code, again.err) == (0, "")
    assert again.out.count("was running already") == 2

    status = home.run("status")
    assert status.code == 0
    assert [line.split()[:2] for line in status.out.splitlines()] == [
        ["PART", "STATE"], ["orchestrator", "running"], ["agent", "running"],
    ]  # fmt: skip
    as_json = home.run("status", "--json").json
    assert as_json["orchestrator"]["pid"] == home.pid("orchestrator")
    assert as_json["agent"]["answers"] is True and as_json["workers"] == []

    nodes = until("the node has joined", lambda: home.run("nodes", "list", "--json").json["nodes"])
    assert [node["name"] for node in nodes] == ["box"]
    assert home.run("nodes", "list").out.splitlines()[1].startswith("box ")
    assert home.workers() == []
    assert home.run("models", "list").code == 0
    assert home.run("downloads", "list", "--json").json == {"downloads": []}
    explained = home.run("explain", "--model", "demo")
    assert explained.code == 0 and re.search(r"^1 +box +ready +cpu +", explained.out, re.MULTILINE)
    assert home.run("explain", "--model", "demo", "--json").json["node"] == "box"
    unlabelled = home.run("explain", "--model", "demo", "--label", "disk=fast")
    assert unlabelled.code == 1 and "lacks the label disk=fast" in unlabelled.out
    assert home.run("explain", "--label", "disk").code == 2

    down = home.run("down")
    assert down.code == 0
    assert {line.split()[0] for line in down.out.splitlines()} == {"orchestrator", "agent"}
    home.assert_clean()
    assert home.run("down").out == "nothing was running\n"


def test_status_without_a_pool_exits_1_and_says_how_to_start_one(home: Home) -> None:
    done = home.run("status")
    assert done.code == 1
    assert done.out.count("not running") == 2 and "arriero up" in done.err
    assert home.run("status", "--json").json == {"orchestrator": None, "agent": None, "workers": []}
    for command in (("ps",), ("nodes", "list"), ("models", "list"), ("workers", "stop", "--all")):
        asked = home.run(*command)
        assert asked.code == 1 and "error: NOT_RUNNING: " in asked.err, command


@pytest.mark.parametrize("flag", ["--port", "--agent-port"])
def test_up_with_a_taken_port_leaves_nothing_running(home: Home, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = home.run("up", flag, str(port))
    assert done.code == 1 and done.out == ""
    assert f"error: PORT_IN_USE: port {port} on 127.0.0.1 is taken" in done.err
    home.assert_clean()


def test_a_chosen_port_that_is_taken_is_an_error_of_infer_too(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = home.run("infer", "-q", "hi", ARRIERO_ORCHESTRATOR_PORT=str(taken.getsockname()[1]))
    assert done.code == 1 and "error: PORT_IN_USE: " in done.err
    home.assert_clean()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_home_without_rights_is_one_clear_error(home: Home) -> None:
    home.state.home.mkdir(mode=0o500)
    done = home.run("up")
    assert done.code == 1 and "error: STATE_DIR_UNUSABLE: " in done.err
    assert home.run("doctor").code == 1


def test_a_home_that_is_a_file_is_one_clear_error(home: Home) -> None:
    home.state.home.write_text("in the way")
    for command in (("up",), ("infer", "hi")):
        done = home.run(*command)
        assert done.code == 1 and "error: STATE_DIR_UNUSABLE: " in done.err, command
        assert "Traceback" not in done.err
    assert home.run("down").code == 0
    doctor = home.run("doctor", "--json")
    assert doctor.code == 1
    assert [check["name"] for check in doctor.json["checks"] if check["level"] == "fail"] == ["home"]


def test_a_home_that_cannot_be_made_is_one_clear_error(home: Home) -> None:
    done = home.run("up", "--json", ARRIERO_HOME="/proc/nowhere")
    assert done.code == 1 and done.json["error"]["code"] == "STATE_DIR_UNUSABLE"


def test_wrong_settings_of_a_daemon_exit_2(home: Home) -> None:
    done = home.run("up", ARRIERO_WORKER_SLOTS="99999")
    assert done.code == 2 and "INVALID_SETTINGS" in done.err and "worker_slots" in done.err
    home.assert_clean()


def test_down_ends_what_a_killed_orchestrator_and_agent_left(home: Home) -> None:
    home.up()
    home.kill(home.pid("orchestrator"))
    assert home.run("status").code == 1
    restarted = home.run("up", "--json", "-q")
    assert restarted.json["agent"]["was_running"] and not restarted.json["orchestrator"]["was_running"]
    home.kill(home.pid("agent"))
    home.kill(home.pid("orchestrator"))
    done = home.run("down")
    assert done.code == 0
    assert "removed what was left behind: orchestrator.json, agent.json" in done.out
    home.assert_clean()


def test_down_ends_a_daemon_that_has_not_said_yet_that_it_runs(home: Home) -> None:
    home.up()
    agent = home.pid("agent")
    # As if it had been caught between taking its lock and writing its file.
    home.state.run_file("agent").unlink()
    done = home.run("down", "--json")
    assert {stopped["pid"] for stopped in done.json["stopped"]} >= {agent}
    home.assert_clean()


def test_down_never_touches_a_reused_pid(home: Home) -> None:
    home.up()
    record = home.state.running("agent")
    assert record is not None
    home.run("down")
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        stale = record.__class__(
            pid=bystander.pid, url=record.url, version=record.version, started=1.0,
            pid_start_ticks=record.pid_start_ticks, boot_id=record.boot_id,
        )  # fmt: skip
        from arriero.runtime import state_dir

        state_dir.write(home.state.run_file("agent"), stale)
        done = home.run("down", "--json")
        assert done.json["stopped"] == [] and done.json["removed"] == ["agent.json"]
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_daemons_that_do_not_answer_in_time_are_not_left_running(home: Home) -> None:
    done = home.run("up", "--timeout", "0.05")
    assert done.code == 1 and done.out == ""
    assert "error: DAEMON_START_FAILED: the orchestrator does not answer after 0.05 s" in done.err
    home.assert_clean()


def test_two_commands_at_once_start_one_pool(home: Home) -> None:
    started = [home.start("up", "--json", "-q") for _ in range(3)]
    done = [cli.finish(process) for process in started]
    assert [one.code for one in done] == [0, 0, 0], done
    assert len({one.json["orchestrator"]["pid"] for one in done}) == 1
    assert len({one.json["agent"]["pid"] for one in done}) == 1
    assert sum(not one.json["agent"]["was_running"] for one in done) == 1
    home.run("down")
    home.assert_clean()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_up_in_the_foreground_ends_all_by_a_signal(home: Home, number: int) -> None:
    process = home.start("up", "--foreground")
    assert process.stdout is not None
    while not process.stdout.readline().startswith(b"agent"):
        assert process.poll() is None
    assert home.run("status").code == 0
    done = cli.interrupt(process, number)
    assert done.code == 0, done
    home.assert_clean()


def test_daemons_of_a_foreground_pool_do_not_outlive_a_killed_command(home: Home) -> None:
    process = home.start("up", "--foreground")
    assert process.stdout is not None
    while not process.stdout.readline().startswith(b"agent"):
        assert process.poll() is None
    known = [processes.identity(home.pid(role)) for role in ("orchestrator", "agent")]
    process.kill()
    cli.finish(process)
    for one in known:
        assert one is not None and processes.wait_gone(one, 30)
    home.assert_clean()


def test_doctor_tells_a_taken_port_from_ours(home: Home, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = home.run("doctor", "--json", ARRIERO_AGENT_PORT=port)
        assert found.code == 1
        [check] = [check for check in found.json["checks"] if check["name"] == f"port {port}"]
        assert (
            check["level"] == "fail"
            and "taken" in check["message"]
            and "ARRIERO_AGENT_PORT" in check["advice"]
        )
    home.up()
    url = home.run("status", "--json").json["agent"]["url"]
    ours = home.run("doctor", ARRIERO_AGENT_PORT=url.rpartition(":")[2])
    assert ours.code == 0, ours.out
    assert "ours: the agent" in ours.out and f"answers at {url}" in ours.out
    home.run("down")
    home.assert_clean()


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_doctor_looks_at_the_disk_of_the_models(home: Home) -> None:
    home.state.models.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(home.state.models)]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no mount here: {mounted.stderr.decode()}")
    try:
        checks = home.run("doctor", "--json").json["checks"]
    finally:
        subprocess.run(["umount", str(home.state.models)], check=True)
    [disk] = [check for check in checks if check["name"] == "disk"]
    assert disk["level"] == "fail" and disk["message"].startswith("0.0 GiB free")


def test_an_agent_of_another_version_is_named_with_what_helps(tmp_path: Path) -> None:
    other = other_version(tmp_path / "older", "0.0.1")
    with Home() as home:
        assert home.run("up", "-q", PYTHONPATH=str(other)).code == 0
        home.kill(home.pid("orchestrator"))
        refused = home.run("up", "--json")
        assert refused.json["error"]["code"] == "VERSION_MISMATCH", refused
        for version in ("0.0.1", __version__):
            assert version in refused.json["error"]["message"]
        assert "arriero down" in refused.json["error"]["details"]["suggested_action"]
        assert home.run("down").code == 0
        assert home.run("up", "-q").code == 0
        assert home.run("down").code == 0
        home.assert_clean()
