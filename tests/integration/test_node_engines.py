"""What is told of the engine of a machine with an NVIDIA card, when it joins and afterwards?"""

import contextlib
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import cli
from tests.support.home import Home, until
from tests.support.remote import Remote, other_version

from arriero.engines.llamacpp_backends import missing_library
from arriero.testing.sshd import sshd_path

LIBRARIES = ("libcudart.so.12", "libcublas.so.12")
pytestmark = [
    pytest.mark.skipif(sshd_path() is None, reason="no sshd is installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="CUDA builds are for Linux"),
    pytest.mark.skipif(not missing_library(LIBRARIES), reason="NVIDIA's CUDA 12 runtime is installed here"),
]
#: What the driver's library tells of one card.
CARD = """
class NVMLError(Exception): pass
class Room: total, free, used = 24 << 30, 20 << 30, 4 << 30
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlSystemGetDriverVersion(): return "570.124.06"
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(index): return index
def nvmlDeviceGetName(handle): return "NVIDIA L4"
def nvmlDeviceGetUUID(handle): return "GPU-1"
def nvmlDeviceGetMemoryInfo(handle): return Room
"""


class SilentIndex:
    """An index of the engine's builds that hears what it is asked, and never answers."""

    def __init__(self, server: socket.socket) -> None:
        server.setblocking(False)
        self.url = f"http://127.0.0.1:{server.getsockname()[1]}"
        self._server = server
        self._asked: list[socket.socket] = []

    def is_asked(self) -> bool:
        """Return whether somebody has asked since it was looked at last."""
        with contextlib.suppress(BlockingIOError):
            self._asked.append(self._server.accept()[0])
            return True
        return False

    def close(self) -> None:
        """Let those who asked wait no longer."""
        for each in self._asked:
            each.close()


@pytest.fixture
def index() -> Iterator[SilentIndex]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        made = SilentIndex(server)
        yield made
        made.close()


@pytest.fixture
def home() -> Iterator[Home]:
    with Home() as made:
        yield made
        made.run("down")


@pytest.fixture
def remote(tmp_path: Path, index: SilentIndex) -> Iterator[Remote]:
    with Remote(tmp_path / "far", LD_LIBRARY_PATH=str(tmp_path / "lib")) as made:
        prepare(made)
        settings = made.server.home / ".config/arriero/config.toml"
        settings.parent.mkdir(parents=True)
        settings.write_text(f'engine_threads = 1\nengine_index_url = "{index.url}"\n')
        yield made


def prepare(remote: Remote, source: Path | None = None) -> None:
    """Put an environment onto a machine that has a card."""
    tag = remote.prepare(source)
    (packages,) = (remote.path / "envs" / tag).glob("lib/*/site-packages")
    (packages / "pynvml.py").write_text(CARD)


def install_runtime(folder: Path) -> None:
    """Let the system find the names of NVIDIA's libraries, with other content."""
    folder.mkdir()
    maps = Path("/proc/self/maps").read_text().splitlines()
    some = next(line.split()[-1] for line in maps if "/libc.so" in line or "/ld-musl" in line)
    for name in LIBRARIES:
        (folder / name).symlink_to(some)


def test_what_keeps_an_engine_from_a_card_is_told_and_keeps_no_machine_from_work(
    home: Home, remote: Remote, index: SilentIndex, tmp_path: Path
) -> None:
    # Without NVIDIA's runtime nothing is fetched that could not be loaded.
    done = remote.add(home, "far")
    assert done.code == 0 and "far is part of the pool" in done.err, done
    assert "its engine was not installed: the build cu128 could not be loaded: OSError: libcudart" in done.err
    assert "Install NVIDIA's CUDA runtime" in done.err and "`arriero engines install --node far`" in done.err
    assert not index.is_asked()
    looked = home.run("nodes", "doctor", "far", "--json")
    (wrong,) = (each for each in looked.json["findings"] if not each["is_ok"])
    assert (looked.code, wrong["code"]) == (1, "BACKEND_UNAVAILABLE"), looked
    assert "NVIDIA L4 is not used" in wrong["message"]
    assert home.run("nodes", "remove", "far", "-q").code == 0

    # With it the build is fetched; who does not want to wait for that has the machine all the same.
    install_runtime(tmp_path / "lib")
    adding = home.start(
        "nodes", "add", "far", "--ssh", remote.server.target, "--key", str(remote.server.key),
        "--accept-host-key", remote.server.fingerprint(), "--install-path", str(remote.path),
    )  # fmt: skip
    until("the index is asked", index.is_asked)
    stopped = cli.interrupt(adding, signal.SIGINT)
    assert stopped.code == 130, stopped
    told = "far is part of the pool; its engine was not installed: `arriero engines install --node far`"
    assert told in stopped.err and "taken back" not in stopped.err, stopped
    assert home.run("nodes", "show", "far", "--json").json["status"] == "ready"

    # After an upgrade, too: it works meanwhile.
    assert home.run("down").code == 0
    newer = other_version(tmp_path / "newer", "0.2.0")
    prepare(remote, newer)
    new = {"PYTHONPATH": str(newer)}
    assert home.run("up", "-q", **new).code == 0
    upgrading = home.start("nodes", "upgrade", "far", **new)
    until("the index is asked again", index.is_asked)
    shown = home.run("nodes", "show", "far", "--json", **new).json
    assert (shown["version"], shown["status"]) == ("0.2.0", "ready")
    assert cli.interrupt(upgrading, signal.SIGINT).code == 130
    assert home.run("nodes", "remove", "far", "-q", **new).code == 0
