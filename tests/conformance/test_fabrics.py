"""What every way to reach a machine promises, asked of this machine and of a real sshd."""

import asyncio
import contextlib
import io
import os
import random
import select
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from aiohttp import ClientError, ClientSession, TCPConnector, UnixConnector, web

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.fabrics.base import Connection, HostPort, LocalEnd, NodeAddress, SocketPath
from arriero.fabrics.local import LocalFabric
from arriero.fabrics.ssh import SshFabric
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SystemEntropy
from arriero.testing.sshd import SshServer, sshd_path

#: More than what SSH and sockets keep on the way of one connection.
STUCK_BYTES = 16 << 20


# Autouse, so that it runs before what checks that a test leaves no process behind.
@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer | None]:
    if sshd_path() is None:
        yield None
        return
    with SshServer(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def sockets_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="arr-"))
    yield folder
    assert list(folder.iterdir()) == []
    folder.rmdir()


@pytest_asyncio.fixture(params=["local", "ssh"])
async def connection(
    request: pytest.FixtureRequest, server: SshServer | None, sockets_dir: Path
) -> AsyncIterator[Connection]:
    if request.param == "local":
        reached: Connection = await LocalFabric(SystemEntropy()).connect(NodeAddress("localhost"))
    elif server is None:
        pytest.skip("sshd is not installed (openssh-server)")
    else:
        address = NodeAddress.parse(server.target, key_path=str(server.key), host_key=server.fingerprint())
        fabric = SshFabric(SystemClock(), SystemEntropy(), sockets_dir=sockets_dir)
        reached = await fabric.connect(address)
    yield reached
    await reached.aclose()


async def run(connection: Connection, *argv: str, stdin: bytes = b"") -> bytes:
    return (await connection.run(argv, stdin=stdin, timeout_s=60)).stdout


