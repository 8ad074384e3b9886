"""Does `chat` keep a talk's history, and stop an answer without ending the talk?"""

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.test_cli_infer import Orchestrator, fails, orchestrator
from tests.support import cli

__all__ = ["orchestrator"]


def said(made: Orchestrator) -> list[list[str]]:
    """Return the messages of each task, as their texts."""
    return [
        [message["content"] for message in request.json["messages"]]
        for request in made.server.requests
        if request.method == "POST"
    ]


def test_each_line_is_a_message_with_the_history_before_it(orchestrator: Orchestrator) -> None:
    lines = "one\n\ntwo\n/reset\nthree\n/model other\nfour\n/frob\n/help\n"
    done = cli.run("chat", "-q", "--system", "terse", env=orchestrator.env, content=lines)
    assert (done.code, done.out) == (0, "5 6 7 ä\n" * 4)
    answer = "5 6 7 ä"
    assert said(orchestrator) == [
        ["terse", "one"],
        ["terse", "one", answer, "two"],
        ["terse", "three"],
        ["terse", "three", answer, "four"],
    ]
    assert "forgotten" in done.err and "there is no command /frob" in done.err and "/quit" in done.err
    assert "model" not in orchestrator.server.requests[0].json
    assert orchestrator.server.requests[-1].json["model"] == "other"


def test_a_failed_message_is_told_and_the_talk_goes_on_to_its_exit_code(orchestrator: Orchestrator) -> None:
    orchestrator.play = fails("OUT_OF_MEMORY", "killed")
    done = cli.run("chat", "-q", env=orchestrator.env, content="one\ntwo\n")
    assert (done.code, done.out) == (137, "half an\nhalf an\n")
    assert done.err.count("error: OUT_OF_MEMORY: killed") == 2


def test_json_is_a_line_an_answer(orchestrator: Orchestrator) -> None:
    done = cli.run(
        "chat", "-q", "--json", "--label", "room=attic", env=orchestrator.env,
        content="one\ntwo\n/quit\nthree\n",
    )  # fmt: skip
    assert done.code == 0
    assert orchestrator.server.requests[-1].json["labels"] == {"room": "attic"}
    assert len(done.out.splitlines()) == 2 and '"text":"5 6 7 ä"' in done.out


@pytest.fixture
def terminal(orchestrator: Orchestrator, tmp_path: Path) -> Iterator["Terminal"]:
    made = Terminal(orchestrator.env | {"TERM": "xterm", "NO_COLOR": "1", "HOME": str(tmp_path)})
    yield made
    made.close()


class Terminal:
    """`arriero chat` on a terminal, with somebody at the keys."""

    def __init__(self, env: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "arriero", "chat"],
            env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, text: str, times: int = 1) -> None:
        while self.seen.count(text) < times:
            assert select.select([self._ours], [], [], 60)[0], f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self._ours, 65536).decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(60)
        os.close(self._ours)


def test_ctrl_c_stops_the_answer_and_ctrl_d_the_talk(orchestrator: Orchestrator, terminal: Terminal) -> None:
    whole, orchestrator.play = orchestrator.play, orchestrator.holds
    terminal.wait_for("> ")
    terminal.type("one\r")
    terminal.wait_for("half")
    terminal.process.send_signal(signal.SIGINT)
    assert orchestrator.left.wait(60) and orchestrator.cancelled.wait(60)
    terminal.wait_for("> ", 2)
    orchestrator.play = whole
    terminal.type("two\r")
    terminal.wait_for("5 6 7 ä")
    terminal.wait_for("> ", 3)
    assert said(orchestrator) == [["one"], ["one", "half", "two"]]
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
    assert not list(Path(orchestrator.env["ARRIERO_HOME"]).parent.rglob("*hist*"))
