"""How does an engine's process live, tell and end?

The process is a child of ours: it gets one line on stdin, tells its progress on stdout and its log
on stderr, ends when stdin ends, and dies with us.  Spawn it from the thread that lives as long as
the worker (the main one): the kernel ends the child when that thread ends.
"""

import asyncio
import collections
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from arriero.engines.base import EngineExit
from arriero.runtime import cgroups

LOG_LINES_KEPT: Final = 200
LINE_BYTES_MAX: Final = 64 << 10
_READ_BYTES: Final = 64 << 10
_TERMINATE_WAIT_S: Final = 1.0
_KILLED_WAIT_S: Final = 10.0
#: Of -1000 … 1000; raising one's own needs no rights.  As if half of the memory more were used.
OOM_SCORE: Final = 500
# One below what llama.cpp calls them: it warns of each prompt that it has cached, and takes a request
# that it refuses for an error.  Why it ended is told by the log's tail.
_LEVELS: Final = {"W": logging.INFO, "E": logging.WARNING}
_logger: Final = logging.getLogger("arriero.engine")


class EngineChild:
    """One engine process; made by `start`."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        hidden: tuple[str, ...],
        on_log: Callable[[str], None] | None,
    ) -> None:
        self._process = process
        self._on_log = on_log
        self._hidden = hidden
        self._log: collections.deque[str] = collections.deque(maxlen=LOG_LINES_KEPT)
        self._is_stopping = False
        self._cgroup = cgroups.memory_cgroup(process.pid)
        self._oom_kills_before = self._oom_kills()
        self._exit: asyncio.Future[EngineExit] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        module: str,
        line: bytes,
        *,
        env: Mapping[str, str],
        on_line: Callable[[bytes], None],
        on_log: Callable[[str], None] | None = None,
        hidden: tuple[str, ...] = (),
    ) -> "EngineChild":
        """Start `python -m module`, hand it `line`, and return at once.

        `on_line` gets each line of its stdout, `on_log` each of its log, which is kept and goes to
        the logger "arriero.engine" as well.  Texts in `hidden` (folders) are cut out of the log.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **env},
            cwd="/",
            # Its own session: Ctrl-C in the worker's terminal is the worker's to handle.
            start_new_session=True,
        )
        _be_first_victim(process.pid)
        child = cls(process, hidden, on_log)
        # Owned by this object: it ends with the process, and `stop` waits for it.
        child._watcher = asyncio.get_running_loop().create_task(
            child._watch(on_line), name=f"engine-{process.pid}"
        )
        assert process.stdin is not None
        process.stdin.write(line)
        return child

    @property
    def pid(self) -> int:
        """Its pid."""
        return self._process.pid

    def log_tail(self, lines: int = LOG_LINES_KEPT) -> tuple[str, ...]:
        """Return the last lines of its log."""
        return tuple(self._log)[-lines:]

    def memory_mb(self) -> int:
        """Return its resident memory in MiB; 0 once it is gone."""
        return resident_mb(self.pid) if self._process.returncode is None else 0

    def exited(self) -> EngineExit | None:
        """Return how it ended by itself; None while it lives, and when we stopped it."""
        return self._exit.result() if self._exit.done() else None

    async def wait_exited(self) -> EngineExit:
        """Wait until it ends by itself; never returns when we stop it."""
        return await asyncio.shield(self._exit)

    async def wait_ended(self, timeout_s: float) -> bool:
        """Wait until it has ended, by itself or not, and its log is read; False after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self, grace_s: float) -> None:
        """End it: close its stdin, wait `grace_s`, SIGTERM, SIGKILL.  Safe to call twice.

        Also when the caller is cancelled, the process is killed before this returns.
        """
        self._is_stopping = True
        try:
            if self._process.stdin is not None:
                self._process.stdin.close()
            if grace_s > 0 and not await self.wait_ended(grace_s):
                self._signal(signal.SIGTERM)
                await self.wait_ended(_TERMINATE_WAIT_S)
        finally:
            self._signal(signal.SIGKILL)
        await self.wait_ended(_KILLED_WAIT_S)

    def kill(self) -> None:
        """Kill it at once, as our own doing; `stop` afterwards reaps it."""
        self._is_stopping = True
        self._signal(signal.SIGKILL)

    def crash(self) -> None:
        """Kill it as an accident: it then counts as ended by itself (the fake engine's knob)."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        # Not yet reaped means that the pid is still its own.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _watch(self, on_line: Callable[[bytes], None]) -> None:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_lines(self._process.stdout, on_line), name="engine-stdout")
                group.create_task(_lines(self._process.stderr, self._keep), name="engine-stderr")
            code = await self._process.wait()
        finally:
            self._signal(signal.SIGKILL)
            self._ended.set()
        if not self._is_stopping and not self._exit.done():
            self._exit.set_result(self._how_it_ended(code))

    def _how_it_ended(self, code: int) -> EngineExit:
        was_killed = code == -signal.SIGKILL
        return EngineExit(
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            is_out_of_memory=was_killed and self._oom_kills() > self._oom_kills_before,
            log_tail=self.log_tail(),
        )

    def _oom_kills(self) -> int:
        return cgroups.oom_kill_count(self._cgroup) if self._cgroup is not None else 0

    def _keep(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace")
        for folder in self._hidden:
            text = text.replace(folder, "")
        self._log.append(text)
        if self._on_log is not None:
            self._on_log(text)
        # llama.cpp: "0.00.011.704 I srv  init: …"
        words = text.split(maxsplit=2)
        _logger.log(_LEVELS.get(words[1] if len(words) > 1 else "", logging.DEBUG), "%s", text)


def resident_mb(pid: int) -> int:
    """Return the resident memory of a process in MiB; 0 if there is none."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") >> 20
    except (OSError, IndexError, ValueError):
        pass
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss) >> 20
    except psutil.Error:
        return 0


async def _lines(stream: asyncio.StreamReader, take: Callable[[bytes], None]) -> None:
    """Hand each line to `take`; one longer than 64 KiB comes in pieces."""
    rest = b""
    while chunk := await stream.read(_READ_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            take(line)
        if len(rest) > LINE_BYTES_MAX:
            take(rest)
            rest = b""
    if rest:
        take(rest)


def _be_first_victim(pid: int) -> None:
    """Have the kernel choose the engine when memory is short, so that its worker lives on to say so."""
    with contextlib.suppress(OSError):  # Not Linux, or gone already.
        Path(f"/proc/{pid}/oom_score_adj").write_text(str(OOM_SCORE))