async def until(what: str, look: Callable[[], bool], timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not look():  # noqa: ASYNC110 - Other processes tell nobody of their end.
            await asyncio.sleep(0.01)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _commands(mark: str) -> list[psutil.Process]:
    """Return the processes that have `mark` as an argument."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if mark in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


# --- Commands ------------------------------------------------------------------------------------


async def test_a_command_gives_its_output_and_exit_code(connection: Connection) -> None:
    script = 'cat; printf "%s" "$1" >&2; exit 7'
    completed = await connection.run(
        ["sh", "-c", script, "sh", "oh no"], stdin=b"\0in", timeout_s=60, may_fail=True
    )
    assert (completed.exit_code, completed.stdout, completed.stderr) == (7, b"\0in", b"oh no")
    assert not completed.is_cut


async def test_a_command_that_fails_is_an_error_with_its_last_words(connection: Connection) -> None:
    script = "echo first >&2; printf 'x%.0s' $(seq 5000) >&2; printf '\\nthe \\033[31mend' >&2; exit 3"
    with pytest.raises(ArrieroError) as failed:
        await connection.run(["sh", "-c", script], timeout_s=60)
    assert failed.value.code is ErrorCode.SSH_COMMAND_FAILED
    assert failed.value.details["exit_code"] == 3
    assert failed.value.details["stderr"].endswith("\nthe  [31mend")
    assert len(failed.value.details["stderr"]) <= 2000
    assert "exit code 3: the  [31mend" in failed.value.message


async def test_a_program_that_is_not_there(connection: Connection) -> None:
    with pytest.raises(ArrieroError) as failed:
        await connection.run(["arriero-no-such-program"], timeout_s=60)
    assert failed.value.code is ErrorCode.SSH_COMMAND_FAILED
    assert failed.value.details["exit_code"] == 127


async def test_a_signal_counts_as_a_shell_counts_it(connection: Connection) -> None:
    completed = await connection.run(["sh", "-c", "kill -9 $$"], timeout_s=60, may_fail=True)
    assert completed.exit_code == 137


async def test_large_input_and_output(connection: Connection) -> None:
    content = random.Random(1).randbytes(3_000_000)
    completed = await connection.run(["cat"], stdin=content, timeout_s=60, output_bytes_max=4_000_000)
    assert completed.stdout == content and not completed.is_cut


async def test_more_output_than_is_kept_does_no_harm(connection: Connection) -> None:
    script = "seq 1 300000; seq 1 300000 >&2"
    completed = await connection.run(["sh", "-c", script], timeout_s=60, output_bytes_max=1000)
    assert completed.is_cut
    assert completed.stdout.startswith(b"1\n2\n3\n") and len(completed.stdout) == 1000
    assert completed.stderr.endswith(b"\n299999\n300000\n") and len(completed.stderr) == 1000


async def test_lines_are_heard_as_they_come(connection: Connection, tmp_path: Path) -> None:
    heard: list[bytes] = []

    def hear(line: bytes) -> None:
        heard.append(line)
        (tmp_path / "heard").touch()

    # It goes on only when its first line was heard.
    script = 'printf "begun\nhalf"; until [ -e "$1" ]; do sleep 0.01; done; printf "way\n\nend"'
    argv = ["sh", "-c", script, "sh", str(tmp_path / "heard")]
    done = await connection.run(argv, timeout_s=60, on_line=hear)
    assert done.stdout == b"begun\nhalfway\n\nend"
    assert heard == [b"begun", b"halfway", b""]


async def test_input_that_nobody_reads(connection: Connection) -> None:
    assert await run(connection, "true", stdin=b"x" * 3_000_000) == b""


async def test_a_command_without_end_is_ended_with_its_children(connection: Connection) -> None:
    mark = f"7{random.randrange(10**9)}"
    # One child that heeds no SIGTERM.
    script = f"trap '' TERM; sleep {mark} & sleep {mark}; wait"
    with pytest.raises(ArrieroError) as failed:
        await connection.run(["sh", "-c", script], timeout_s=0.5)
    assert failed.value.code is ErrorCode.SSH_COMMAND_FAILED
    assert failed.value.details["timeout_s"] == 0.5
    await until("its processes are gone", lambda: not _commands(mark))


async def test_endless_output_is_ended_too(connection: Connection) -> None:
    mark = f"y{random.randrange(10**9)}"
    with pytest.raises(ArrieroError) as failed:
        await connection.run(["yes", mark], timeout_s=0.5)
    assert failed.value.code is ErrorCode.SSH_COMMAND_FAILED
    await until("it is gone", lambda: not _commands(mark))


async def test_a_command_that_is_not_waited_for_any_more_is_ended(connection: Connection) -> None:
    mark = f"8{random.randrange(10**9)}"
    async with asyncio.TaskGroup() as group:
        task = group.create_task(connection.run(["sleep", mark], timeout_s=60))
        await until("it runs", lambda: bool(_commands(mark)))
        task.cancel()
    await until("it is gone", lambda: not _commands(mark))


async def test_many_commands_at_once(connection: Connection) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(run(connection, "echo", str(index))) for index in range(30)]
    assert [task.result() for task in tasks] == [b"%d\n" % index for index in range(30)]


async def test_ten_thousand_hostile_strings_arrive_and_none_is_executed(
    connection: Connection, tmp_path: Path
) -> None:
    pwned = tmp_path / "pwned"
    chance = random.Random(4)
    atoms = [
        *"'\"\\$`!*?[]{}()<>|&;#~=%^-+ \t\n\r\x01\x1bé", f"$(touch {pwned})", f"`touch {pwned}`", f";touch {pwned};",
        f"';touch {pwned};'", f"\\';touch {pwned};'", f"\ntouch {pwned}\n", f"|touch {pwned}", "--", "\udc80", "\u202e",
    ]  # fmt: skip
    sent = ["".join(chance.choices(atoms, k=chance.randint(0, 5))) for _ in range(10_000)]
    for index in range(0, len(sent), 400):
        some = sent[index : index + 400]
        got = await run(connection, "printf", "%s\\0", *some)
        assert got == b"".join(text.encode("utf-8", "surrogateescape") + b"\0" for text in some)
    assert not pwned.exists()


@pytest.mark.parametrize("argument", ["a\0b"])
async def test_what_cannot_be_an_argument(connection: Connection, argument: str) -> None:
    with pytest.raises(ArrieroError) as refused:
        await connection.run(["echo", argument], timeout_s=60)
    assert refused.value.code is ErrorCode.INVALID_REQUEST


# --- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "it's $(a) *", "-rf", "\n"])
async def test_a_file_is_put_and_read(connection: Connection, tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    target.write_bytes(b"old")
    await connection.put(b"new\0", str(target), mode=0o640)
    assert target.read_bytes() == b"new\0"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert names(tmp_path) == [name]
    assert await connection.read(str(target), bytes_max=4) == b"new\0"


async def test_a_large_file_is_put_from_the_disk(connection: Connection, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(2).randbytes(5_000_001))
    sent: list[int] = []
    await connection.put(source, str(tmp_path / "copy"), mode=0o600, on_sent=sent.append)
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    assert sent == sorted(sent) and sent[-1] == 5_000_001


async def test_an_empty_file(connection: Connection, tmp_path: Path) -> None:
    await connection.put(b"", str(tmp_path / "empty"), mode=0o600)
    assert await connection.read(str(tmp_path / "empty"), bytes_max=0) == b""


async def test_a_put_that_fails_leaves_nothing(connection: Connection, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(ArrieroError) as failed:
        await connection.put(b"x", str(tmp_path / "taken"), mode=0o600)
    assert failed.value.code is ErrorCode.SSH_COMMAND_FAILED
    with pytest.raises(ArrieroError) as failed:
        await connection.put(b"x", str(tmp_path / "no" / "folder"), mode=0o600)
    assert failed.value.code is ErrorCode.SSH_COMMAND_FAILED
    assert names(tmp_path) == ["taken"]


@pytest.mark.skipif(not Path("/dev/full").exists() or os.getuid() != 0, reason="needs root to mount a disk")
@pytest.mark.root
async def test_a_full_disk_is_told_as_such(connection: Connection, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = await connection.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], timeout_s=60, may_fail=True
    )
    if mounted.exit_code:
        pytest.skip("may not mount here")
    try:
        with pytest.raises(ArrieroError) as failed:
            await connection.put(b"x" * 1_000_000, str(disk / "file"), mode=0o600)
        assert failed.value.code is ErrorCode.INSUFFICIENT_DISK
        assert names(disk) == []
    finally:
        await run(connection, "umount", str(disk))


async def test_a_file_that_is_not_there_or_too_large(connection: Connection, tmp_path: Path) -> None:
    with pytest.raises(ArrieroError) as failed:
        await connection.read(str(tmp_path / "none"), bytes_max=10)
    assert failed.value.code is ErrorCode.NOT_FOUND
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(ArrieroError) as failed:
        await connection.read(str(tmp_path / "large"), bytes_max=10)
    assert failed.value.code is ErrorCode.SSH_COMMAND_FAILED
    assert "more than 10 bytes" in failed.value.message


# --- Ports ---------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def website() -> AsyncIterator[int]:
    """Serve `/N` with N bytes; yield the port."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=b"x" * int(request.match_info["size"]))

    app = web.Application()
    app.router.add_get("/{size}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def session(end: LocalEnd) -> tuple[ClientSession, str]:
    if isinstance(end, HostPort):
        return ClientSession(connector=TCPConnector()), f"http://{end.host}:{end.port}"
    return ClientSession(connector=UnixConnector(str(end.path))), "http://node"


async def test_http_goes_to_a_port_there(connection: Connection) -> None:
    async with website() as port:
        await connection.check_port(port)
        end = await connection.forward(port)
        assert await connection.forward(port) == end
        client, url = session(end)
        async with client, asyncio.TaskGroup() as group:
            for size in (0, 1, 100_000, 5_000_000):
                group.create_task(_fetch(client, f"{url}/{size}", size))
        await connection.unforward(port)
        await connection.unforward(port)


async def _fetch(client: ClientSession, url: str, size: int) -> None:
    async with client.get(url) as response:
        assert len(await response.read()) == size


@contextlib.asynccontextmanager
async def website_on_a_socket(path: Path) -> AsyncIterator[SocketPath]:
    """Serve `/N` with N bytes, and what is sent with its length."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=b"x" * int(request.match_info["size"]))

    async def measure(request: web.Request) -> web.Response:
        return web.Response(text=str(len(await request.read())))

    app = web.Application(client_max_size=100_000_000)
    app.router.add_get("/{size}", answer)
    app.router.add_post("/", measure)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    try:
        yield SocketPath(path)
    finally:
        await runner.cleanup()


@pytest.fixture
def short_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="arr-") as folder:
        yield Path(folder)


async def test_a_port_there_leads_to_a_socket_here(connection: Connection, short_dir: Path) -> None:
    async with website_on_a_socket(short_dir / "s") as end:
        port = await connection.expose(end)
        assert await connection.expose(end) == port
        url = f"http://127.0.0.1:{port}"
        async with ClientSession() as client:
            async with asyncio.TaskGroup() as group:
                for size in (0, 1, 100_000, 5_000_000):
                    group.create_task(_fetch(client, f"{url}/{size}", size))
            async with client.post(url, data=io.BytesIO(b"x" * 5_000_000)) as response:
                assert await response.text() == "5000000"
        await connection.unexpose(end)
        await connection.unexpose(end)
        await until("nothing listens there", lambda: not _listens(port))
        again = await connection.expose(end)
        async with ClientSession() as client:
            await _fetch(client, f"http://127.0.0.1:{again}/3", 3)


async def test_a_port_there_leads_to_a_port_here(connection: Connection) -> None:
    async with website() as port:
        end = HostPort("127.0.0.1", port)
        there = await connection.expose(end)
        assert await connection.expose(end) == there
        async with ClientSession() as client:
            await _fetch(client, f"http://127.0.0.1:{there}/1000", 1000)
        await connection.unexpose(end)
        await connection.unexpose(end)


async def test_several_ends_have_a_port_each(connection: Connection, short_dir: Path) -> None:
    async with (
        website_on_a_socket(short_dir / "a") as one,
        website_on_a_socket(short_dir / "b") as two,
        website() as three,
    ):
        ends = (one, two, HostPort("127.0.0.1", three))
        ports = [await connection.expose(end) for end in ends]
        assert len(set(ports)) == 3
        await connection.unexpose(one)
        await until("nothing listens there", lambda: not _listens(ports[0]))
        async with ClientSession() as client:
            for size, port in enumerate(ports[1:]):
                await _fetch(client, f"http://127.0.0.1:{port}/{size}", size)


async def test_a_port_there_whose_socket_nobody_serves_hangs_up(
    connection: Connection, short_dir: Path
) -> None:
    port = await connection.expose(SocketPath(short_dir / "nobody"))
    async with ClientSession() as client:
        with pytest.raises(ClientError):
            await client.get(f"http://127.0.0.1:{port}/1")


async def test_a_port_there_ends_with_the_connection_and_what_goes_through_it_too(
    connection: Connection, short_dir: Path
) -> None:
    async with _silent(short_dir / "s") as end:
        port = await connection.expose(end)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"anybody?")
        await writer.drain()
        await connection.aclose()
        async with asyncio.timeout(60):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()
        await until("nothing listens there", lambda: not _listens(port))


async def test_what_nobody_here_reads_or_ends_is_ended_with_the_connection(
    connection: Connection, short_dir: Path
) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.setblocking(False)
        listener.bind(str(short_dir / "s"))
        listener.listen()
        port = await connection.expose(SocketPath(short_dir / "s"))
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        deaf: socket.socket | None = None
        try:
            # More than there is room for on the way: whatever carries it has to wait.
            writer.write(b"x" * STUCK_BYTES)
            async with asyncio.timeout(60):
                deaf, _ = await loop.sock_accept(listener)
            await until("it is stuck", lambda: _unread_bytes(deaf) > 0)
            await connection.aclose()
            # It neither reads on to the end nor writes: only its other side can have closed it.
            await until("it is ended", lambda: _is_closed_by_the_other(deaf))
        finally:
            writer.transport.abort()
            if deaf is not None:
                deaf.close()


def _unread_bytes(end: socket.socket) -> int:
    with contextlib.suppress(BlockingIOError):
        return len(end.recv(1, socket.MSG_PEEK))
    return 0


def _is_closed_by_the_other(end: socket.socket) -> bool:
    poll = select.poll()
    poll.register(end, 0)
    return bool(poll.poll(0))


@contextlib.asynccontextmanager
async def _silent(path: Path) -> AsyncIterator[SocketPath]:
    """Accept, and never answer."""

    served: dict[asyncio.Task[None] | None, asyncio.StreamWriter] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served[asyncio.current_task()] = writer
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        del served[asyncio.current_task()]

    server = await asyncio.start_unix_server(serve, path)
    async with server:
        yield SocketPath(path)
    # Who looked whether anything still listens may have come through just before it did not.
    for writer in served.values():
        writer.transport.abort()
    await until("nobody is served any more", lambda: not served)


def _listens(port: int) -> bool:
    # Without a try: what came through in the moment in which it closes would be there for ever.
    found = psutil.net_connections("tcp4")
    return any(each.status == "LISTEN" and each.laddr[1:] == (port,) for each in found)


# --- The end -------------------------------------------------------------------------------------


async def test_what_is_closed_says_so(connection: Connection) -> None:
    await connection.forward(9)
    await connection.aclose()
    await connection.aclose()
    async with asyncio.timeout(10):
        assert await connection.closed() == "closed"
    for attempt in (
        connection.run(["true"], timeout_s=5),
        connection.put(b"", "x", mode=0o600),
        connection.read("x", bytes_max=1),
        connection.forward(10),
        connection.check_port(10),
        connection.expose(HostPort("127.0.0.1", 9)),
        connection.expose(SocketPath(Path("/nobody"))),
    ):
        with pytest.raises(ArrieroError) as failed:
            await attempt
        assert failed.value.code is ErrorCode.NODE_UNREACHABLE
