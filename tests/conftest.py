"""What holds around every test: nothing may remain."""

import asyncio
import functools
import inspect
import signal
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

from arriero.runtime.state_dir import StateDir

# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

#: Zombies whose parent is pid 1 may take seconds to go.
PATIENCE_S = 30.0
#: Of each daemon's log, with a test that failed.
WARNINGS_MAX = 40

# A shell that starts a run in the background has it ignore Ctrl-C, and what the run starts inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
#: Modules that take longest: all of each with one worker, whose set-up is made once, and first of all.
LONG = ("test_three_hosts", "test_nodes", "test_machines", "test_machine_faults", "test_nodes_told")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that nobody waits for it at the end."""
    ranks = {name: rank for rank, name in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(LONG)))


def _remaining(before: dict[str, str]) -> list[str]:
    return [told for name, told in _belongings().items() if name not in before]


def _belongings() -> dict[str, str]:
    """Return our child processes and open sockets, as text, by what does not change about them."""
    found = {}
    me = psutil.Process()
    for child in me.children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE:
                told = f"process {child.pid} {' '.join(child.cmdline())[:120]}"
                # sshd has its title tell how many are logging in.
                found[f"process {child.pid}"] = told
        except psutil.Error:
            continue
    if Path("/proc/self/fd").is_dir():
        for link in Path("/proc/self/fd").iterdir():
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if target.startswith("socket:") or (target.startswith("/") and not target.startswith("/dev/")):
                found[f"file {link.name} {target}"] = f"file {link.name} {target}"
    return found


@pytest.fixture(autouse=True)
def nothing_remains(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process, a socket or an open file behind."""
    path = str(request.path)
    if "/unit/" in path:
        yield
        return
    before = _belongings()
    yield
    deadline = time.monotonic() + PATIENCE_S
    while (left := _remaining(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, f"left behind: {sorted(left)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show, with a test that failed, what the daemons of its pools warned of."""
    report = yield
    if report.failed and isinstance(item, pytest.Function):
        for name, value in item.funcargs.items():
            state = getattr(value, "state", None)
            if isinstance(state, StateDir):
                report.sections.append((f"what the daemons of {name!r} warned of", _warnings(state)))
    return report


def _warnings(state: StateDir) -> str:
    found = []
    # Daemons that a test starts itself write beside the folder, others into it.
    for path in sorted(state.home.parent.rglob("*")):
        if path.suffix in (".out", ".log") and path.is_file():
            lines = path.read_text("utf-8", "replace").splitlines()
            told = [line for line in lines if '"level":"info"' not in line and line.strip()]
            found += [f"{path.name}: {line}" for line in told[-WARNINGS_MAX:]]
    return "\n".join(found)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail an async test that leaves a task running."""
    if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
        item.obj = _checked(item.obj)
    return (yield)


def _checked(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(test)
    async def run(**arguments: Any) -> None:
        before = asyncio.all_tasks()
        await test(**arguments)
        left = {task for task in asyncio.all_tasks() - before if not task.done()}
        if left:
            await asyncio.wait(left, timeout=10)
        assert not {task for task in left if not task.done()}, f"tasks left running: {left}"

    return run
