"""What can be done on a machine that we are logged in to by SSH?"""

import asyncio
import contextlib
import posixpath
import re
import shutil
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, cast

import asyncssh

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.fabrics.base import OUTPUT_BYTES_MAX, Completed, LocalEnd, SocketPath
from arriero.fabrics.outcome import Kept, checked, not_begun, not_ended
from arriero.fabrics.quoting import PID_MARK, command_line
from arriero.fabrics.splice import Splices
from arriero.runtime.entropy import Entropy
from arriero.runtime.processes import exit_code_of

#: OpenSSH allows 10 sessions a connection (MaxSessions); channels to ports are not among them.
SESSIONS_MAX: Final = 8
#: For a command that takes too long: SIGTERM to its process group, up to 1 s, SIGKILL.
_END: Final = """
kill -s TERM -- "-$1"
for _ in 1 2 3 4 5 6 7 8 9 10; do
  kill -s 0 -- "-$1" 2>/dev/null || exit 0
  sleep 0.1
done
kill -s KILL -- "-$1"
"""
END_TIMEOUT_S: Final = 3.0
#: More than the line with the process id is long, and enough of what was said instead of it.
BEFORE_BYTES_MAX: Final = 512
# Not 0, not 1: to those a signal for a process group goes to ourselves, or to everybody.
_PID_LINE: Final = re.compile(rb"%s([2-9]|[1-9][0-9]{1,18})\n" % PID_MARK.encode())
#: A file transfer may take any time, but no step of it this long.
STALL_S: Final = 30.0
LOOK_TIMEOUT_S: Final = 10.0
#: As /proc/net/tcp and tcp6 write 127.0.0.1, ::1 and ::ffff:127.0.0.1 (on machines of either byte order).
_LOOPBACKS: Final = frozenset(
    {
        b"0100007F", b"7F000001",
        b"00000000000000000000000001000000", b"00000000000000000000000000000001",
        b"0000000000000000FFFF00000100007F", b"00000000000000000000FFFF7F000001",
    }
)  # fmt: skip
CLOSE_TIMEOUT_S: Final = 2.0
#: A disk that failed a write and has less room than this is full.
FULL_BYTES: Final = 1024 * 1024
PIECE_BYTES: Final = 1024 * 1024


