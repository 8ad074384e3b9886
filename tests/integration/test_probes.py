"""What does a person, or a service unit, get from `arriero probe`?"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from arriero.contracts.errors import KINDS
from arriero.probes.registry import PROBES
from arriero.probes.tokens import tokens
from arriero.probes.where import Where

NAMES = {
    "download-progress", "loading-progress", "tokens", "worker-health", "worker-state", "worker-spawn",
    "worker-ready", "catalog", "model-registered", "download-start",
}  # fmt: skip


def probe(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "ARRIERO_HOME": str(home), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "arriero", "probe", *arguments]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )


@contextmanager
def broken(mode: str, *more: str) -> Iterator[str]:
    command = [sys.executable, "-m", "arriero.testing.broken_server", mode, *more]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        yield server.stdout.readline().split()[1]
        server.stdin.close()


def test_the_names_are_those_that_scripts_rely_on() -> None:
    assert set(PROBES) == NAMES


def test_a_failure_is_told_in_words_on_stderr_and_nothing_on_stdout(tmp_path: Path) -> None:
    answer = probe(tmp_path, "worker-health")
    assert (answer.returncode, answer.stdout) == (1, "")
    assert "NO_WORKERS" in answer.stderr
    assert "hint: " in answer.stderr


def test_a_failure_is_told_as_data_on_stdout(tmp_path: Path) -> None:
    answer = probe(tmp_path, "worker-state", "--expect", "asleep", "--json")
    told = json.loads(answer.stdout)
    assert set(told) == {"probe", "exit_code", "error", "seen"}
    assert (told["probe"], told["exit_code"], answer.returncode) == ("worker-state", 1, 1)
    assert told["error"]["code"] == "UNKNOWN_WORKER_STATE"
    assert told["error"]["details"]["suggested_action"]


def test_a_success_is_one_line(tmp_path: Path) -> None:
    with broken("registry-backwards") as url:
        answer = probe(tmp_path, "worker-state", "--expect", "idle", "--url", url)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout == "worker-state: ok (states=idle, worker_id=w-00000000b0b0)\n"


def test_a_wrong_option_is_a_usage_error(tmp_path: Path) -> None:
    assert probe(tmp_path, "tokens").returncode == 2
    assert probe(tmp_path, "tokens", "--prompt", "x", "--timeout", "0").returncode == 2


@pytest.mark.parametrize("name", sorted(NAMES))
def test_help_says_how_it_may_end(tmp_path: Path, name: str) -> None:
    text = probe(tmp_path, name, "--help").stdout
    words = text.replace(",", " ").replace(".", " ").split()
    for code in PROBES[name].codes:
        assert str(code) in words
        assert f"Exit {KINDS[code].exit_code:d}:" in text


def test_a_registry_is_asked_before_its_worker(tmp_path: Path) -> None:
    """The look-up and the question are both in the limits: a registry that is mute does not hold us."""
    with broken("mute") as url:
        answer = probe(
            tmp_path, "worker-state", "--expect", "idle", "--url", url, "--timeout", "0.3", "--json"
        )
    assert json.loads(answer.stdout)["error"]["code"] == "NO_WORKERS"


def test_a_probe_is_a_function_too() -> None:
    with broken("token-dropped", "--after", "4") as url:
        result = tokens(Where(url=url), prompt="x", timeout_s=5.0)
    assert result.exit_code == 1
    assert result.error is not None
    assert result.error.error.code == "TOKEN_STREAM_ERROR"
    assert result.error.error.details["expected_index"] == 3
    assert result.seen["token_ids"] == [100, 101, 102]


def test_an_address_that_is_none_is_an_error_of_the_connection(tmp_path: Path) -> None:
    answer = probe(tmp_path, "download-progress", "no-address", "--json")
    assert (answer.returncode, json.loads(answer.stdout)["error"]["code"]) == (1, "SSE_CONNECTION_ERROR")
