"""Whoever keeps an agent keeps it, whatever happens to the machine."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.home import Home, until

pytestmark = pytest.mark.timeout(100)
FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full to write to")
def test_an_agent_is_kept_also_where_no_log_can_be_written() -> None:
    with Home() as home, FULL.open("wb") as log:
        with subprocess.Popen(
            [sys.executable, "-m", "arriero", "keep-agent"], env=home.env, stdout=log, stderr=log
        ) as keeper:
            until("an agent runs", lambda: home.state.running("agent"), 30)
            first = home.pid("agent")
            os.kill(first, signal.SIGKILL)
            until("another one runs", lambda: (r := home.state.running("agent")) and r.pid != first, 30)
            keeper.terminate()
            assert keeper.wait(30) == 0
        home.assert_clean()
