"""Whoever keeps an agent keeps it, whatever happens to the machine."""

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


def test_an_agent_that_hangs_as_it_starts_leaves_nothing(tmp_path: Path) -> None:
    machine = Remote(tmp_path)
    tag = machine.prepare()
    (packages,) = (machine.path / "envs" / tag).glob("lib/*/site-packages")
    (packages / "hang.pth").write_text("import hang\n")
    (packages / "hang.py").write_text(HANG.format(began=str(tmp_path / "began")))
    (machine.path / "current").symlink_to(machine.path / "envs" / tag)
    try:
        asked = {
            "action": "start", "path": str(machine.path), "name": "far", "uses_services": False,
            "answer_timeout_s": 8, "stop_timeout_s": 0.2,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", THERE, json.dumps(asked)], capture_output=True, check=True
        )
        assert json.loads(done.stdout)["error"]["code"] == "DAEMON_START_FAILED"
        assert (tmp_path / "began").exists(), "it was there, and hung"
        machine.assert_quiet()
    finally:
        for process in machine.processes():
            process.kill()
