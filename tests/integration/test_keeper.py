"""Whoever keeps an agent keeps it, whatever happens to the machine."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.home import Home, until
from tests.support.remote import Remote

FULL = Path("/dev/full")
#: As it is run on another machine, but for how it comes there.
THERE = (
    "import sys; from arriero.orchestrator.machines import agent_child, there_child; "
    "there_child.main(sys.argv[1], agent_child.ACTIONS)"
)
#: Runs in every Python of an environment, before anything of ours does.
HANG = """
import pathlib, signal, sys, time
if sys.orig_argv[-1] == "agent":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pathlib.Path({began!r}).touch()
    time.sleep(600)
"""
#: The first agent ends when it is told to, and nothing comes of it; the next one is a good one.
END = """
import os, pathlib, sys, time
began, go = pathlib.Path({began!r}), pathlib.Path({go!r})
if sys.orig_argv[-1] == "agent" and not began.exists():
    began.touch()
    while not go.exists():
        time.sleep(0.02)
    os._exit(0)
"""


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full to write to")
def test_an_agent_is_kept_also_where_no_log_can_be_written() -> None:
    with Home() as home, FULL.open("wb") as log:
        with subprocess.Popen(
            [sys.executable, "-m", "arriero", "keep-agent"], env=home.env, stdout=log, stderr=log
        ) as keeper:
            until("an agent runs", lambda: home.state.running("agent"))
            first = home.pid("agent")
            os.kill(first, signal.SIGKILL)
            until("another one runs", lambda: (r := home.state.running("agent")) and r.pid != first)
            keeper.terminate()
            assert keeper.wait(60) == 0
        home.assert_clean()


def asked_to_start(machine: Remote, **more: float) -> list[str]:
    """Return the command that starts a machine's agent there."""
    asked = {"action": "start", "path": str(machine.path), "name": "far", "uses_services": False, **more}
    return [sys.executable, "-c", THERE, json.dumps(asked)]


def with_hook(machine: Remote, hook: str) -> None:
    """Have the machine's Python run something before it runs anything of ours."""
    tag = machine.prepare()
    (packages,) = (machine.path / "envs" / tag).glob("lib/*/site-packages")
    (packages / "hang.pth").write_text("import hang\n")
    (packages / "hang.py").write_text(hook)
    (machine.path / "current").symlink_to(machine.path / "envs" / tag)


def is_locked(path: Path) -> bool:
    """Return whether somebody has the turn to change what runs there."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_an_agent_is_started_also_where_the_one_before_is_just_ending(tmp_path: Path) -> None:
    machine = Remote(tmp_path)
    began, go = tmp_path / "began", tmp_path / "go"
    with_hook(machine, END.format(began=str(began), go=str(go)))
    keep = [str(machine.path / "current/bin/python"), "-m", "arriero", "keep-agent"]
    (machine.path / "home").mkdir()
    env = {"ARRIERO_HOME": str(machine.path / "home"), "PATH": os.environ["PATH"]}
    try:
        with subprocess.Popen(keep, env=env) as keeper:
            until("the first one is there", began.exists, 30)
            starting = subprocess.Popen(
                asked_to_start(machine, answer_timeout_s=40), stdout=subprocess.PIPE, text=True
            )
            lock = machine.path / ".lock"
            until("it is waited for", lambda: lock.exists() and is_locked(lock))
            go.touch()
            assert keeper.wait(30) == 0, "who was told to end is not started again"
            out, _ = starting.communicate(timeout=60)
            assert json.loads(out)["ok"]["is_new"]
        assert machine.run_record()["pid"] in {process.pid for process in machine.processes()}
    finally:
        kill_all(machine)


def kill_all(machine: Remote) -> None:
    """Keepers first, or they would start agents anew."""
    for process in sorted(machine.processes(), key=lambda p: "keep-agent" not in p.cmdline()):
        process.kill()
    machine.assert_quiet()


def test_an_agent_that_hangs_as_it_starts_leaves_nothing(tmp_path: Path) -> None:
    machine = Remote(tmp_path)
    with_hook(machine, HANG.format(began=str(tmp_path / "began")))
    try:
        asked = asked_to_start(machine, answer_timeout_s=8, stop_timeout_s=0.2)
        done = subprocess.run(asked, capture_output=True, check=True)
        assert json.loads(done.stdout)["error"]["code"] == "DAEMON_START_FAILED"
        assert (tmp_path / "began").exists(), "it was there, and hung"
        machine.assert_quiet()
    finally:
        kill_all(machine)