class Gone:
    """Whether, and why, a connection is gone."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.why = ""

    def tell(self, why: str) -> None:
        """Know that it is gone; the first reason stays."""
        self.why = self.why or why
        self._event.set()

    @property
    def is_told(self) -> bool:
        """Whether it is gone."""
        return self._event.is_set()

    async def wait(self) -> str:
        """Wait until it is gone; return why."""
        await self._event.wait()
        return self.why


def reason_of(error: BaseException) -> str:
    """Return what asyncssh or the system says of an error, in one printable line."""
    if isinstance(error, asyncssh.Error):
        text = error.reason
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror
    else:
        text = str(error) or type(error).__name__
    # A server's own words may be among them.
    return "".join(c if c.isprintable() else " " for c in text[:300])


class SshConnection:
    """A `Connection` over one SSH connection."""

    def __init__(
        self,
        connection: asyncssh.SSHClientConnection,
        gone: Gone,
        entropy: Entropy,
        *,
        name: str,
        sockets_dir: Path,
    ) -> None:
        self._connection = connection
        self._gone = gone
        self._entropy = entropy
        self._name = name
        self._sockets_dir = sockets_dir
        self._own_dir: Path | None = None
        self._ends: dict[int, tuple[SocketPath, asyncssh.SSHListener]] = {}
        self._exposed: dict[LocalEnd, asyncssh.SSHListener] = {}
        self._splices = Splices(asyncssh.Error)
        self._forwarding = asyncio.Lock()
        self._are_ports_let = False
        self._sessions = asyncio.Semaphore(SESSIONS_MAX)

    # --- Commands ------------------------------------------------------------------------

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float,
        may_fail: bool = False,
        output_bytes_max: int = OUTPUT_BYTES_MAX,
        on_line: Callable[[bytes], None] | None = None,
    ) -> Completed:
        """Run a program there, see `Connection.run`."""
        line = command_line(argv)
        try:
            async with asyncio.timeout(timeout_s), self._sessions:
                with self._told(f"{argv[0]} could not be started"):
                    process = await self._connection.create_process(line, encoding=None)
                command = _Command(process, Kept(output_bytes_max, on_line=on_line))
                async with self._ended_with_us(command):
                    completed = await command.completed(stdin)
        except TimeoutError as error:
            raise not_ended(self._name, argv, timeout_s) from error
        if completed is None:
            raise self._lost()
        if command.pid is None:
            raise not_begun(self._name, argv, completed, command.before)
        return checked(self._name, argv, completed, may_fail=may_fail)

    @contextlib.asynccontextmanager
    async def _ended_with_us(self, command: "_Command") -> AsyncIterator[None]:
        """End a command, and its process group, if we do not wait for it any longer.

        By a second command: OpenSSH passes no signals on for root, other servers for nobody.
        """
        try:
            yield
        except BaseException:
            try:
                with contextlib.suppress(asyncssh.Error, OSError, TimeoutError):
                    async with asyncio.timeout(END_TIMEOUT_S):
                        # It may run already, and its word of that be on its way.
                        await command.started()
                        if command.pid is not None:
                            script = command_line(["sh", "-c", _END, "sh", str(command.pid)])
                            ending = await self._connection.create_process(script, encoding=None)
                            await ending.wait_closed()
            finally:
                command.process.close()
            raise

    # --- Files ---------------------------------------------------------------------------

    async def put(
        self, content: bytes | Path, remote_path: str, *, mode: int,
        on_sent: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        """Write a file there, see `Connection.put`."""
        folder, name = posixpath.split(remote_path)
        temporary = posixpath.join(folder, f".{name[:200]}.{self._entropy.hex(12)}.part")
        async with self._sftp(f"{remote_path} could not be written") as sftp:
            try:
                async with sftp.open(temporary, "xb", asyncssh.SFTPAttrs(permissions=0o600)) as file:
                    async for piece in _pieces(content):
                        async with asyncio.timeout(STALL_S):
                            await file.write(piece)
                        if on_sent is not None:
                            on_sent(await file.tell())
                    async with asyncio.timeout(STALL_S):
                        await file.chmod(mode)
                        # Where the server cannot sync, the rename has to do.
                        with contextlib.suppress(asyncssh.SFTPOpUnsupported):
                            await file.fsync()
                async with asyncio.timeout(STALL_S):
                    await sftp.posix_rename(temporary, remote_path)
            except BaseException as error:
                is_full = False
                with contextlib.suppress(asyncssh.Error, OSError, TimeoutError):
                    async with asyncio.timeout(CLOSE_TIMEOUT_S):
                        # The protocol has no word for a full disk: it is a failure like any other.
                        if isinstance(error, asyncssh.SFTPFailure):
                            disk = await sftp.statvfs(folder or ".")
                            is_full = (disk.bavail or 0) * (disk.frsize or 0) < FULL_BYTES
                        await sftp.remove(temporary)
                if is_full:
                    raise ArrieroError(
                        ErrorCode.INSUFFICIENT_DISK,
                        f"the disk of {self._name} became full while {remote_path} was written",
                    ) from error
                raise

    async def read(self, remote_path: str, *, bytes_max: int) -> bytes:
        """Return a file's content, see `Connection.read`."""
        what = f"{remote_path} could not be read"
        async with self._sftp(what) as sftp, asyncio.timeout(STALL_S):
            try:
                async with sftp.open(remote_path, "rb") as file:
                    # Opened as bytes; the library's types know text alone.
                    content = cast("bytes", await file.read(bytes_max + 1))
            except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath) as error:
                raise ArrieroError(ErrorCode.NOT_FOUND, f"{self._name} has no file {remote_path}") from error
        if len(content) > bytes_max:
            raise ArrieroError(
                ErrorCode.SSH_COMMAND_FAILED, f"{what} on {self._name}: it has more than {bytes_max} bytes"
            )
        return content

    # --- Ports ---------------------------------------------------------------------------

    async def forward(self, remote_port: int) -> SocketPath:
        """Return the local end for a loopback port there, see `Connection.forward`."""
        async with self._forwarding:
            known = self._ends.get(remote_port)
            if known is not None:
                return known[0]
            if self._gone.is_told:
                raise self._lost()
            try:
                if self._own_dir is None:
                    # A folder of the session is taken away when its user logs out, we stay.
                    self._sockets_dir.mkdir(mode=0o700, exist_ok=True)
                    # 0700: nobody else on this machine gets through, and nobody can take its place.
                    self._own_dir = Path(tempfile.mkdtemp(prefix="ssh-", dir=self._sockets_dir))
                end = SocketPath(self._own_dir / str(remote_port))
                with self._told(f"port {remote_port} could not be forwarded"):
                    listener = await self._connection.forward_local_path_to_port(
                        str(end.path), "127.0.0.1", remote_port
                    )
            except OSError as error:
                raise ArrieroError(
                    ErrorCode.STATE_DIR_UNUSABLE,
                    f"no socket can be made here that leads to {self._name}: {reason_of(error)}",
                ) from error
            self._ends[remote_port] = (end, listener)
            return end

    async def check_port(self, remote_port: int) -> None:
        """Know that channels to ports are let through, see `Connection.check_port`."""
        if self._are_ports_let:
            return
        try:
            with self._told(f"port {remote_port} could not be forwarded"):
                async with asyncio.timeout(STALL_S):
                    _, writer = await self._connection.open_connection(
                        "127.0.0.1", remote_port, encoding=None
                    )
            writer.close()
        except ArrieroError as error:
            cause = error.__cause__
            if self._gone.is_told or not isinstance(cause, asyncssh.ChannelOpenError):
                raise
            if cause.code == asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED:
                error.details["suggested_action"] = (
                    "its sshd refuses channels to ports: set 'AllowTcpForwarding yes' in its sshd_config, "
                    "and let no PermitOpen stand in the way"
                )
                raise
            # Nothing listens there just now: that is for those to see who connect to it.
        self._are_ports_let = True

    async def unforward(self, remote_port: int) -> None:
        """Close a port's local end; connections that are open stay.  Safe to call twice."""
        end, listener = self._ends.pop(remote_port, (None, None))
        if end is not None and listener is not None:
            listener.close()
            end.path.unlink(missing_ok=True)

    async def expose(self, end: LocalEnd) -> int:
        """Return a loopback port there that leads to `end`, see `Connection.expose`."""
        async with self._forwarding:
            known = self._exposed.get(end)
            if known is not None:
                return known.get_port()
            if self._gone.is_told:
                raise self._lost()
            here = end.path if isinstance(end, SocketPath) else f"{end.host}:{end.port}"
            with self._told(f"{here} could not be given a port"):
                async with asyncio.timeout(STALL_S):
                    listener = await self._listen_there(end)
            self._exposed[end] = listener
        try:
            await self._check_loopback(listener.get_port())
        except BaseException:
            await self.unexpose(end)
            raise
        return listener.get_port()

    async def _check_loopback(self, port: int) -> None:
        """Know that a port there is open to that machine alone.

        A server with `GatewayPorts yes` listens on all addresses, whatever it is asked for.
        """
        tables = await self.run(
            ["cat", "/proc/net/tcp", "/proc/net/tcp6"], timeout_s=LOOK_TIMEOUT_S, may_fail=True
        )
        if is_open_to_others(tables.stdout, port):
            raise ArrieroError(
                ErrorCode.SSH_COMMAND_FAILED,
                f"port {port} on {self._name} would be open to other machines: its sshd has GatewayPorts yes",
                suggested_action="set 'GatewayPorts no' in its sshd_config, or 'clientspecified'",
            )

    async def _listen_there(self, end: LocalEnd) -> asyncssh.SSHListener:
        # Carried by ourselves: what the library connects to an end while the connection goes, it leaves open.
        async def serve(reader: asyncssh.SSHReader[bytes], writer: asyncssh.SSHWriter[bytes]) -> None:
            await self._splices.serve(end, reader, writer)

        def accepted(_host: str, _port: int) -> Any:
            return serve

        return await self._connection.start_server(accepted, "127.0.0.1", 0, encoding=None)

    async def unexpose(self, end: LocalEnd) -> None:
        """Close an end's port there; connections that are open stay.  Safe to call twice."""
        listener = self._exposed.pop(end, None)
        if listener is not None and not self._gone.is_told:
            listener.close()
            # The machine's word that it is closed; one that is gone has closed it.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await listener.wait_closed()

    # --- The end -------------------------------------------------------------------------

    async def closed(self) -> str:
        """Wait until the connection is gone, at most 3 s after the machine fell silent; return why."""
        why = await self._gone.wait()
        self._forget_ends()
        await self._splices.aclose()
        return why

    async def aclose(self) -> None:
        """End the connection.  Safe to call twice."""
        listeners = self._forget_ends()
        await self._splices.aclose()
        self._connection.close()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._connection.wait_closed()
                for listener in listeners:
                    await listener.wait_closed()
        except TimeoutError:
            self._connection.abort()
        self._gone.tell("closed")

    def _forget_ends(self) -> list[asyncssh.SSHListener]:
        listeners = [listener for _, listener in self._ends.values()]
        for listener in listeners:
            listener.close()
        self._ends.clear()
        # Ports there end with the connection.
        self._exposed.clear()
        if self._own_dir is not None:
            shutil.rmtree(self._own_dir, ignore_errors=True)
            self._own_dir = None
        return listeners

    # --- Failures ------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _sftp(self, what: str) -> AsyncIterator[asyncssh.SFTPClient]:
        async with self._sessions:
            with self._told(what):
                async with asyncio.timeout(STALL_S):
                    sftp = await self._connection.start_sftp_client()
                try:
                    yield sftp
                finally:
                    sftp.exit()
                    with contextlib.suppress(asyncssh.Error, OSError):
                        async with asyncio.timeout(CLOSE_TIMEOUT_S):
                            await sftp.wait_closed()

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Turn asyncssh's errors into ours."""
        try:
            yield
        except TimeoutError as error:
            raise ArrieroError(
                ErrorCode.NODE_UNREACHABLE, f"{what} on {self._name}: no answer for {STALL_S:g} s"
            ) from error
        # A port that is refused is no error of the library's kind.
        except (asyncssh.Error, asyncssh.ChannelListenError, ConnectionError) as error:
            is_lost = isinstance(error, asyncssh.DisconnectError | ConnectionError)
            if is_lost or self._gone.is_told or isinstance(error, asyncssh.SFTPConnectionLost):
                raise self._lost() from error
            raise ArrieroError(
                ErrorCode.SSH_COMMAND_FAILED, f"{what} on {self._name}: {reason_of(error)}"
            ) from error

    def _lost(self) -> ArrieroError:
        why = self._gone.why or "connection lost"
        return ArrieroError(ErrorCode.NODE_UNREACHABLE, f"the connection to {self._name} is gone: {why}")


