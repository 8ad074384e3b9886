"""A machine gets arriero by SSH, whole or not at all, and loses it again without a trace."""

import asyncio
import contextlib
import functools
import http.server
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
from tests.support.engine_wheels import pack, sha256
from tests.support.home import until
from tests.support.machines import NO_INDEX, Told, programs_in, reached

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import NodeStep
from arriero.fabrics.base import Connection
from arriero.orchestrator.machines import environment_child, survey_child, there_child, wheel
from arriero.orchestrator.machines.environment import Installation
from arriero.orchestrator.machines.machines import Machines
from arriero.runtime.clock import SystemClock
from arriero.testing.sshd import SshServer, sshd_path

pytestmark = [
    pytest.mark.skipif(sshd_path() is None, reason="sshd is not installed (openssh-server)"),
    pytest.mark.timeout(420),
]


@pytest.fixture
def sockets() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="arr-") as folder:
        yield Path(folder)


@pytest.fixture
def offline(tmp_path: Path) -> Iterator[SshServer]:
    """A machine whose package index does not answer."""
    with SshServer(tmp_path / "sshd", env=NO_INDEX) as server:
        yield server


async def test_from_nothing_to_a_running_agent_and_back(
    tmp_path: Path, sockets: Path, offline: SshServer
) -> None:
    machines = Machines(tmp_path / "dist", SystemClock(), uses_services=False)
    path = tmp_path / "deep" / "there"

    # The connection is cut in the middle of the installation.
    told = Told()
    async with reached(offline, sockets) as connection:

        def cut(step: NodeStep) -> None:
            told(step)
            if "making the environment" in step.message:
                cut_when_begun()

        def cut_when_begun() -> None:
            if list((path / "envs").glob("*/bin/python")):
                _cut(offline)
            else:
                asyncio.get_running_loop().call_later(0.02, cut_when_begun)

        found = await machines.survey(connection, str(path), told)
        assert found.current is None and not path.parent.exists()
        with pytest.raises(ArrieroError) as lost:
            await machines.install(connection, found, cut)
        assert lost.value.code is ErrorCode.NODE_UNREACHABLE
    assert "no package index" in told.of("package")
    until("its program has noticed", lambda: not programs_in(path) and not list((path / "envs").iterdir()))
    assert not (path / "current").exists()

    # The next one goes on: nothing is copied twice.
    offline.kill()
    offline.start()
    told = Told()
    async with reached(offline, sockets) as connection:
        found = await machines.survey(connection, str(path), told)
        first = await machines.install(connection, found, told)
        assert first.is_new and first.previous is None
        # pip is silent while it works: how far it is is told.
        far = [step.fraction for step in told.steps if step.step == "install" and step.fraction is not None]
        assert len(far) > 2 and far == sorted(far), far
        assert "packages are in place" in told.of("install")
        assert "were there" in told.of("package") and "fetching" not in told.of("package")
        assert (path / "current").resolve() == path / "envs" / first.tag

        # A second time does nothing, and says so.
        told = Told()
        again = await machines.install(connection, await machines.survey(connection, str(path), told), told)
        assert not again.is_new and again.tag == first.tag and "there already" in told.of("install")

        await _agent_lives(machines, connection, path)
        _can_pass_itself_on(path, first)
        _has_a_pip_for_engines(path)

        told = Told()
        await machines.remove(connection, str(path), told, purge=True)
    assert not path.parent.exists() and not programs_in(path)
    assert "nothing of arriero is left" in told.of("clean")


def _can_pass_itself_on(path: Path, installed: Installation) -> None:
    """What was installed there makes the very same wheel, and has a pip to carry."""
    script = (
        "import sys; from pathlib import Path; from arriero.orchestrator.machines import wheel; "
        "print(wheel.pack(Path(sys.argv[1])).tag, wheel.pack_pip(Path(sys.argv[1])).path.name)"
    )
    argv = [str(path / "current/bin/python"), "-I", "-c", script, str(path.parent.parent / "next")]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    tag, pip = done.stdout.split()
    assert tag == installed.tag and pip.startswith("pip-")


