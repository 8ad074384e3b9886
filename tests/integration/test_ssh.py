"""What goes wrong between here and a machine, played by a real sshd; each fault has its own error."""

import asyncio
import dataclasses
import itertools
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import asyncssh
import psutil
import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.fabrics.base import Connection, HostPort, NodeAddress, SocketPath
from arriero.fabrics.ssh import SshFabric
from arriero.fabrics.ssh_connection import is_open_to_others
from arriero.fabrics.ssh_dial import Names
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SeededEntropy
from arriero.testing.sshd import SshServer, sshd_path

pytestmark = pytest.mark.skipif(sshd_path() is None, reason="sshd is not installed (openssh-server)")


@pytest.fixture(scope="module", autouse=True)
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """A server that no test changes."""
    with SshServer(
        tmp_path_factory.mktemp("sshd"), host_key_types=["ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa"]
    ) as server:
        yield server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SshServer]:
    """A server of one test."""
    with SshServer(tmp_path / "sshd") as running:
        yield running


@pytest.fixture(autouse=True)
def ssh_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ~/.ssh, and no agent."""
    folder = tmp_path / "home" / ".ssh"
    folder.mkdir(parents=True, mode=0o700)
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return folder


@pytest.fixture
def fabric() -> Iterator[SshFabric]:
    folder = Path(tempfile.mkdtemp(prefix="arr-"))
    yield SshFabric(SystemClock(), SeededEntropy(1), sockets_dir=folder, connect_timeout_s=30)
    assert list(folder.iterdir()) == []
    folder.rmdir()


def known(server: SshServer, **parts: str) -> NodeAddress:
    given = {"key_path": str(server.key), "host_key": server.fingerprint(), **parts}
    return NodeAddress.parse(server.target, **given)


@asynccontextmanager
async def connected(fabric: SshFabric, address: NodeAddress) -> AsyncIterator[Connection]:
    connection = await fabric.connect(address)
    try:
        yield connection
    finally:
        await connection.aclose()


async def works(fabric: SshFabric, address: NodeAddress) -> None:
    async with connected(fabric, address) as connection:
        assert (await connection.run(["echo", "hi"], timeout_s=10)).stdout == b"hi\n"


async def refused(fabric: SshFabric, address: NodeAddress) -> ArrieroError:
    with pytest.raises(ArrieroError) as caught:
        await fabric.connect(address)
    return caught.value


# --- Keys and users ------------------------------------------------------------------------------


async def test_a_wrong_key(fabric: SshFabric, standing: SshServer) -> None:
    error = await refused(fabric, known(standing, key_path=str(standing.wrong_key)))
    assert error.code is ErrorCode.SSH_AUTH_FAILED
    assert "authorized_keys" in error.details["suggested_action"]


@pytest.fixture
def talkative(tmp_path: Path) -> Iterator[SshServer]:
    """A server that logs what it is asked."""
    with SshServer(tmp_path / "talkative", more_config="LogLevel DEBUG") as running:
        yield running


def asked(server: SshServer) -> list[str]:
    return re.findall(r"userauth-request .* method (\S+)", server.log.read_text())


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ssh-rsa"])
async def test_a_given_key_is_shown_before_anything_is_asked(
    fabric: SshFabric, talkative: SshServer, kind: str
) -> None:
    key = asyncssh.generate_private_key(kind)
    key.write_private_key(talkative.key)
    (talkative.folder / "authorized_keys").write_bytes(key.export_public_key())
    await works(fabric, known(talkative))
    assert asked(talkative) == ["publickey"]


async def test_what_a_machine_says_is_heard_until_it_lets_us_in(
    fabric: SshFabric, standing: SshServer
) -> None:
    times_s: list[float] = []
    connection = await fabric.connect(known(standing), on_heard=lambda: times_s.append(time.monotonic()))
    heard = len(times_s)
    # Its version, the keys that it has, its part of the key exchange, that the login may begin, and its end.
    assert heard >= 3
    await connection.run(["true"], timeout_s=10)
    await connection.aclose()
    assert len(times_s) == heard


async def test_a_machine_that_refuses_the_key_is_asked_what_it_takes(
    fabric: SshFabric, talkative: SshServer
) -> None:
    await refused(fabric, known(talkative, key_path=str(talkative.wrong_key)))
    assert asked(talkative) == ["publickey", "none", "publickey"]


async def test_a_wrong_user(fabric: SshFabric, standing: SshServer) -> None:
    address = NodeAddress(
        "127.0.0.1", standing.port, "nobody-of-that-name", str(standing.key), standing.fingerprint()
    )
    assert (await refused(fabric, address)).code is ErrorCode.SSH_AUTH_FAILED


async def test_no_key_at_all(fabric: SshFabric, standing: SshServer) -> None:
    address = NodeAddress.parse(standing.target, host_key=standing.fingerprint())
    assert (await refused(fabric, address)).code is ErrorCode.SSH_AUTH_FAILED


@pytest.mark.parametrize("fault", ["missing", "open", "folder", "pipe", "nobody"])
async def test_a_key_file_is_checked_before_anything_is_sent(
    fabric: SshFabric, tmp_path: Path, fault: str
) -> None:
    key = tmp_path / "key"
    if fault == "open":
        key.write_bytes(b"secret")
        key.chmod(0o640)
    elif fault == "folder":
        key.mkdir()
    elif fault == "pipe":
        os.mkfifo(key, 0o600)
    elif fault == "nobody":
        key = Path("~nobody-of-that-name/key")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        error = await refused(fabric, NodeAddress("127.0.0.1", port, "ana", str(key)))
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert error.code is ErrorCode.SSH_KEY_UNUSABLE
    if fault == "open":
        assert error.details["suggested_action"] == f"chmod 600 {key}"


async def test_a_key_with_a_passphrase(fabric: SshFabric, standing: SshServer, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    shutil.copy(standing.key, locked)
    change = ["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", str(locked)]
    assert await (await asyncio.create_subprocess_exec(*change)).wait() == 0
    error = await refused(fabric, known(standing, key_path=str(locked)))
    assert error.code is ErrorCode.SSH_KEY_UNUSABLE and "ssh-add" in error.details["suggested_action"]


async def test_a_file_that_is_no_key(fabric: SshFabric, standing: SshServer, tmp_path: Path) -> None:
    (tmp_path / "no_key").write_text("hello")
    (tmp_path / "no_key").chmod(0o600)
    error = await refused(fabric, known(standing, key_path=str(tmp_path / "no_key")))
    assert error.code is ErrorCode.SSH_KEY_UNUSABLE


async def test_too_many_keys(fabric: SshFabric, standing: SshServer, ssh_dir: Path) -> None:
    names = [ssh_dir / f"key{index}" for index in range(8)]
    for path in names:
        path.write_bytes(asyncssh.generate_private_key("ssh-ed25519").export_private_key())
    (ssh_dir / "config").write_text("".join(f'IdentityFile "{path}"\n' for path in names))
    address = NodeAddress.parse(standing.target, host_key=standing.fingerprint())
    assert (await refused(fabric, address)).code is ErrorCode.SSH_AUTH_FAILED


# --- Host keys -----------------------------------------------------------------------------------


async def test_an_unknown_host_key_is_shown_and_can_be_accepted(
    fabric: SshFabric, standing: SshServer
) -> None:
    error = await refused(fabric, NodeAddress.parse(standing.target, key_path=str(standing.key)))
    assert error.code is ErrorCode.SSH_HOST_KEY_UNKNOWN
    assert error.details["key_type"] == "ssh-ed25519"
    fingerprint = error.details["fingerprint"]
    assert fingerprint == standing.fingerprint()
    assert f"--accept-host-key {fingerprint}" in error.details["suggested_action"]
    await works(fabric, known(standing, host_key=fingerprint))


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa"])
async def test_any_kind_of_host_key_may_be_pinned(fabric: SshFabric, standing: SshServer, kind: str) -> None:
    await works(fabric, known(standing, host_key=standing.fingerprint(kind)))


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa"])
async def test_any_kind_of_host_key_may_stand_in_known_hosts(
    fabric: SshFabric, standing: SshServer, ssh_dir: Path, kind: str
) -> None:
    (ssh_dir / "known_hosts").write_text(standing.known_hosts_line(kind))
    await works(fabric, NodeAddress.parse(standing.target, key_path=str(standing.key)))


async def test_a_pinned_host_key_that_changed(fabric: SshFabric, server: SshServer) -> None:
    address = known(server)
    server.kill()
    server.renew_host_keys(["ssh-ed25519", "ssh-rsa"])
    server.start()
    error = await refused(fabric, address)
    assert error.code is ErrorCode.SSH_HOST_KEY_CHANGED
    assert "CHANGED" in error.message
    assert error.details["fingerprint"] == server.fingerprint()


@pytest.mark.parametrize("kind", ["ssh-ed25519", "ssh-rsa"])
async def test_a_host_key_that_known_hosts_has_otherwise(
    fabric: SshFabric, server: SshServer, ssh_dir: Path, kind: str
) -> None:
    (ssh_dir / "known_hosts").write_text(server.known_hosts_line())
    server.kill()
    server.renew_host_keys([kind])
    server.start()
    error = await refused(fabric, NodeAddress.parse(server.target, key_path=str(server.key)))
    assert error.code is ErrorCode.SSH_HOST_KEY_CHANGED
    assert "CHANGED" in error.message and error.details["fingerprint"] == server.fingerprint(kind)


async def test_a_cut_between_two_kinds_of_host_keys_is_no_change(
    fabric: SshFabric, standing: SshServer
) -> None:
    # The Ed25519 key is shown first: the one that is pinned is asked for over a second connection.
    pinned = known(standing, host_key=standing.fingerprint("ssh-rsa"))
    async with cuts(standing.port, which=2) as port:
        await works(fabric, dataclasses.replace(pinned, port=port))


@asynccontextmanager
async def cuts(port: int, *, which: int) -> AsyncIterator[int]:
    """Yield a port that leads to another one, for all connections but the one with that number."""
    numbers = itertools.count(1)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if next(numbers) == which:
            writer.close()
            return
        there, here = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.TaskGroup() as group:
            group.create_task(carry(reader, here))
            group.create_task(carry(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
    assert next(numbers) > which


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while chunk := await reader.read(65_536):
            writer.write(chunk)
            await writer.drain()
    writer.close()


@pytest.mark.parametrize(
    "config", ["UserKnownHostsFile none\n", "UserKnownHostsFile /dev/null\n", "StrictHostKeyChecking no\n"]
)
async def test_no_configuration_switches_the_check_off(
    fabric: SshFabric, standing: SshServer, ssh_dir: Path, config: str
) -> None:
    (ssh_dir / "config").write_text(config)
    error = await refused(fabric, NodeAddress.parse(standing.target, key_path=str(standing.key)))
    assert error.code is ErrorCode.SSH_HOST_KEY_UNKNOWN


async def test_a_revoked_host_key(fabric: SshFabric, standing: SshServer, ssh_dir: Path) -> None:
    (ssh_dir / "known_hosts").write_text(
        standing.known_hosts_line() + "@revoked " + standing.known_hosts_line()
    )
    error = await refused(fabric, NodeAddress.parse(standing.target, key_path=str(standing.key)))
    assert error.code is ErrorCode.SSH_HOST_KEY_UNKNOWN and "revoked" in error.message


# --- The user's configuration --------------------------------------------------------------------


async def test_a_name_of_the_configuration(fabric: SshFabric, standing: SshServer, ssh_dir: Path) -> None:
    (ssh_dir / "config").write_text(
        f"Host box\n  HostName 127.0.0.1\n  Port {standing.port}\n  User {standing.user}\n"
        f'  IdentityFile "{standing.key}"\n  RemoteCommand false\n  SendEnv *\n  RequestTTY force\n'
    )
    (ssh_dir / "known_hosts").write_text(standing.known_hosts_line())
    await works(fabric, NodeAddress("box"))


async def test_known_hosts_are_where_the_configuration_says(
    fabric: SshFabric, standing: SshServer, ssh_dir: Path
) -> None:
    named = ssh_dir / "hosts of mine"
    (ssh_dir / "config").write_text(
        f'Host box\n  HostName 127.0.0.1\n  Port {standing.port}\n  UserKnownHostsFile "{named}"\n'
    )
    address = NodeAddress("box", key_path=str(standing.key))
    named.write_text(standing.known_hosts_line())
    await works(fabric, address)
    named.write_text("")
    (ssh_dir / "known_hosts").write_text(standing.known_hosts_line())
    assert (await refused(fabric, address)).code is ErrorCode.SSH_HOST_KEY_UNKNOWN


async def test_a_host_on_the_way(
    fabric: SshFabric, standing: SshServer, server: SshServer, ssh_dir: Path
) -> None:
    (ssh_dir / "config").write_text(
        f'Host jump\n  HostName 127.0.0.1\n  Port {server.port}\n  IdentityFile "{server.key}"\n'
        f"Host box\n  HostName 127.0.0.1\n  Port {standing.port}\n  ProxyJump jump\n"
    )  # fmt: skip
    address = NodeAddress("box", key_path=str(standing.key), host_key=standing.fingerprint())
    error = await refused(fabric, address)
    assert error.code is ErrorCode.SSH_HOST_KEY_UNKNOWN
    (ssh_dir / "known_hosts").write_text(server.known_hosts_line())
    await works(fabric, address)
    await until("nobody is logged in on the way", lambda: not logged_in(server))
    config = (ssh_dir / "config").read_text()
    (ssh_dir / "config").write_text("UserKnownHostsFile none\n" + config)
    assert (await refused(fabric, address)).code is ErrorCode.SSH_HOST_KEY_UNKNOWN


async def test_a_way_for_all_hosts_leads_not_over_itself(
    fabric: SshFabric, standing: SshServer, server: SshServer, ssh_dir: Path
) -> None:
    (ssh_dir / "config").write_text(
        f'Host jump\n  Port {server.port}\n  IdentityFile "{server.key}"\n'
        f"Host box\n  Port {standing.port}\nHost *\n  HostName 127.0.0.1\n  ProxyJump jump\n"
    )
    (ssh_dir / "known_hosts").write_text(server.known_hosts_line() + standing.known_hosts_line())
    await works(fabric, NodeAddress("box", key_path=str(standing.key)))
    await works(fabric, NodeAddress("jump"))


@pytest.mark.parametrize("hops", ["jump", "jump,second"])
async def test_an_attempt_that_is_given_up_leaves_nobody_on_the_way(
    fabric: SshFabric, standing: SshServer, server: SshServer, ssh_dir: Path, hops: str
) -> None:
    heard: list[str] = []
    with silence() as port:
        (ssh_dir / "config").write_text(
            f'Host jump\n  Port {server.port}\n  IdentityFile "{server.key}"\n'
            f'Host second\n  Port {standing.port}\n  IdentityFile "{standing.key}"\n'
            f"Host box\n  Port {port}\n  ProxyJump {hops}\nHost *\n  HostName 127.0.0.1\n"
        )
        (ssh_dir / "known_hosts").write_text(server.known_hosts_line() + standing.known_hosts_line())
        async with asyncio.TaskGroup() as group:
            address = NodeAddress("box", key_path=str(standing.key))
            attempt = group.create_task(fabric.connect(address, on_heard=lambda: heard.append("a hop")))
            await until("the last hop asks and gets no answer", lambda: is_asked(port))
            assert logged_in(server)
            attempt.cancel()
        # And with them our ends are gone.
        await until("nobody is logged in", lambda: not logged_in(server) and not logged_in(standing))
    assert not heard


@contextmanager
def silence() -> Iterator[int]:
    """Yield a port that answers nothing at all, as one of a machine that is switched off."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        # Nobody accepts the one for whom there is room.
        with socket.create_connection(listener.getsockname()):
            yield listener.getsockname()[1]


