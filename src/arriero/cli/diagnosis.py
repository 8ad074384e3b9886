"""What would keep arriero from working on this machine?  Each check looks at one thing."""

import contextlib
import ctypes
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from arriero.cli import launch
from arriero.contracts.errors import ArrieroError
from arriero.contracts.version import __version__
from arriero.runtime import settings as settings_
from arriero.runtime import state_dir
from arriero.runtime.processes import is_alive
from arriero.runtime.settings import Settings
from arriero.runtime.state_dir import StateDir

if TYPE_CHECKING:
    from arriero.agent.engine_builds import FoundBuild
    from arriero.contracts.records import DeviceRecord
    from arriero.domain.engine_builds import Platform

Level = Literal["ok", "warn", "fail"]
_MIB: Final = 1024 * 1024
_DISK_WARN_MB: Final = 10_000
_DISK_FAIL_MB: Final = 500
_RAM_WARN_MB: Final = 2_000
_FILES_WARN: Final = 1024
_ENGINE_TIMEOUT_S: Final = 30.0
_PYTHON_MIN: Final = (3, 11)
#: Imported in a process of its own: a wheel for another processor ends it with a signal.
_ENGINE_SCRIPT: Final = "import importlib.metadata as m, xllamacpp; print(m.version('xllamacpp'))"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What one check found."""

    name: str
    level: Level
    message: str
    #: What to do about it; empty where it is well.
    advice: str = ""


def _ok(name: str, message: str) -> Finding:
    return Finding(name=name, level="ok", message=message)


def _warn(name: str, message: str, advice: str) -> Finding:
    return Finding(name=name, level="warn", message=message, advice=advice)


def _fail(name: str, message: str, advice: str) -> Finding:
    return Finding(name=name, level="fail", message=message, advice=advice)


def examine(state: StateDir) -> Iterator[Finding]:
    """Yield what each check finds; none of them changes anything, or raises."""
    found = Settings()
    try:
        found = settings_.load()
    except ArrieroError as error:
        yield _fail("settings", error.message, error.advice)
    else:
        yield _ok("settings", "valid")
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        ("libgomp", _libraries),
        ("engine", _engine),
        ("home", lambda: _home(state)),
        ("disk", lambda: _disk(state)),
        ("devices", _devices),
        ("engine build", lambda: _engine_builds(state, found.backend)),
        ("sockets", _sockets),
        ("open files", _open_files),
        ("port", lambda: _port(state, "orchestrator", found.orchestrator_host, found.orchestrator_port)),
        ("port", lambda: _port(state, "agent", "127.0.0.1", found.agent_port)),
        ("worker ports", lambda: _worker_ports(found)),
        ("orchestrator", lambda: _daemon(state, "orchestrator")),
        ("agent", lambda: _daemon(state, "agent")),
        ("worker", lambda: _orphans(state)),
    ]
    for name, check in checks:
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001 - A broken installation is what is looked for.
            yield _fail(name, f"the check broke: {type(error).__name__}: {error}", "Install arriero again.")


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    shown = f"{version} on {platform.system()} {platform.machine()}, arriero {__version__}"
    if sys.version_info[:2] < _PYTHON_MIN:
        yield _fail("python", shown, "Install Python 3.11 or newer.")
    else:
        yield _ok("python", shown)


def _libraries() -> Iterator[Finding]:
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        advice = "Install it: libgomp1 (Debian, Ubuntu), libgomp (Fedora), gcc-libs (Arch)."
        yield _fail("libgomp", "libgomp.so.1 is missing, the engine needs it", advice)
    else:
        yield _ok("libgomp", "there")


def _engine() -> Iterator[Finding]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ENGINE_SCRIPT],
            capture_output=True, text=True, timeout=_ENGINE_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        advice = "Is the machine overloaded, or the disk very slow?"
        yield _fail("engine", f"xllamacpp was not imported within {_ENGINE_TIMEOUT_S:g} s", advice)
        return
    if done.returncode == 0:
        yield _ok("engine", f"llama.cpp by xllamacpp {done.stdout.strip()}")
    else:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        yield _fail("engine", f"xllamacpp cannot be imported: {last}", "Install arriero again.")


def _engine_builds(state: StateDir, backend: str) -> Iterator[Finding]:
    from arriero.agent import engine_builds
    from arriero.runtime import devices

    found = devices.read().devices
    if backend == "cpu":
        # Somebody chose it: nothing is missing then.
        found = tuple(device for device in found if device.backend == "cpu")
    yield from judge_builds(engine_builds.look(state.home), engine_builds.this_platform(), found)


def judge_builds(
    builds: "Sequence[FoundBuild]", this: "Platform", devices: "Sequence[DeviceRecord]"
) -> Iterator[Finding]:
    """Yield what is to be said of the engine's builds on a machine with these devices."""
    from arriero.domain import engine_builds as choice

    wanted = choice.wanted_build(this, devices)
    sentences = choice.advice([build.view for build in builds], wanted, devices)
    for sentence in sentences:
        advice = wanted.obstacle or f"`{choice.install_command()}`, or ask for `--backend cpu`."
        yield _fail("engine build", sentence, advice)
    for build in builds:
        if build.record.problem and not build.record.is_own:
            shown = f"{build.record.name} {build.record.version}: {build.record.problem}"
            yield _warn("engine build", shown, f"`arriero engines install {build.record.name}`.")
    if not sentences:
        shown = ", ".join(
            f"{b.record.name} ({', '.join(b.record.backends)})" for b in builds if not b.record.problem
        )
        yield _ok("engine build", f"{shown}; {wanted.name} suits this machine")