def _has_a_pip_for_engines(path: Path) -> None:
    """Its agent can run pip, which the environment itself does not have."""
    script = (
        "import asyncio, sys; from pathlib import Path; from arriero.agent import pip; "
        "from arriero.runtime.clock import SystemClock; scratch = Path(sys.argv[1]); scratch.mkdir(); "
        "print(asyncio.run(pip.run(['--version'], scratch=scratch, configuration=None, clock=SystemClock(), "
        "tell=lambda _: None)))"
    )
    argv = [str(path / "current/bin/python"), "-I", "-c", script, str(path.parent.parent / "scratch")]
    said = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "code=0" in said and "pip-" in said, said


async def _agent_lives(machines: Machines, connection: Connection, path: Path) -> None:
    told = Told()
    await machines.start(connection, str(path), "attic", told)
    first = _agent(path)
    await machines.start(connection, str(path), "attic", told)
    assert _agent(path) == first and "runs already" in told.of("agent")

    # Killed, it is started again.
    first.kill()
    second = until("another agent", lambda: _agent_or_none(path, besides=first))
    assert b'"node":"attic"' in (await machines.logs(connection, str(path), 50)).content
    keeper = psutil.Process(json.loads((path / "home/run/keeper.json").read_text())["pid"])
    assert second.ppid() == keeper.pid

    await machines.stop(connection, str(path), told)
    assert not programs_in(path) and not list((path / "home" / "run").glob("*.json"))
    await machines.stop(connection, str(path), told)
    assert "the agent has ended" in told.of("stop") and "no agent ran" in told.of("stop")
    # What is removed while it runs is stopped first.
    await machines.start(connection, str(path), "attic", told)


def _cut(server: SshServer) -> None:
    """End all connections, and nothing that runs in them."""
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("sshd"):
                process.kill()


def _agent(path: Path) -> psutil.Process:
    return psutil.Process(json.loads((path / "home/run/agent.json").read_text())["pid"])


def _agent_or_none(path: Path, *, besides: psutil.Process) -> psutil.Process | None:
    try:
        found = _agent(path)
    except (OSError, ValueError, psutil.Error):
        return None
    return None if found.pid == besides.pid else found


class _Seen(there_child.Watch):
    """Sees a program come further at each look, and lets it end after some."""

    def __init__(self, end: Path) -> None:
        self._end = end
        self._looks = 0

    def look(self) -> bool:
        self._looks += 1
        if self._looks == 3:
            self._end.touch()
        return True


def test_a_program_may_take_long_while_it_comes_further(tmp_path: Path) -> None:
    end = tmp_path / "end"
    script = (
        "import sys, time; from pathlib import Path\nwhile not Path(sys.argv[1]).exists(): time.sleep(0.01)"
    )
    argv = [sys.executable, "-c", f"{script}\nprint('done')", str(end)]
    assert there_child.call(argv, 0.0, _Seen(end)) == "done\n"
    end.unlink()
    with pytest.raises(there_child.Refused, match="came no further for 0 s"):
        there_child.call(argv, 0.0)
    with pytest.raises(there_child.Refused, match="took more than 0 s"):
        there_child.call(argv, 60.0, _Seen(tmp_path / "other"), total_s=0.0)


def test_bytes_on_their_way_are_seen(tmp_path: Path) -> None:
    watch = environment_child.PipWatch(tmp_path / "environment", tmp_path / "scratch")
    (tmp_path / "scratch/pip-unpack").mkdir(parents=True)
    (tmp_path / "scratch/pip-unpack/large.whl").write_bytes(b"some")
    until("the first bytes are seen", watch.look)
    with (tmp_path / "scratch/pip-unpack/large.whl").open("ab") as file:
        file.write(b"more")
    until("more bytes are seen", watch.look)