def is_asked(port: int) -> bool:
    found = psutil.net_connections("tcp4")
    return any(each.status == psutil.CONN_SYN_SENT and each.raddr[1:] == (port,) for each in found)


def logged_in(server: SshServer) -> list[psutil.Process]:
    return [process for process in server.processes() if not server.is_listener(process)]


async def until(what: str, look: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not look():  # noqa: ASYNC110 - Other processes tell nobody of their end.
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("command", ["false", "/no/such/program", "sleep 0.05"])
async def test_a_way_that_ends_before_it_leads_anywhere(
    fabric: SshFabric, standing: SshServer, ssh_dir: Path, command: str
) -> None:
    (ssh_dir / "config").write_text(f"Host *\n  ProxyCommand {command} %h %p\n")
    for _ in range(5):
        assert (await refused(fabric, known(standing))).code is ErrorCode.NODE_UNREACHABLE


async def test_the_agent_holds_the_key(
    fabric: SshFabric, standing: SshServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="arr-"))
    path = folder / "agent"
    agent = await asyncio.create_subprocess_exec(
        "ssh-agent", "-D", "-a", str(path), stdout=subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(60):
            while not path.exists():  # noqa: ASYNC110 - It makes its socket and tells nobody.
                await asyncio.sleep(0.01)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        adding = await asyncio.create_subprocess_exec("ssh-add", "-q", str(standing.key))
        assert await adding.wait() == 0
        await works(fabric, NodeAddress.parse(standing.target, host_key=standing.fingerprint()))
    finally:
        agent.terminate()
        await agent.wait()
        shutil.rmtree(folder)


async def test_a_configuration_that_cannot_be_read(
    fabric: SshFabric, standing: SshServer, ssh_dir: Path
) -> None:
    (ssh_dir / "config").write_text("Port many\n")
    assert (await refused(fabric, known(standing))).code is ErrorCode.INVALID_SETTINGS


@pytest.mark.parametrize("name", ["config", "known_hosts"])
async def test_a_file_of_ssh_that_is_no_text(
    fabric: SshFabric, standing: SshServer, ssh_dir: Path, name: str
) -> None:
    (ssh_dir / name).write_bytes("Host müller\n".encode("latin-1"))
    error = await refused(fabric, NodeAddress.parse(standing.target, key_path=str(standing.key)))
    assert error.code is ErrorCode.INVALID_SETTINGS


async def test_the_folder_of_sockets_is_made_anew_or_missed_aloud(
    standing: SshServer,
) -> None:
    with tempfile.TemporaryDirectory(prefix="arr-") as made:
        folder = Path(made) / "x"
        fabric = SshFabric(SystemClock(), SeededEntropy(1), sockets_dir=folder)
        async with connected(fabric, known(standing)) as connection:
            end = await connection.forward(standing.port)
            assert isinstance(end, SocketPath) and end.path.is_socket()
        folder.rmdir()
        folder.write_text("in the way")
        async with connected(fabric, known(standing)) as connection:
            with pytest.raises(ArrieroError) as caught:
                await connection.forward(standing.port)
            assert caught.value.code is ErrorCode.STATE_DIR_UNUSABLE


# --- Servers that are not there, or go away ------------------------------------------------------


async def test_a_refused_port_is_tried_three_times(fabric: SshFabric) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        error = await refused(fabric, NodeAddress("127.0.0.1", taken.getsockname()[1], "ana"))
    assert error.code is ErrorCode.NODE_UNREACHABLE and error.kind.is_retryable
    assert error.details["attempts"] == 3


async def test_a_name_that_does_not_exist(fabric: SshFabric) -> None:
    error = await refused(fabric, NodeAddress("no-such-host.invalid", user="ana"))
    assert error.code is ErrorCode.NODE_UNREACHABLE


async def test_a_name_is_left_asked_for_and_its_first_address_refuses(
    fabric: SshFabric, standing: SshServer, ssh_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, answer = list[str](), asyncio.Event()

    async def has_two(host: str, port: int, **_: object) -> list[object]:
        asked.append(host)
        await answer.wait()
        ends = [(address, port) for address in ("127.0.0.2", "127.0.0.1")]
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", end) for end in ends]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", has_two)
    (ssh_dir / "config").write_text(f"Host box\n  HostName box.invalid\n  Port {standing.port}\n")
    (ssh_dir / "known_hosts").write_text(standing.known_hosts_line().replace("127.0.0.1", "box.invalid"))
    address = NodeAddress("box", key_path=str(standing.key))
    async with asyncio.TaskGroup() as group:
        attempt = group.create_task(fabric.connect(address))
        await until("it is asked for", lambda: bool(asked))
        attempt.cancel()
    assert "look-up-box.invalid" in {task.get_name() for task in asyncio.all_tasks()}
    answer.set()
    await works(fabric, address)
    assert set(asked) == {"box.invalid"}


async def test_a_name_is_looked_up_once_however_many_wait_or_have_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, asked, answer = asyncio.get_running_loop(), list[str](), asyncio.Event()

    async def asks_who_does_not_answer(host: str, *_: object, **__: object) -> list[object]:
        asked.append(host)
        await answer.wait()
        if host == "nobody":
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return []

    monkeypatch.setattr(loop, "getaddrinfo", asks_who_does_not_answer)
    names = Names()
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            given_up = (
                group.create_task(names.find("box", 22, 0)),
                group.create_task(names.find("nobody", 22, 0)),
            )
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            for each in given_up:
                each.cancel()
        waits = group.create_task(names.find("box", 22, 0))
        await asyncio.sleep(0)
        assert asked == ["box", "nobody"]
        answer.set()
        assert await waits == []
    with pytest.raises(socket.gaierror):
        await names.find("nobody", 22, 0)
    assert asked == ["box", "nobody", "nobody"]


async def test_a_server_that_never_answers() -> None:
    fabric = SshFabric(SystemClock(), SeededEntropy(1), sockets_dir=Path("/tmp"), connect_timeout_s=0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        error = await refused(fabric, NodeAddress("127.0.0.1", listener.getsockname()[1], "ana"))
    assert error.code is ErrorCode.NODE_UNREACHABLE
    assert "0.3 s" in error.message and error.details["attempts"] == 3


async def test_a_server_that_speaks_no_ssh(fabric: SshFabric) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad\r\n\r\n\x1b[31m" + b"x" * 9000 + b"\r\n")
        writer.close()

    web = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with web:
        error = await refused(fabric, NodeAddress("127.0.0.1", web.sockets[0].getsockname()[1], "ana"))
    assert error.code is ErrorCode.NODE_UNREACHABLE
    assert error.message.isprintable()


@pytest.mark.parametrize("fault", ["killed", "silent"])
async def test_a_server_that_goes_away_is_missed(fabric: SshFabric, server: SshServer, fault: str) -> None:
    async with connected(fabric, known(server)) as connection:
        end = await connection.forward(9)
        assert isinstance(end, SocketPath) and end.path.exists()
        started_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            command = group.create_task(_code_of(connection))
            await connection.run(["true"], timeout_s=10)
            server.kill() if fault == "killed" else server.suspend()
            async with asyncio.timeout(30):  # Of the 3 s; the machine may be busy.
                why = await connection.closed()
            assert why and why != "closed"
        print(f"{fault}: missed after {time.monotonic() - started_s:.2f} s: {why}")
        assert command.result() is ErrorCode.NODE_UNREACHABLE
        assert not end.path.exists()
        with pytest.raises(ArrieroError) as lost:
            await connection.run(["true"], timeout_s=5)
        assert lost.value.code is ErrorCode.NODE_UNREACHABLE
    if fault == "killed":
        server.start()
        await works(fabric, known(server))


async def _code_of(connection: Connection) -> ErrorCode | None:
    try:
        await connection.run(["sleep", "120"], timeout_s=100)
    except ArrieroError as error:
        return error.code
    return None


async def test_a_login_that_talks(fabric: SshFabric, tmp_path: Path) -> None:
    # A server's forced command stands in for a login shell whose start prints something.
    talk = "ForceCommand printf 'Welcome!\\narriero\\n'; eval \"$SSH_ORIGINAL_COMMAND\""
    with SshServer(tmp_path / "talks", more_config=talk) as server:
        await works(fabric, known(server))


@pytest.mark.parametrize(
    ("forced", "said"),
    [
        ("echo 'This account is not available.'; exit 1", "This account is not available."),
        ("echo 'files alone' >&2", "files alone"),
        ("/bin/false", "it said nothing"),
    ],
)
async def test_a_login_that_runs_no_commands(
    fabric: SshFabric, tmp_path: Path, forced: str, said: str
) -> None:
    with SshServer(tmp_path / "closed", more_config=f"ForceCommand {forced}") as server:
        async with connected(fabric, known(server)) as connection:
            with pytest.raises(ArrieroError) as failed:
                await connection.run(["sh", "-s"], timeout_s=10, may_fail=True)
            assert failed.value.code is ErrorCode.SSH_COMMAND_FAILED
            assert said in failed.value.message
            assert "with a shell" in failed.value.details["suggested_action"]


async def test_a_server_without_files_or_ports(fabric: SshFabric, tmp_path: Path) -> None:
    # OpenSSH takes the first word on a matter: the subsystem of this name is another one.
    with SshServer(tmp_path / "few", more_config="AllowTcpForwarding no\nMaxSessions 1") as server:
        async with connected(fabric, known(server)) as connection:
            with pytest.raises(ArrieroError) as failed:
                await connection.check_port(server.port)
            assert failed.value.code is ErrorCode.SSH_COMMAND_FAILED
            assert "AllowTcpForwarding yes" in failed.value.details["suggested_action"]
            await connection.run(["true"], timeout_s=10)


async def test_a_server_that_lets_no_port_be_opened_there(fabric: SshFabric, tmp_path: Path) -> None:
    with SshServer(tmp_path / "local", more_config="AllowTcpForwarding local") as server:
        async with connected(fabric, known(server)) as connection:
            for end in (HostPort("127.0.0.1", 9), SocketPath(tmp_path / "socket")):
                with pytest.raises(ArrieroError) as failed:
                    await connection.expose(end)
                assert failed.value.code is ErrorCode.SSH_COMMAND_FAILED
                assert "could not be given a port" in failed.value.message
                await connection.unexpose(end)
            await connection.run(["true"], timeout_s=10)


async def test_a_server_that_would_open_a_port_to_everybody(fabric: SshFabric, tmp_path: Path) -> None:
    with SshServer(tmp_path / "gateway", more_config="GatewayPorts yes") as server:
        async with connected(fabric, known(server)) as connection:
            with pytest.raises(ArrieroError) as failed:
                await connection.expose(SocketPath(tmp_path / "socket"))
            assert failed.value.code is ErrorCode.SSH_COMMAND_FAILED
            assert "GatewayPorts" in failed.value.message
            port = int(failed.value.message.split()[1])
            tables = await connection.run(["cat", "/proc/net/tcp", "/proc/net/tcp6"], timeout_s=10)
            assert not is_open_to_others(tables.stdout, port)


def test_what_is_open_to_others() -> None:
    line = "   0: {} 00000000:0000 {} 00000000:00000000 00:00000000 00000000     0        0 1 1\n"
    for address in ("00000000", "0A0A0A0A", "0" * 32):
        assert is_open_to_others(line.format(f"{address}:1F90", "0A").encode(), 8080)
    for address, state in (("0100007F", "0A"), ("0" * 24 + "01000000", "0A"), ("00000000", "01")):
        assert not is_open_to_others(line.format(f"{address}:1F90", state).encode(), 8080)
    assert not is_open_to_others(line.format("00000000:1F91", "0A").encode(), 8080)
    assert not is_open_to_others(b"", 8080)
