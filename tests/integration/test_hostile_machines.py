"""What does a person's terminal get to see of a machine that is hostile?  Nothing that it would obey."""

import contextlib
import os
import pty
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.home import Home
from tests.support.remote import Remote

from arriero.testing.sshd import SshServer, sshd_path

pytestmark = pytest.mark.skipif(sshd_path() is None, reason="no sshd is installed")
#: Sets the window's title, clears the screen, and what some terminals take for the beginning of either.
EVIL = "\x1b]0;pwned\x07\x1b[2J\x9b2J\u202epwned"
OBEYED = ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\u202e")
#: A python3 that says of itself what we want to hear, and answers every program with an error.
PYTHON = """#!/bin/sh
case "$*" in
  *-c*) echo "3 11 4 1 1 cpython" ;;
  *) cat >/dev/null; printf '%s' '{"error": {"code": "INSTALL_FAILED", "message": "EVIL", "details":
     {"suggested_action": "EVIL", "log_tail": ["EVIL"]}}}' ;;
esac
"""


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    with Home() as made:
        assert made.run("up", "-q").code == 0
        yield made
        made.run("down")


@pytest.fixture(autouse=True)
def nothing_remains(home: Home) -> None:
    """The pool lives as long as the module, and is ended with it."""


def shown(home: Home, *arguments: str) -> str:
    """Return all that a command writes to the terminal that it runs in."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "arriero", *arguments],
        env={**home.env, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"},
        stdin=subprocess.DEVNULL,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    seen = b""
    with contextlib.suppress(OSError):
        # Linux ends it with an error once nobody has the other side.
        while piece := os.read(leader, 65_536):
            seen += piece
    os.close(leader)
    process.wait(60)
    return seen.decode("utf-8", "replace")


@contextlib.contextmanager
def strange_server(folder: Path) -> Iterator[tuple[str, ...]]:
    """A server whose version is a spell."""

    def answer(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(f"{EVIL}\r\nSSH-2.0-{EVIL}\r\n{EVIL * 20}\r\n".encode())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        yield "--ssh", f"ana@127.0.0.1:{listener.getsockname()[1]}", "--accept-host-key", f"SHA256:{'A' * 43}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(60)


@contextlib.contextmanager
def talking_server(folder: Path) -> Iterator[tuple[str, ...]]:
    """An sshd that greets with a spell and lets nobody in."""
    folder.mkdir()
    (folder / "banner").write_text(EVIL)
    config = f"Banner {folder}/banner\nVersionAddendum pwned\n"
    with SshServer(folder, more_config=config) as server:
        yield (
            "--ssh",
            server.target,
            "--key",
            str(server.wrong_key),
            "--accept-host-key",
            server.fingerprint(),
        )


@contextlib.contextmanager
def lying_machine(folder: Path) -> Iterator[tuple[str, ...]]:
    """A machine whose Python answers with spells, and whose name is one."""
    bin_ = folder / "bin"
    bin_.mkdir(parents=True)
    evil = "\\u001b]0;pwned\\u0007\\u001b[2J\\u009b2J\\u202epwned"
    (bin_ / "python3").write_text(PYTHON.replace("EVIL", evil))
    (bin_ / "uname").write_text("#!/bin/sh\ncase $1 in -s) echo Linux ;; *) echo x86_64 ;; esac\n")
    for program in bin_.iterdir():
        program.chmod(0o755)
    with Remote(folder / "far", PATH=f"{bin_}:/usr/bin:/bin") as remote:
        server = remote.server
        yield "--ssh", server.target, "--key", str(server.key), "--accept-host-key", server.fingerprint()


@pytest.mark.parametrize("machine", [strange_server, talking_server, lying_machine])
def test_a_terminal_is_told_nothing_that_it_would_obey(
    home: Home, tmp_path: Path, machine: Callable[[Path], contextlib.AbstractContextManager[tuple[str, ...]]]
) -> None:
    with machine(tmp_path / "machine") as given:
        for flags in ((), ("--json",)):
            seen = shown(home, "nodes", "add", "evil", *given, *flags)
            assert "error" in seen
            assert not [spell for spell in OBEYED if spell in seen], repr(seen)
            if machine is lying_machine:
                assert "pwned" in seen, repr(seen)