class _Index(http.server.SimpleHTTPRequestHandler):
    """A package index that says, as they do, that what it gives may be kept."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path.rpartition("/")[2])
        super().do_GET()

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "max-age=3600")
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _offered(index: Path, name: str) -> str:
    """Put a package into an index; return its line of a lock."""
    folder = index / name
    folder.mkdir(parents=True)
    path = pack(folder, name=name, version="1.0", tag="py3-none-any", content={f"{name}/__init__.py": b""})
    (folder / "index.html").write_text(f'<a href="{path.name}">{path.name}</a>')
    return f"{name}==1.0 --hash=sha256:{sha256(path)}\n"


def test_what_came_from_an_index_before_a_failure_does_not_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, index = tmp_path / "there", tmp_path / "index"
    environment_child.prepare(str(root))
    own = root / "carried"
    pip = shutil.copy(wheel.pack_pip(tmp_path / "dist").path, own)
    says = {"arriero/__main__.py": b'print(\'{"version": "0.0.1"}\')'}
    arriero = pack(own, name="arriero", version="0.0.1", tag="py3-none-any", content=says)
    lines = [_offered(index, "first"), _offered(index, "second")]
    (own / "runtime.txt").write_text("".join(lines))
    (index / "second").rename(index / "hidden")
    handler = functools.partial(_Index, directory=str(index))

    def build() -> there_child.Facts:
        return environment_child.build(
            str(root), "tag", "0.0.1", arriero.name, Path(pip).name, False,
            stall_s_of_pip=60.0, total_s_of_pip=120.0,
        )  # fmt: skip

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        # Of others pip keeps what comes encrypted alone.
        monkeypatch.setenv("PIP_TRUSTED_HOST", "127.0.0.1")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}")
        try:
            with pytest.raises(there_child.Refused, match="second"):
                build()
            assert not (root / "envs/tag").exists()
            (index / "hidden").rename(index / "second")
            assert build()["is_new"]
        finally:
            server.shutdown()
            thread.join()
    fetched = [name for name in _Index.asked if name.endswith(".whl")]
    assert sorted(fetched) == ["first-1.0-py3-none-any.whl", "second-1.0-py3-none-any.whl"]
    assert not (own / "cache").exists() and not (root / "envs/tag/scratch").exists()


#: What remembers who lingers, and has services that do nothing.
_SYSTEMCTL = "#!/bin/sh\nexit 0\n"
_LOGINCTL = """#!/bin/sh
case "$1" in
  enable-linger) touch "$HOME/lingers" ;;
  disable-linger) rm "$HOME/lingers" ;;
  show-user) test -e "$HOME/lingers" && echo yes || echo no ;;
esac
"""


@pytest.mark.parametrize("lingered", [False, True])
def test_what_a_service_needed_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lingered: bool
) -> None:
    home, programs, root = tmp_path / "home", tmp_path / "bin", tmp_path / "arr"
    for name, text in (("systemctl", _SYSTEMCTL), ("loginctl", _LOGINCTL)):
        programs.mkdir(exist_ok=True)
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    if lingered:
        (home / "lingers").touch()
    before = sorted(home.rglob("*"))
    survey_child.survey(str(root))
    assert sorted(home.rglob("*")) == before, "a look changes nothing"
    environment_child.prepare(str(root))
    assert there_child.service_manager(root) == "systemd" and (home / "lingers").exists()
    there_child.make(root, there_child.units())
    other = there_child.units() / "arriero-agent-0123.service"
    other.touch()
    environment_child.remove_all(root)
    assert other.exists() and (home / "lingers").exists(), "another installation relies on it"
    other.unlink()

    environment_child.prepare(str(root))
    for folder in (there_child.units(), *there_child.units().parents[:2]):
        folder.rmdir()
    there_child.make(root, there_child.units())
    if not lingered:
        (home / "lingers").unlink()
    assert there_child.service_manager(root) == "systemd"
    environment_child.remove_all(root)
    assert sorted(home.rglob("*")) == before and not root.exists()
