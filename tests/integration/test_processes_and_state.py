"""Real processes: who is who, how they end, and what run files say of them."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import RunRecord
from arriero.runtime import processes, state_dir
from arriero.runtime.state_dir import StateDir

SLEEPER = "import sys, time; print('ready', flush=True); time.sleep(60)"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEPER
PARENT = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {DEAF!r}]); p.wait()"


@pytest.fixture
def spawned() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        processes.signal_group(process.pid, signal.SIGKILL)
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def spawn(started: list[subprocess.Popen[str]], code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_process_is_known_by_more_than_its_pid(spawned: list[subprocess.Popen[str]]) -> None:
    process = spawn(spawned, SLEEPER)
    known = processes.identity(process.pid)
    assert known is not None
    assert processes.is_alive(known)
    assert not processes.is_alive(processes.Identity(known.pid, known.start_ticks + 1, known.boot_id))
    assert not processes.is_alive(processes.Identity(known.pid, known.start_ticks, "another boot"))
    assert not processes.signal_process(
        processes.Identity(known.pid, known.start_ticks + 1, known.boot_id), 9
    )
    assert process.poll() is None


def test_a_zombie_is_dead(spawned: list[subprocess.Popen[str]]) -> None:
    process = spawn(spawned, SLEEPER)
    known = processes.identity(process.pid)
    assert known is not None
    process.kill()
    assert processes.wait_gone(known, 30)
    assert process.returncode is None, "nobody has waited for it yet: a zombie"


def test_ending_asks_first(spawned: list[subprocess.Popen[str]]) -> None:
    process = spawn(spawned, SLEEPER)
    known = processes.identity(process.pid)
    assert known is not None
    assert processes.end(known, grace_s=5)
    assert process.wait(30) == -signal.SIGTERM


def test_who_does_not_listen_is_killed_with_the_whole_group(spawned: list[subprocess.Popen[str]]) -> None:
    parent = spawn(spawned, "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + PARENT)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    child = processes.identity(int(children[0]))
    known = processes.identity(parent.pid)
    assert known is not None and child is not None
    assert not processes.end(known, grace_s=0.1)
    assert parent.wait(30) == -signal.SIGKILL
    assert processes.wait_gone(child, 30)


@pytest.mark.parametrize(
    ("code", "expected"), [(0, (0, None)), (3, (3, None)), (-9, (137, "SIGKILL")), (-15, (143, "SIGTERM"))]
)
def test_exit_codes_as_a_shell_says_them(code: int, expected: tuple[int, str | None]) -> None:
    assert processes.exit_code_of(code) == expected


def test_the_tail_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("".join(f"line {number}\n" for number in range(20_000)))
    assert processes.tail(path, 2) == ["line 19998", "line 19999"]
    assert processes.tail(tmp_path / "none", 2) == []


def test_state_files_are_private_whole_and_known_stale(
    tmp_path: Path, spawned: list[subprocess.Popen[str]]
) -> None:
    state = StateDir(tmp_path / "home")
    state.prepare()
    process = spawn(spawned, SLEEPER)
    known = processes.identity(process.pid)
    assert known is not None
    record = RunRecord(
        pid=known.pid, url="http://127.0.0.1:1", version="0", started=0.0, token="secret",
        pid_start_ticks=known.start_ticks, boot_id=known.boot_id,
    )  # fmt: skip
    state_dir.write(state.run_file("agent"), record)
    assert state.running("agent") == record
    assert state.run_file("agent").stat().st_mode & 0o777 == 0o600
    assert state.home.stat().st_mode & 0o777 == 0o700
    process.kill()
    assert processes.wait_gone(known, 30)
    assert (state.running("agent"), state.recorded("agent")) == (None, record)
    state.run_file("agent").write_text('{"pid": 1')
    assert state.recorded("agent") is None
    assert sorted(path.name for path in state.run.iterdir()) == ["agent.json", "workers"]


def test_a_role_is_locked_once(tmp_path: Path) -> None:
    state = StateDir(tmp_path)
    state.prepare()
    with state.lock("agent"), state.lock("orchestrator"):
        with pytest.raises(ArrieroError) as refused, state.lock("agent"):
            pass
        assert refused.value.code is ErrorCode.ALREADY_RUNNING
    with state.lock("agent"):
        pass


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArrieroError) as refused:
        StateDir(tmp_path / "file" / "home").prepare()
    assert refused.value.code is ErrorCode.STATE_DIR_UNUSABLE
    assert str(tmp_path) not in refused.value.message


def test_the_socket_folder_is_short_and_ours() -> None:
    folder = state_dir.short_dir()
    assert folder.stat().st_uid == os.getuid()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(str(state_dir.socket_dir("w-0123456789ab") / "engine.sock")) < 107
