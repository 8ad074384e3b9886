"""300 hostile strings for the name, host, user, path and label of a machine: none executes anything.

A fixed seed, so that a failure is made again by `python -m tests.fuzz.nodes --seed 11 --count 300`; by hand
it tries as many as wanted.
"""

import shutil
import tempfile
from pathlib import Path

import pytest
from tests.fuzz import nodes

from arriero.testing.sshd import sshd_path

pytestmark = pytest.mark.skipif(sshd_path() is None, reason="no sshd is installed")


def test_none_of_many_hostile_strings_is_executed() -> None:
    # Short: paths of sockets are limited.
    folder = Path(tempfile.mkdtemp(prefix="arr-", dir="/tmp"))
    try:
        outcome = nodes.run(seed=11, count=300, folder=folder)
    finally:
        shutil.rmtree(folder)
    assert outcome.failures == []
    assert sum(outcome.arrived.values()) > 500 and sum(outcome.commands.values()) == 3
    # Not all is refused at the door.
    assert {part for part in outcome.codes if "INVALID_REQUEST" not in part}


def test_a_canary_tells() -> None:
    with tempfile.TemporaryDirectory(prefix="arr-") as name:
        hostile = nodes.Hostile(Path(name), 1)
        (Path(name) / "7").touch()
        (told,) = hostile.executed()
        assert repr(hostile.text(7)) in told
