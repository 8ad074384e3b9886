"""Whose is a machine, what was there before, and what goes with whom?  By commands alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.home import Home, until
from tests.support.remote import Remote

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
