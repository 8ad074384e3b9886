"""Hosts as network namespaces: is each a machine of its own, does it break as told, and does nothing remain?"""

import asyncio
import contextlib
import errno
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.fabrics.base import Connection, NodeAddress
from arriero.fabrics.ssh import SshFabric
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SeededEntropy
from arriero.testing.agents import wait_for
from arriero.testing.hosts import Host, Hosts, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")


@pytest.fixture(scope="module", autouse=True)
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture
def hosts(standing: Hosts) -> Iterator[Hosts]:
    """Three hosts that are whole, with nothing but their servers in them."""
    try:
        for host in standing:
            host.heal()
        yield standing
    finally:
        with contextlib.ExitStack() as ends:
            for host in standing:
                ends.callback(host.end_all)
                ends.callback(host.heal)


@pytest.fixture
def host(hosts: Hosts) -> Host:
    return hosts[0]


@pytest.fixture(autouse=True)
def no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


@pytest.fixture
def fabric() -> Iterator[SshFabric]:
    with tempfile.TemporaryDirectory(prefix="arr-") as folder:
        yield SshFabric(SystemClock(), SeededEntropy(1), sockets_dir=Path(folder), connect_timeout_s=30)


@asynccontextmanager
async def connected(fabric: SshFabric, host: Host, target: str | None = None) -> AsyncIterator[Connection]:
    address = NodeAddress.parse(target or host.target, key_path=str(host.key), host_key=host.fingerprint())
    connection = await fabric.connect(address)
    try:
        yield connection
    finally:
        await connection.aclose()


async def told(connection: Connection, *argv: str) -> str:
    return (await connection.run(argv, timeout_s=60)).stdout.decode().strip()


# --- A machine of its own -------------------------------------------------------------------------


async def test_homes_and_folders_are_private(fabric: SshFabric, hosts: Hosts) -> None:
    for host in hosts:
        async with connected(fabric, host) as connection:
            assert await told(connection, "hostname") == host.name
            await connection.put(host.name.encode(), "mine", mode=0o600)
            await told(connection, "sh", "-c", "echo of $(hostname) > /tmp/mine; cp /tmp/mine /run/user/")
    for host in hosts:
        assert (host.home / "mine").read_text() == host.name
        assert (host.tmp / "mine").read_text() == f"of {host.name}\n"
        assert host.run(["cat", "/run/user/mine"]).stdout == f"of {host.name}\n"
        assert [path.name for path in host.home.iterdir()] == ["mine"]
    assert "mine" not in _names("/tmp")


async def test_no_way_leads_out(fabric: SshFabric, hosts: Hosts) -> None:
    script = "import socket, sys; socket.create_connection((sys.argv[1], 22), timeout=30)"
    for goal in (hosts[1].address, "192.0.2.1"):
        done = hosts[0].run(["python3", "-c", script, goal], may_fail=True)
        assert done.returncode == 1 and "unreachable" in done.stderr
    async with connected(fabric, hosts[0]) as connection:
        assert await told(connection, "ip", "route", "show", "default") == ""


def test_processes_are_known_and_unknown_to_others(hosts: Hosts) -> None:
    with subprocess.Popen([*hosts[0].enter, "sleep", "60"]):
        sleeping = wait_for(lambda: _named(hosts[0], "sleep"), "it sleeps")[0]
        assert _named(hosts[1], "sleep") == []
        assert "sleep" not in hosts[1].run(["ps", "-A"]).stdout
        sleeping.kill()


