"""How is this very machine reached, in the way others are?"""

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.fabrics.base import (
    OUTPUT_BYTES_MAX,
    Completed,
    Connection,
    HostPort,
    LocalEnd,
    NodeAddress,
    OnHeard,
    OnRetry,
    SocketPath,
)
from arriero.fabrics.outcome import Kept, checked, not_ended
from arriero.fabrics.quoting import check
from arriero.fabrics.splice import Splices
from arriero.runtime.entropy import Entropy
from arriero.runtime.processes import exit_code_of, signal_group

MACHINE: Final = "this machine"
#: Between SIGTERM and SIGKILL for a command that takes too long.
GRACE_S: Final = 1.0
PIECE_BYTES: Final = 1024 * 1024


class LocalFabric:
    """This machine, whatever the address says."""

    def __init__(self, entropy: Entropy, *, home: Path | None = None) -> None:
        self._entropy = entropy
        self._home = home

    async def connect(
        self, address: NodeAddress, on_retry: OnRetry | None = None, on_heard: OnHeard | None = None
    ) -> Connection:
        """Return a connection to this machine."""
        return LocalConnection(self._entropy, self._home or Path.home())


class LocalConnection:
    """A `Connection` by subprocesses and files."""

    def __init__(self, entropy: Entropy, home: Path) -> None:
        self._entropy = entropy
        self._home = home
        self._is_closed = asyncio.Event()
        self._splices = Splices()

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
        """Run a program, see `Connection.run`."""
        self._check_open()
        check(argv)
        try:
            async with asyncio.timeout(timeout_s):
                process = await self._spawn(argv)
                async with _ended_with_us(process):
                    completed = await _collected(process, stdin, Kept(output_bytes_max, on_line=on_line))
        except TimeoutError as error:
            raise not_ended(MACHINE, argv, timeout_s) from error
        return checked(MACHINE, argv, completed, may_fail=may_fail)

    async def _spawn(self, argv: Sequence[str]) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        try:
            return await asyncio.create_subprocess_exec(
                *(os.fsencode(argument) for argument in argv),
                stdin=pipe, stdout=pipe, stderr=pipe, cwd=self._home, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            # What a shell says of a program that it does not find, or may not run.
            code = 127 if isinstance(error, FileNotFoundError) else 126
            raise ArrieroError(
                ErrorCode.SSH_COMMAND_FAILED,
                f"{argv[0]} failed on {MACHINE} with exit code {code}: {error.strerror}",
                machine=MACHINE,
                program=argv[0],
                exit_code=code,
                stderr=error.strerror or "",
            ) from error

    async def put(
        self, content: bytes | Path, remote_path: str, *, mode: int,
        on_sent: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        """Write a file, see `Connection.put`."""
        self._check_open()
        size_bytes = await asyncio.to_thread(self._put, content, self._home / remote_path, mode)
        if on_sent is not None:
            # From disk to disk it is there in a moment: one piece.
            on_sent(size_bytes)

    def _put(self, content: bytes | Path, path: Path, mode: int) -> int:
        temporary = path.with_name(f".{path.name[:200]}.{self._entropy.hex(12)}.part")
        try:
            with temporary.open("xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    with content.open("rb") as source:
                        while piece := source.read(PIECE_BYTES):
                            file.write(piece)
                file.flush()
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
                size_bytes = file.tell()
            temporary.rename(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise ArrieroError(
                ErrorCode.INSUFFICIENT_DISK if is_full else ErrorCode.SSH_COMMAND_FAILED,
                f"{path.name} could not be written on {MACHINE}: {error.strerror}",
            ) from error
        return size_bytes

    async def read(self, remote_path: str, *, bytes_max: int) -> bytes:
        """Return a file's content, see `Connection.read`."""
        self._check_open()
        return await asyncio.to_thread(self._read, self._home / remote_path, bytes_max)

    def _read(self, path: Path, bytes_max: int) -> bytes:
        try:
            with path.open("rb") as file:
                content = file.read(bytes_max + 1)
        except FileNotFoundError as error:
            raise ArrieroError(ErrorCode.NOT_FOUND, f"{MACHINE} has no file {path.name}") from error
        except OSError as error:
            raise ArrieroError(
                ErrorCode.SSH_COMMAND_FAILED,
                f"{path.name} could not be read on {MACHINE}: {error.strerror}",
            ) from error
        if len(content) > bytes_max:
            raise ArrieroError(
                ErrorCode.SSH_COMMAND_FAILED,
                f"{path.name} could not be read on {MACHINE}: it has more than {bytes_max} bytes",
            )
        return content

    async def forward(self, remote_port: int) -> HostPort:
        """Return the port itself."""
        self._check_open()
        return HostPort("127.0.0.1", remote_port)

    async def check_port(self, remote_port: int) -> None:
        """Know it: nobody stands between."""
        self._check_open()

    async def unforward(self, remote_port: int) -> None:
        """Do nothing: there is no end of ours."""

    async def expose(self, end: LocalEnd) -> int:
        """Return the port itself, or one that leads to the unix socket."""
        self._check_open()
        return end.port if isinstance(end, HostPort) else await self._splices.port(end.path)

    async def unexpose(self, end: LocalEnd) -> None:
        """Close a unix socket's port, see `Connection.unexpose`."""
        if isinstance(end, SocketPath):
            self._splices.shut(end.path)

    async def closed(self) -> str:
        """Wait until `aclose`: this machine does not go away."""
        await self._is_closed.wait()
        return "closed"

    async def aclose(self) -> None:
        """End the connection.  Safe to call twice."""
        self._is_closed.set()
        await self._splices.aclose()

    def _check_open(self) -> None:
        if self._is_closed.is_set():
            raise ArrieroError(ErrorCode.NODE_UNREACHABLE, f"the connection to {MACHINE} is gone: closed")


async def _collected(process: asyncio.subprocess.Process, stdin: bytes, stdout: Kept) -> Completed:
    assert process.stdout is not None and process.stderr is not None
    stderr = Kept(stdout.bytes_max, is_end=True)
    async with asyncio.TaskGroup() as group:
        group.create_task(_feed(process, stdin), name="local-stdin")
        group.create_task(_keep(process.stdout, stdout), name="local-stdout")
        group.create_task(_keep(process.stderr, stderr), name="local-stderr")
    exit_code, _ = exit_code_of(await process.wait())
    return Completed(exit_code, stdout.content(), stderr.content(), stdout.is_cut or stderr.is_cut)


async def _feed(process: asyncio.subprocess.Process, content: bytes) -> None:
    assert process.stdin is not None
    # A command need not read what it is given; uvloop says RuntimeError of one that has ended already.
    with contextlib.suppress(ConnectionError, RuntimeError):
        if content:
            process.stdin.write(content)
            await process.stdin.drain()
        process.stdin.close()


async def _keep(stream: asyncio.StreamReader, kept: Kept) -> None:
    while chunk := await stream.read(65_536):
        kept.feed(chunk)


@contextlib.asynccontextmanager
async def _ended_with_us(process: asyncio.subprocess.Process) -> AsyncIterator[None]:
    """End a command, and its process group, if we do not wait for it any longer."""
    try:
        yield
    except BaseException:
        try:
            signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GRACE_S):
                    await process.wait()
        finally:
            signal_group(process.pid, signal.SIGKILL)
        # Read to their ends, or the pipes would stay open.  What left the group may hold them; then
        # they are not waited for.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                await process.communicate()
        raise