def _home(state: StateDir) -> Iterator[Finding]:
    path = _existing(state.home)
    if not path.is_dir():
        yield _fail("home", f"{path} is no folder", "Set ARRIERO_HOME to another folder.")
        return
    try:
        state_dir.probe_writable(path)
    except OSError as error:
        advice = "Correct its rights, or set ARRIERO_HOME to another folder."
        yield _fail("home", f"{path} cannot be written: {error.strerror}", advice)
    else:
        yield _ok("home", str(state.home))


def _disk(state: StateDir) -> Iterator[Finding]:
    try:
        # The models folder may be a disk of its own.
        free_mb = shutil.disk_usage(_existing(state.models)).free // _MIB
    except OSError as error:
        yield _fail("disk", f"cannot be asked: {error.strerror}", "Check ARRIERO_HOME.")
        return
    shown = f"{free_mb / 1024:.1f} GiB free for models"
    if free_mb < _DISK_FAIL_MB:
        yield _fail("disk", shown, "Free some space, or move ARRIERO_HOME to a larger disk.")
    elif free_mb < _DISK_WARN_MB:
        yield _warn("disk", shown, "Enough for small models; free some space for larger ones.")
    else:
        yield _ok("disk", shown)


def _devices() -> Iterator[Finding]:
    from arriero.runtime import devices

    memory = devices.memory()
    limit = ", limited by a cgroup" if memory.is_limited_by_cgroup else ""
    shown = f"{memory.free_mb / 1024:.1f} of {memory.total_mb / 1024:.1f} GiB free{limit}"
    if memory.free_mb < _RAM_WARN_MB:
        yield _warn("memory", shown, "Models of more than this do not fit; stop something.")
    else:
        yield _ok("memory", shown)
    report = devices.read()
    for device in report.devices:
        free = f"{device.memory_free_mb / 1024:.1f} of {device.memory_mb / 1024:.1f} GiB free"
        yield _ok(f"device {device.id}", f"{device.name}, {free}")
    for problem in report.problems:
        yield _warn("devices", problem, "Check the driver; nothing falls back to the CPU by itself.")


def _sockets() -> Iterator[Finding]:
    try:
        folder = state_dir.short_dir()
    except (ArrieroError, OSError) as error:
        yield _fail("sockets", f"no private folder for sockets: {error}", "Remove what stands in its place.")
    else:
        yield _ok("sockets", str(folder))


def _open_files() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FILES_WARN:
        yield _warn("open files", f"limited to {soft}", f"Raise it: ulimit -n {_FILES_WARN} or more.")


def _port(state: StateDir, role: str, host: str, port: int) -> Iterator[Finding]:
    name = f"port {port}"
    if port == 0:
        yield _ok(f"{role} port", "any free one")
        return
    record = state.running(role)
    if record is not None and record.url.endswith(f":{port}"):
        yield _ok(name, f"ours: the {role}")
    elif problem := _taken(host, port):
        advice = f"Stop what uses it, or choose another: ARRIERO_{role.upper()}_PORT (0 takes a free one)."
        # Whoever runs on another port is not in anybody's way.
        yield (_warn if record is not None else _fail)(name, f"{problem}, the {role} wants it", advice)
    else:
        yield _ok(name, f"free for the {role}")


def _worker_ports(found: Settings) -> Iterator[Finding]:
    from arriero.runtime.serve import PORTS_TRIED_MAX

    base = found.worker_port_base
    for port in range(base, min(base + PORTS_TRIED_MAX, 65536)):
        if not _taken("127.0.0.1", port):
            yield _ok("worker ports", f"{port} and up")
            return
    advice = "Choose others: ARRIERO_WORKER_PORT_BASE."
    yield _fail("worker ports", f"{base} and the {PORTS_TRIED_MAX - 1} after it are taken", advice)


def _taken(host: str, port: int) -> str:
    """Return why a port cannot be listened on; empty if it can."""
    from arriero.runtime.serve import bind

    try:
        bind(host, port).close()
    except ArrieroError as error:
        return error.message
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _daemon(state: StateDir, role: str) -> Iterator[Finding]:
    record = state.running(role)
    if record is None:
        if state.recorded(role) is not None:
            yield _warn(role, "died without cleaning up", "`arriero down` cleans up, `arriero up` starts it.")
        else:
            yield _ok(role, "not running")
    elif not launch.answers(role, record):
        advice = f"Look at its log ({state.log_file(role)}); `arriero down` ends it."
        yield _fail(role, f"runs (pid {record.pid}) and does not answer at {record.url}", advice)
    elif record.version != __version__:
        shown = f"runs {record.version}, installed is {__version__}"
        yield _warn(role, shown, "Start it again: `arriero down`, `arriero up`.")
    else:
        yield _ok(role, f"answers at {record.url}")


def _orphans(state: StateDir) -> Iterator[Finding]:
    if state.running("agent") is not None:
        return
    for run in state.worker_runs():
        if is_alive(state_dir.worker_identity(run)):
            shown = f"{run.record.worker_id} (pid {run.record.pid}) runs without an agent"
            yield _warn("worker", shown, "`arriero up` adopts it, `arriero down` ends it.")


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    for candidate in (path, *path.parents):
        with contextlib.suppress(OSError):
            if candidate.exists():
                return candidate
    return Path("/")
