"""Whatever dies, in whatever order: what does the person see, and is anything left afterwards?

Real orchestrator, agent and worker; the fake engine, since its faults come on demand.
"""

import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import cli
from tests.support.home import Home, until

PROMPT = "Count from 1 to 400."
#: Slow enough that a stream is still running when something happens to it.
SLOW = {"token_s": 0.02}


@pytest.fixture
def home() -> Iterator[Home]:
    with Home(engine="fake", engine_options=SLOW) as made:
        yield made


def streaming(home: Home, *arguments: str) -> Any:
    """Start an answer, and wait for its first token."""
    process = home.start("infer", "-q", *arguments, PROMPT)
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 1) == b"1", process.stderr.read()
    return process


def state_of_worker(home: Home) -> str:
    [worker] = home.workers()
    return str(worker["state"])


def worker_pid(home: Home) -> int:
    [worker] = home.workers()
    return int(worker["pid"])


def test_infer_starts_a_pool_that_the_next_one_uses(home: Home) -> None:
    first = home.run("infer", "Count from 5 to 9.")
    assert (first.code, first.out) == (0, "5 6 7 8 9\n")
    assert "[arriero] starting orchestrator and agent in the background" in first.err
    pid = worker_pid(home)

    second = home.run("infer", "-q", "--json", "Count from 2 to 4.")
    assert second.code == 0 and second.err == ""
    assert second.json["text"] == "2 3 4" and second.json["model"] == "demo" and second.json["node"] == "box"
    assert len(second.json["token_ids"]) == second.json["usage"]["completion_tokens"]
    [worker] = home.workers()
    assert worker["pid"] == pid and worker["worker_id"] == second.json["worker_id"]

    assert worker["worker_id"] in home.run("ps").out
    log = home.run("workers", "logs", worker["worker_id"])
    assert log.code == 0 and log.out.strip()
    talk = home.run("chat", "-q", content="Count from 1 to 3.\n/reset\nCount from 2 to 4.\n")
    assert (talk.code, talk.out, talk.err) == (0, "1 2 3\n2 3 4\n", "forgotten\n")

    stopped = home.run("workers", "stop", worker["worker_id"])
    assert (stopped.code, stopped.out) == (0, f"{worker['worker_id']} stopped\n")
    assert home.workers() == []
    unknown = home.run("workers", "stop", "w-000000000000")
    assert unknown.code == 1 and "error: WORKER_NOT_FOUND: " in unknown.err
    assert home.run("down").code == 0
    home.assert_clean()


def test_ephemeral_leaves_nothing(home: Home) -> None:
    done = home.run("infer", "--ephemeral", "Count from 5 to 9.")
    assert (done.code, done.out) == (0, "5 6 7 8 9\n")
    home.assert_clean()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_ephemeral_pool_ends_with_its_command_however_that_ends(home: Home, number: int) -> None:
    process = streaming(home, "--ephemeral")
    done = cli.interrupt(process, number)
    assert done.code == (130 if number == signal.SIGINT else -signal.SIGKILL)
    until("all have ended", lambda: not home.processes())
    home.assert_clean()


def test_ctrl_c_frees_the_slot_on_the_worker(home: Home) -> None:
    process = streaming(home)
    until("the slot is taken", lambda: state_of_worker(home) == "busy")
    done = cli.interrupt(process)
    assert done.code == 130 and done.out.startswith(" 2 3") and done.out.endswith("\n") and done.err == ""
    until("the slot is free", lambda: state_of_worker(home) == "idle")
    pid = worker_pid(home)
    assert f"(pid {pid}) ended by its agent" in home.run("down").out
    home.assert_clean()


def test_a_killed_command_frees_the_slot_too(home: Home) -> None:
    process = streaming(home)
    cli.interrupt(process, signal.SIGKILL)
    until("the slot is free", lambda: state_of_worker(home) == "idle")
    assert home.run("infer", "-q", "Count from 5 to 9.").out == "5 6 7 8 9\n"
    home.run("down")
    home.assert_clean()