class _Command:
    """A command that runs there."""

    def __init__(self, process: asyncssh.SSHClientProcess[bytes], stdout: Kept) -> None:
        self.process = process
        #: Of its process group; None until it has started.
        self.pid: int | None = None
        #: The end of what was said before it started.
        self.before = b""
        self._stdout = stdout
        self._stderr = Kept(stdout.bytes_max, is_end=True)

    async def completed(self, stdin: bytes) -> Completed | None:
        """Return what it left; None if the connection was lost first."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._feed(stdin), name="ssh-stdin")
            group.create_task(self._keep_output(), name="ssh-stdout")
            group.create_task(self._keep_errors(), name="ssh-stderr")
        await self.process.wait_closed()
        if self.process.returncode is None:
            return None
        exit_code, _ = exit_code_of(self.process.returncode)
        stdout, stderr = self._stdout, self._stderr
        return Completed(exit_code, stdout.content(), stderr.content(), stdout.is_cut or stderr.is_cut)

    # That the connection was lost, the missing exit code tells.

    async def _feed(self, content: bytes) -> None:
        # A command need not read what it is given.
        with contextlib.suppress(asyncssh.Error, OSError):
            for start in range(0, len(content), PIECE_BYTES):
                self.process.stdin.write(content[start : start + PIECE_BYTES])
                await self.process.stdin.drain()
            self.process.stdin.write_eof()

    async def started(self) -> None:
        """Read until it has told its process id, or its output ends."""
        # What a login shell's own start says comes before the mark; none of it is the command's.
        while self.pid is None and (chunk := await self.process.stdout.read(65_536)):
            self.before = self.before[-BEFORE_BYTES_MAX:] + chunk
            found = _PID_LINE.search(self.before)
            if found is not None:
                self.pid = int(found[1])
                self._stdout.feed(self.before[found.end() :])

    async def _keep_output(self) -> None:
        with contextlib.suppress(asyncssh.Error, OSError):
            await self.started()
            while chunk := await self.process.stdout.read(65_536):
                self._stdout.feed(chunk)

    async def _keep_errors(self) -> None:
        with contextlib.suppress(asyncssh.Error, OSError):
            while chunk := await self.process.stderr.read(65_536):
                self._stderr.feed(chunk)


def is_open_to_others(tables: bytes, port: int) -> bool:
    """Return whether something listens on `port` beyond loopback, by the content of /proc/net/tcp and tcp6.

    Where there are no such tables (macOS) the answer is no: its sshd is as its owner set it.
    """
    for line in tables.splitlines():
        fields = line.split()
        if len(fields) > 3 and fields[3] == b"0A":
            address, _, number = fields[1].rpartition(b":")
            if number == b"%04X" % port and address not in _LOOPBACKS:
                return True
    return False


async def _pieces(content: bytes | Path) -> AsyncGenerator[bytes, None]:
    if isinstance(content, bytes):
        for start in range(0, len(content), PIECE_BYTES):
            yield content[start : start + PIECE_BYTES]
        return
    with await asyncio.to_thread(content.open, "rb") as file:
        while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
            yield piece