def test_sshd_alone_listens_and_others_are_told(host: Host) -> None:
    assert host.listening() == [(host.address, 22, "sshd")]
    script = "import socket; s = socket.create_server(('127.0.0.1', 8123)); print('up', flush=True); input()"
    with subprocess.Popen(
        [*host.enter, "python3", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        assert ("127.0.0.1", 8123, "python3") in host.listening()
        process.communicate(b"\n", timeout=60)
    assert host.listening() == [(host.address, 22, "sshd")]


def test_what_is_hidden_is_useless(tmp_path: Path) -> None:
    with Host(tmp_path / "bare", "bare") as host:
        host.hide("/usr/bin/python3", "/var/log", "/nowhere/at/all")
        (host.bin / "python3").unlink()
        assert host.run(["/usr/bin/python3", "-V"], may_fail=True).returncode != 0
        assert host.run(["ls", "/var/log"]).stdout == ""
    assert list(Path("/var/log").iterdir())


# --- Faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["cut", "half-open"])
async def test_a_fault_of_the_link_is_noticed_and_healed(fabric: SshFabric, hosts: Hosts, fault: str) -> None:
    host, other = hosts[0], hosts[1]
    async with connected(fabric, host) as connection, connected(fabric, other) as untouched:
        await told(connection, "sh", "-c", "setsid sleep 61 </dev/null >/dev/null 2>&1 &")
        started_s = time.monotonic()
        host.cut() if fault == "cut" else host.drop_packets()
        async with asyncio.timeout(30):  # Of the 3 s; the machine may be busy.
            why = await connection.closed()
        print(f"{fault}: missed after {time.monotonic() - started_s:.2f} s: {why}")
        assert await told(untouched, "hostname") == other.name
        with pytest.raises(ArrieroError) as caught:
            await connection.run(["true"], timeout_s=5)
        assert caught.value.code is ErrorCode.NODE_UNREACHABLE
    with pytest.raises(OSError) as refused:
        socket.create_connection((host.address, 22), timeout=0.5)
    # Nobody answers; of a cable that is out this machine learns so, but after seconds.
    assert isinstance(refused.value, TimeoutError) or refused.value.errno == errno.EHOSTUNREACH
    host.heal()
    async with connected(fabric, host) as connection:
        assert await told(connection, "hostname") == host.name
    assert len(_named(host, "sleep")) == 1


async def test_a_slow_link_that_loses(fabric: SshFabric, host: Host) -> None:
    host.lose(5)
    with host.slow(200) as target:
        async with connected(fabric, host, target) as connection:
            started_s = time.monotonic()
            assert await told(connection, "hostname") == host.name
            assert time.monotonic() - started_s >= 0.2
            await connection.put(b"x" * 300_000, "large", mode=0o600)
    assert (host.home / "large").stat().st_size == 300_000
    host.run(["rm", str(host.home_there / "large")])


def test_a_link_that_loses_all(host: Host) -> None:
    host.lose(100)
    with pytest.raises(OSError) as refused:
        socket.create_connection((host.address, 22), timeout=0.5)
    # Nobody answers; of a cable that is out this machine learns so, but after seconds.
    assert isinstance(refused.value, TimeoutError) or refused.value.errno == errno.EHOSTUNREACH
    host.heal()
    socket.create_connection((host.address, 22), timeout=30).close()


async def test_a_restart_of_sshd_ends_connections_and_no_command(fabric: SshFabric, tmp_path: Path) -> None:
    with Host(tmp_path / "attic", "attic") as host:
        async with connected(fabric, host) as connection:
            await told(connection, "sh", "-c", "setsid sleep 62 </dev/null >/dev/null 2>&1 &")
            host.restart_sshd()
            async with asyncio.timeout(30):
                await connection.closed()
        async with connected(fabric, host) as connection:
            assert await told(connection, "hostname") == host.name
        assert len(_named(host, "sleep")) == 1


# --- The end --------------------------------------------------------------------------------------

_OWNER = """
import json, sys
from pathlib import Path
from arriero.testing.hosts import Hosts
with Hosts(Path(sys.argv[1])) as hosts:
    hosts[0].run(["sh", "-c", "setsid sleep 63 </dev/null >/dev/null 2>&1 &"])
    print(json.dumps([[host.gateway, *(p.pid for p in host.processes())] for host in hosts]), flush=True)
    sys.stdin.read()
    raise RuntimeError("a test that failed")
"""


@pytest.mark.parametrize("end", ["failed", "killed"])
def test_nothing_is_left_whatever_happened(tmp_path: Path, end: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(tmp_path / "hosts")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as owner:
        assert owner.stdin is not None and owner.stdout is not None
        made = json.loads(owner.stdout.readline())
        assert len(made) == 3 and len({gateway for gateway, *_ in made}) == 3
        assert {gateway for gateway, *_ in made} <= _addresses()
        assert all(psutil.pid_exists(pid) for _, *pids in made for pid in pids) and len(made[0]) == 3
        if end == "killed":
            owner.send_signal(signal.SIGKILL)
        else:
            owner.stdin.close()
        owner.wait(30)
    wait_for(lambda: not {gateway for gateway, *_ in made} & _addresses(), "the links are gone")
    wait_for(lambda: not any(_lives(pid) for _, *pids in made for pid in pids), "the processes are gone")
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def _names(folder: str) -> list[str]:
    return [path.name for path in Path(folder).iterdir()]


def _addresses() -> set[str]:
    return {address.address for found in psutil.net_if_addrs().values() for address in found}


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def _named(host: Host, name: str) -> list[psutil.Process]:
    found = []
    for process in host.processes():
        with contextlib.suppress(psutil.Error):
            if process.name() == name:
                found.append(process)
    return found
