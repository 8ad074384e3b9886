"""Does `infer` show a task as it comes, and end as the task did?  A scripted server plays the orchestrator."""

import os
import pty
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import cli
from tests.support.scripted_http import Connection, Request, ScriptedServer, free_port

TASK_ID = "t-0123456789abcdef"
TOKENS = ["5", " 6", " 7", " ä", ""]
Play = Callable[[Connection], None]


def accepted(connection: Connection) -> None:
    connection.begin_stream()
    connection.event(
        {"type": "accepted", "task_id": TASK_ID, "actor": "orchestrator", "message": "demo is accepted"}
    )
    connection.event(
        {
            "type": "placing", "node": "box", "worker_id": "w-0123456789ab",
            "actor": "orchestrator", "message": "box has [7.4] GiB free: chosen",
        }
    )  # fmt: skip


def tokens(connection: Connection, texts: list[str] | None = None) -> None:
    for index, text in enumerate(TOKENS if texts is None else texts):
        connection.event({"type": "token", "token": text, "id": 100 + index, "index": index})


def end(connection: Connection) -> None:
    connection.event({"type": "usage", "prompt_tokens": 9, "completion_tokens": 5, "duration_ms": 12})
    connection.event({"type": "end", "finish_reason": "stop"})
    connection.event("[DONE]")
    connection.end_stream()


def whole(connection: Connection) -> None:
    accepted(connection)
    for percent in (0, 50, 100):
        connection.event({"type": "loading", "fraction": percent / 100})
    tokens(connection)
    end(connection)


def fails(code: str, message: str, **details: Any) -> Play:
    def play(connection: Connection) -> None:
        accepted(connection)
        tokens(connection, ["half", " an"])
        error = {"code": code, "message": message, "details": details}
        connection.event({"error": error}, event="error")
        connection.end_stream()

    return play


class Orchestrator:
    """A scripted orchestrator, and the environment of commands that talk to it."""

    def __init__(self, home: Path) -> None:
        self.play: Play = whole
        self.cancelled = threading.Event()
        self.streaming = threading.Event()
        self.left = threading.Event()
        self.server = ScriptedServer(self._serve)
        self._home = home

    def _serve(self, request: Request, connection: Connection) -> None:
        if request.method == "POST" and request.path == "/v1/tasks":
            self.play(connection)
        elif request.method == "DELETE" and request.path == f"/v1/tasks/{TASK_ID}":
            self.cancelled.set()
            connection.answer(204, b"")
        elif request.method == "GET" and request.path == f"/v1/tasks/{TASK_ID}":
            record = {"task_id": TASK_ID, "state": "done", "model": "demo", "created_unix": 1}
            connection.answer(200, record)
        else:
            connection.answer(404, {"error": {"code": "NOT_FOUND", "message": request.path}})

    def holds(self, connection: Connection) -> None:
        """Send half an answer, then nothing until the client is gone."""
        accepted(connection)
        tokens(connection, ["half"])
        self.streaming.set()
        if connection.wait_closed():
            self.left.set()

    @property
    def env(self) -> dict[str, str]:
        return cli.environment(self._home, ARRIERO_URL=self.server.url)

    @property
    def task(self) -> Request:
        [found] = [request for request in self.server.requests if request.method == "POST"]
        return found


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[Orchestrator]:
    made = Orchestrator(tmp_path / "home")
    with made.server:
        yield made


def test_stdout_has_the_answer_alone_and_stderr_the_steps(orchestrator: Orchestrator) -> None:
    done = cli.run("infer", "Count from 5 to 7.", env=orchestrator.env)
    assert (done.code, done.out) == (0, "5 6 7 ä\n")
    assert done.err.splitlines() == [
        "[orchestrator] demo is accepted",
        "[orchestrator] box has [7.4] GiB free: chosen",
        "[loading] 0%",
        "[loading] 50%",
        "[loading] 100%",
    ]
    assert orchestrator.task.json == {"messages": [{"role": "user", "content": "Count from 5 to 7."}]}
    assert "x-request-deadline" not in orchestrator.task.headers