def test_a_stalled_engine_is_a_timeout_and_frees_the_slot() -> None:
    with Home(engine="fake", engine_options={"stall_after_tokens": 3}) as home:
        # What is asked about begins when the worker is there.
        assert home.run("infer", "-q", "--max-tokens", "1", PROMPT).code == 0
        until("it is loaded", lambda: state_of_worker(home) == "idle")
        done = home.run("infer", "-q", "--timeout", "6", PROMPT)
        assert done.code == 124 and "error: REQUEST_TIMEOUT: " in done.err
        assert done.out == "1 2 3\n"
        until("the slot is free", lambda: state_of_worker(home) == "idle")
        home.run("down")
        home.assert_clean()


def test_an_engine_that_dies_mid_stream_leaves_what_came() -> None:
    with Home(engine="fake", engine_options={"exit_after_tokens": 3}) as home:
        done = home.run("infer", "-q", PROMPT)
        assert (done.code, done.out) == (1, "1 2 3\n")
        assert done.err.startswith("error: WORKER_LOST: ")
        home.run("down")
        home.assert_clean()


def test_a_model_that_does_not_load_says_why() -> None:
    with Home(engine="fake", engine_options={"fail_load": "no such layer"}) as home:
        done = home.run("infer", "-q", PROMPT)
        assert (done.code, done.out) == (1, "")
        assert "error: WORKER_START_FAILED: " in done.err and "no such layer" in done.err
        home.run("down")
        home.assert_clean()


@pytest.mark.parametrize(
    ("model", "code"),
    [("nonsense", "INVALID_MODEL_REFERENCE"), ("file:///nowhere.gguf", "INVALID_MODEL_PATH")],
)
def test_a_wrong_model_is_one_clear_error(home: Home, model: str, code: str) -> None:
    done = home.run("infer", "-q", "--model", model, "hi")
    assert (done.code, done.out) == (1, "")
    first, second = done.err.splitlines()
    assert first.startswith(f"error: {code}: ") and second.startswith("  hint: ")
    home.run("down")
    home.assert_clean()


def test_a_corrupt_model_is_one_clear_error(home: Home, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 100)
    done = home.run("infer", "-q", "--json", "--model", path.as_uri(), "hi")
    assert done.code == 1 and done.json["error"]["code"] == "MODEL_CORRUPTED"
    assert str(tmp_path) not in str(done.json["error"])
    home.run("down")
    home.assert_clean()


@pytest.mark.parametrize("order", list(itertools.permutations(["worker", "agent", "orchestrator"])))
def test_killed_in_any_order_then_down_leaves_nothing_and_infer_works(
    home: Home, order: tuple[str, ...]
) -> None:
    home.up()
    process = streaming(home)
    pids = {"worker": worker_pid(home), "agent": home.pid("agent"), "orchestrator": home.pid("orchestrator")}
    for role in order:
        home.kill(pids[role])
    done = cli.finish(process)
    assert done.code == 1 and done.err.startswith("error: "), done
    down = home.run("down")
    assert down.code == 0, down
    home.assert_clean()
    again = home.run("infer", "--ephemeral", "-q", "Count from 5 to 9.")
    assert (again.code, again.out) == (0, "5 6 7 8 9\n"), again
    home.assert_clean()


@pytest.mark.parametrize("roles", [("agent",), ("orchestrator",), ("agent", "orchestrator")])
def test_infer_goes_on_after_daemons_were_killed_without_any_down(home: Home, roles: tuple[str, ...]) -> None:
    assert home.run("infer", "-q", "Count from 5 to 9.").code == 0
    worker = worker_pid(home)
    for role in roles:
        home.kill(home.pid(role))
    done = home.run("infer", "-q", "Count from 5 to 9.")
    assert (done.code, done.out) == (0, "5 6 7 8 9\n"), done
    assert worker_pid(home) == worker, "the worker lives on and is adopted"
    assert home.run("down").code == 0
    home.assert_clean()
