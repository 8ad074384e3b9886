"""How is pip run, so that it does what is asked and nothing that a person's configuration adds?"""

import asyncio
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from arriero.contracts.errors import ErrorCode, fail
from arriero.runtime import pip_wheel, processes
from arriero.runtime.clock import Clock

#: Between two looks at how far it is.
LOOK_S: Final = 0.3
#: Nothing new on the disk for so long: pip itself gives an index up after some 50 s.
STALL_S: Final = 120.0
TOTAL_S: Final = 7200.0
#: How the network is reached is the machine's to say; what is fetched, and where to, is ours.
_KEPT: Final = frozenset(
    {"PIP_CERT", "PIP_CLIENT_CERT", "PIP_PROXY", "PIP_TRUSTED_HOST", "PIP_KEYRING_PROVIDER"}
)
_OUTPUT_LINES_KEPT: Final = 30
#: An agent that is killed takes its pip along: nothing may write where the next one tidies up.
_RUN_PIP: Final = (
    "import runpy, sys; from arriero.runtime.parent_death import die_with; "
    "die_with(int(sys.argv.pop(1))) or sys.exit('the agent is gone'); "
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)"
)


@dataclass(frozen=True, slots=True)
class PipDone:
    """How a run of pip ended."""

    code: int
    #: The last lines of what it wrote.
    lines: tuple[str, ...]

    def has(self, *texts: str) -> bool:
        """Return whether one of `texts` is in its last lines."""
        return any(text in line for text in texts for line in self.lines)


def index_configuration(index_url: str) -> str:
    """Return a configuration by which pip looks into one index and nowhere else.

    The address goes this way, and not on the command line, since it may hold a password.
    """
    # An empty value takes away what another file says; a command's own section counts over [global].
    section = f"index-url = {index_url}\nextra-index-url =\nfind-links =\n"
    return f"[global]\n{section}\n[download]\n{section}"


def environment(
    env: Mapping[str, str], *, configuration: Path | None, scratch: Path, wheel: Path | None = None
) -> dict[str, str]:
    """Return pip's environment: ours, but what it would change of its work; `wheel`: it runs from there."""
    kept = {name: value for name, value in env.items() if not name.startswith("PIP_") or name in _KEPT}
    return {
        **kept,
        "PIP_CONFIG_FILE": os.fspath(configuration) if configuration is not None else os.devnull,
        "TMPDIR": os.fspath(scratch),
        **({} if wheel is None else {"PYTHONPATH": _joined(os.fspath(wheel), kept.get("PYTHONPATH", ""))}),
    }


def _joined(*paths: str) -> str:
    return os.pathsep.join(path for path in paths if path)


async def run(
    arguments: Sequence[str], *, scratch: Path, configuration: Path | None, clock: Clock,
    tell: Callable[[int], None],
) -> PipDone:  # fmt: skip
    """Run `pip …`, telling the bytes below `scratch` as they grow; killed when cancelled.

    Raises INSTALL_FAILED when it comes no further.
    """
    # An environment that another arriero made here has none of its own.
    has_pip = importlib.util.find_spec("pip") is not None
    wheel = None if has_pip else await asyncio.to_thread(pip_wheel.find)
    output = scratch / "pip.log"
    with output.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-c", _RUN_PIP, str(os.getpid()),
            "--disable-pip-version-check", "--no-input", "--no-color", *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, cwd="/", start_new_session=True,
            env=environment(os.environ, configuration=configuration, scratch=scratch, wheel=wheel),
        )  # fmt: skip
    try:
        code = await _followed(process, scratch, clock, tell)
    finally:
        if process.returncode is None:
            processes.signal_group(process.pid, signal.SIGKILL)
            await process.wait()
    return PipDone(code, tuple(await asyncio.to_thread(processes.tail, output, _OUTPUT_LINES_KEPT)))


async def _followed(
    process: asyncio.subprocess.Process, scratch: Path, clock: Clock, tell: Callable[[int], None]
) -> int:
    begun_s = moved_s = clock.monotonic_s()
    seen = -1
    while True:
        try:
            async with asyncio.timeout(LOOK_S):
                return await process.wait()
        except TimeoutError:
            size = await asyncio.to_thread(_size_below, scratch)
            now_s = clock.monotonic_s()
            if size != seen:
                seen, moved_s = size, now_s
                tell(size)
            if now_s - moved_s > STALL_S or now_s - begun_s > TOTAL_S:
                limit_s = STALL_S if now_s - moved_s > STALL_S else TOTAL_S
                fail(ErrorCode.INSTALL_FAILED, f"pip came no further within {limit_s:g} s", limit_s=limit_s)


def _size_below(folder: Path) -> int:
    size = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(base, name)).st_size  # noqa: PTH118  Thousands of them.
            except FileNotFoundError:
                continue
    return size