def test_quiet_says_nothing_on_stderr(orchestrator: Orchestrator) -> None:
    done = cli.run("infer", "--quiet", "hi", env=orchestrator.env)
    assert (done.code, done.out, done.err) == (0, "5 6 7 ä\n", "")


def test_all_options_reach_the_task(orchestrator: Orchestrator) -> None:
    arguments = (
        "--model demo --max-tokens 7 --temperature 0.5 --seed 3 --top-p 0.9 --top-k 5 --stop X --stop Y"
    )
    where = "--node box --backend cpu --device cpu --timeout 50 --system terse"
    done = cli.run("infer", *arguments.split(), *where.split(), "--prompt", "hi", env=orchestrator.env)
    assert done.code == 0
    assert orchestrator.task.json == {
        "messages": [{"role": "system", "content": "terse"}, {"role": "user", "content": "hi"}],
        "model": "demo", "max_tokens": 7, "temperature": 0.5, "seed": 3, "top_p": 0.9, "top_k": 5,
        "stop": ["X", "Y"], "node": "box", "backend": "cpu", "device": "cpu",
    }  # fmt: skip
    assert 0 < int(orchestrator.task.headers["x-request-deadline"]) <= 50_000


def test_raw_prompt_from_stdin(orchestrator: Orchestrator) -> None:
    done = cli.run("infer", "--raw", "-", env=orchestrator.env, content="Once\nupon ä time\n")
    assert done.code == 0
    assert orchestrator.task.json == {"prompt": "Once\nupon ä time"}


def test_json_is_one_object(orchestrator: Orchestrator) -> None:
    done = cli.run("infer", "--json", "-q", "hi", env=orchestrator.env)
    assert done.code == 0
    assert done.json == {
        "model": "demo", "text": "5 6 7 ä", "node": "box", "worker_id": "w-0123456789ab",
        "task_id": TASK_ID, "usage": {"prompt_tokens": 9, "completion_tokens": 5, "duration_ms": 12},
        "finish_reason": "stop", "token_ids": [100, 101, 102, 103, 104], "error": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [("WORKER_LOST", 1), ("OUT_OF_MEMORY", 137), ("REQUEST_TIMEOUT", 124), ("LOADING_TIMEOUT", 124)],
)
def test_a_failure_mid_stream_keeps_what_came(orchestrator: Orchestrator, code: str, exit_code: int) -> None:
    orchestrator.play = fails(code, "needs 9 MB, has 4", log_tail=["last words"], suggested_action="Do this.")
    done = cli.run("infer", "-q", "hi", env=orchestrator.env)
    assert (done.code, done.out) == (exit_code, "half an\n")
    assert done.err == f"error: {code}: needs 9 MB, has 4\n  | last words\n  hint: Do this.\n"
    as_json = cli.run("infer", "-q", "--json", "--model", "demo", "hi", env=orchestrator.env)
    assert as_json.code == exit_code and as_json.err == ""
    assert as_json.json["text"] == "half an"
    assert as_json.json["token_ids"] == [100, 101]
    assert as_json.json["error"]["code"] == code


def test_an_orchestrator_that_dies_mid_stream(orchestrator: Orchestrator) -> None:
    def dies(connection: Connection) -> None:
        accepted(connection)
        tokens(connection, ["half"])

    orchestrator.play = dies
    done = cli.run("infer", "-q", "hi", env=orchestrator.env)
    assert (done.code, done.out) == (1, "half\n")
    assert done.err.startswith("error: TOKEN_STREAM_ERROR: ")


def test_nobody_listens_at_the_given_address(tmp_path: Path) -> None:
    with free_port() as port:
        env = cli.environment(tmp_path, ARRIERO_URL=f"http://127.0.0.1:{port}")
        done = cli.run("infer", "-q", "hi", env=env)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: TOKEN_STREAM_ERROR: ") and "connection refused" in done.err


def test_timeout_exits_124_and_closes_the_stream(orchestrator: Orchestrator) -> None:
    orchestrator.play = orchestrator.holds
    done = cli.run("infer", "-q", "--timeout", "5", "hi", env=orchestrator.env)
    assert (done.code, done.out) == (124, "half\n")
    assert done.err.startswith("error: REQUEST_TIMEOUT: not done within 5 s\n")
    assert orchestrator.left.wait(60)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_cancels_the_task(orchestrator: Orchestrator, number: int, code: int) -> None:
    orchestrator.play = orchestrator.holds
    process = cli.start("infer", "-q", "hi", env=orchestrator.env)
    assert orchestrator.streaming.wait(60)
    # The token is on its way: read it, so that the signal comes while it waits for the next.
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 4)
    done = cli.interrupt(process, number)
    assert (done.code, first.decode() + done.out, done.err) == (code, "half\n", "")
    assert orchestrator.left.wait(60) and orchestrator.cancelled.wait(60)


def test_an_interrupted_json_answer_is_still_json(orchestrator: Orchestrator) -> None:
    orchestrator.play = orchestrator.holds
    process = cli.start("infer", "--json", "hi", env=orchestrator.env)
    assert orchestrator.streaming.wait(60)
    assert process.stderr is not None
    while b"chosen" not in process.stderr.readline():
        pass
    done = cli.interrupt(process)
    assert done.code == 130
    assert done.json["error"]["code"] == "REQUEST_CANCELLED"
    assert orchestrator.left.wait(60)


def test_a_reader_that_has_enough_cancels_quietly(orchestrator: Orchestrator) -> None:
    def endless(connection: Connection) -> None:
        accepted(connection)
        try:
            while not connection.stopping.wait(0.01):
                tokens(connection, ["more "])
        except OSError:
            orchestrator.left.set()

    orchestrator.play = endless
    process = cli.start("infer", "-q", "hi", env=orchestrator.env)
    assert process.stdout is not None and process.stderr is not None
    assert os.read(process.stdout.fileno(), 4)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0
    assert orchestrator.left.wait(60)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "there is no prompt"),
        (("",), "the prompt is empty"),
        (("a", "--prompt", "b"), "given twice"),
        (("a", "--max-tokens", "0"), "0 is not in the range"),
        (("a", "--temperature", "hot"), "'hot' is not a valid float"),
        (("a", "--frob"), "No such option '--frob'"),
        (("a", "b"), "unexpected extra argument"),
        (("a", "--raw", "--system", "x"), "--raw sends none"),
    ],
)
def test_wrong_usage_is_one_line_and_exits_2(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = cli.run("infer", *arguments, env=cli.environment(tmp_path))
    assert (done.code, done.out) == (2, "")
    [line] = done.err.splitlines()
    assert line.startswith("error: ") and said in line and "arriero infer --help" in line


def test_wrong_usage_with_json_is_an_envelope(tmp_path: Path) -> None:
    done = cli.run("infer", "--json", "--frob", env=cli.environment(tmp_path))
    assert done.code == 2
    assert done.json["error"]["code"] == "INVALID_REQUEST"


def test_wrong_settings_exit_2_and_name_every_problem(tmp_path: Path) -> None:
    env = cli.environment(tmp_path, ARRIERO_AGENT_PORT="many", ARRIERO_FROB="1")
    done = cli.run("infer", "hi", env=env)
    assert (done.code, done.out) == (2, "")
    assert "INVALID_SETTINGS" in done.err and "agent_port" in done.err and "frob" in done.err


def test_a_terminal_gets_a_progress_bar_and_colours_unless_it_wants_none(orchestrator: Orchestrator) -> None:
    coloured = _on_a_terminal(orchestrator.env | {"TERM": "xterm", "COLUMNS": "100"})
    assert "\x1b[2m[orchestrator] demo is accepted\x1b[0m" in coloured
    assert "━" in coloured and "100%" in coloured
    assert "5 6 7 ä" in coloured
    plain = _on_a_terminal(orchestrator.env | {"TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"})
    assert "[orchestrator] demo is accepted" in plain and "\x1b[2m" not in plain and "\x1b[3" not in plain


def _on_a_terminal(env: dict[str, str]) -> str:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "arriero", "infer", "hi"], env=env, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    seen = b""
    try:
        while select.select([ours], [], [], 20)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:
                break
            if not piece:
                break
            seen += piece
    finally:
        os.close(ours)
        assert process.wait(60) == 0
    return seen.decode()
