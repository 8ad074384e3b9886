"""Can arriero be installed on a machine, and with what?"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from arriero.contracts.errors import ErrorCode, fail
from arriero.contracts.events import NodeStep
from arriero.fabrics.base import Connection
from arriero.orchestrator.machines.there import PYTHON_PLACES, Look, ask, look
from arriero.runtime.clock import Clock

Tell: TypeAlias = Callable[[NodeStep], None]

SYSTEMS: Final = {"Linux": "Linux", "Darwin": "macOS"}
MACHINES: Final = frozenset({"x86_64", "aarch64", "arm64"})
#: An environment takes 190 MB (measured on Linux); its wheels 60 MB where they are carried, and twice that
#: for as long as they come from an index.
DISK_NEEDED_MB: Final = 400
SURVEY_TIMEOUT_S: Final = 60.0
#: Beyond this, people take one machine's log times for the other's and are misled.
CLOCK_SKEW_TOLD_S: Final = 30.0
_LATENCY_RUNS: Final = 3
_LATENCY_TIMEOUT_S: Final = 10.0
#: Which package has a system library that the engine needs.
_LIBRARIES: Final = {"libgomp.so.1": "libgomp1 (Debian, Ubuntu), libgomp (Fedora), gcc-libs (Arch)"}


@dataclass(frozen=True, slots=True)
class Survey:
    """What a machine is and has, as far as an installation needs to know."""

    #: As `uname` says: Linux or Darwin; x86_64, aarch64 or arm64.
    system: str
    machine: str
    system_version: str
    #: "glibc 2.36", "musl 1.2.4"; empty elsewhere than on Linux.
    libc: str
    python: str
    python_version: tuple[int, int, int]
    #: Absolute.
    install_path: str
    disk_free_mb: int
    hostname: str = ""
    #: For people; empty if there is none.
    gpu: str = ""
    #: Their clock less ours.
    clock_skew_s: float = 0.0
    latency_ms: float = 0.0
    #: The environment that `current` points to, and all that are whole, the newest last.
    current: str | None = None
    environments: tuple[str, ...] = ()
    #: What the conditions in a lock ask for.
    markers: dict[str, str] = field(default_factory=dict)


async def survey(
    connection: Connection,
    install_path: str,
    tell: Tell,
    *,
    clock: Clock,
    places: Sequence[str] = PYTHON_PLACES,
) -> Survey:
    """Return what a machine is and has; each thing is told, and nothing is left there.

    Raises PLATFORM_UNSUPPORTED, PYTHON_NOT_FOUND, PYTHON_TOO_OLD, INSTALL_PATH_UNUSABLE,
    PACKAGE_UNAVAILABLE (a system library), SSH_COMMAND_FAILED, NODE_UNREACHABLE.
    """
    seen = await look(connection, places)
    tell(NodeStep(step="command", message="a command runs there"))
    _check_platform(seen)
    python = seen.best()
    before_s = clock.wall_s()
    facts = await ask(
        connection, python.path, "survey", timeout_s=SURVEY_TIMEOUT_S, install_path=install_path
    )
    after_s = clock.wall_s()
    libc = f", {facts['libc']}" if facts["libc"] else ""
    system = f"{SYSTEMS[seen.system]} {facts['system_version']}"
    tell(NodeStep(step="system", message=f"{system} on {seen.machine}{libc}"))
    _check_libraries(facts["missing_libraries"])
    tell(NodeStep(step="python", message=f"Python {python} at {python.path}"))
    _check_path(facts)
    free_mb = facts["disk_free_mb"]
    tell(NodeStep(step="disk", message=_disk_told(free_mb, facts["install_path"])))
    tell(NodeStep(step="gpu", message=facts["gpu"] or "no GPU that arriero knows: models run on the CPU"))
    # Their program reads its clock between our two looks at ours: what may lie in between is no skew.
    skew_s = max(facts["unix"] - after_s, 0.0) + min(facts["unix"] - before_s, 0.0)
    tell(NodeStep(step="clock", message=_clock_told(skew_s)))
    latency_ms = await _latency_ms(connection, clock)
    tell(NodeStep(step="latency", message=f"a command takes {latency_ms:.0f} ms"))
    return Survey(
        system=seen.system,
        machine=seen.machine,
        system_version=facts["system_version"],
        libc=facts["libc"],
        python=python.path,
        python_version=python.version,
        install_path=facts["install_path"],
        disk_free_mb=free_mb,
        hostname=facts["hostname"],
        gpu=facts["gpu"],
        clock_skew_s=skew_s,
        latency_ms=latency_ms,
        current=facts["current"],
        environments=tuple(facts["environments"]),
        markers=facts["markers"],
    )


def _check_platform(seen: Look) -> None:
    if seen.system not in SYSTEMS or seen.machine not in MACHINES:
        named = f"{seen.system or 'an unknown system'} on {seen.machine or 'an unknown processor'}"
        fail(
            ErrorCode.PLATFORM_UNSUPPORTED,
            f"{named}: arriero runs on Linux and macOS, on x86_64, aarch64 and arm64",
            system=seen.system,
            machine=seen.machine,
        )


def _check_libraries(missing: Sequence[str]) -> None:
    if missing:
        fail(
            ErrorCode.PACKAGE_UNAVAILABLE,
            f"the system library {missing[0]} is missing there, the engine needs it",
            package=missing[0],
            suggested_action=f"install the system package {_LIBRARIES.get(missing[0], missing[0])} there",
        )


def _check_path(facts: dict[str, Any]) -> None:
    if facts["path_problem"]:
        fail(ErrorCode.INSTALL_PATH_UNUSABLE, facts["path_problem"], install_path=facts["install_path"])


def check_disk(found: Survey) -> None:
    """Know that there is room for one more environment; beside an old one it needs the same again.

    Raises INSUFFICIENT_DISK.
    """
    if found.disk_free_mb < DISK_NEEDED_MB:
        fail(
            ErrorCode.INSUFFICIENT_DISK,
            f"an installation needs {DISK_NEEDED_MB} MB, {found.install_path} has "
            f"{found.disk_free_mb} MB free",
            required_mb=DISK_NEEDED_MB,
            available_mb=found.disk_free_mb,
            suggested_action="make room there, or give another folder with --install-path",
        )


def _disk_told(free_mb: int, path: str) -> str:
    if free_mb < DISK_NEEDED_MB:
        return f"warning: {free_mb} MB free at {path}: an installation needs {DISK_NEEDED_MB} MB"
    return f"{free_mb / 1024:.1f} GiB free at {path}"


def _clock_told(skew_s: float) -> str:
    if abs(skew_s) < 1:
        return "its clock agrees with ours"
    way = "ahead of" if skew_s > 0 else "behind"
    told = f"its clock is {abs(skew_s):.0f} s {way} ours"
    if abs(skew_s) > CLOCK_SKEW_TOLD_S:
        told = f"warning: {told}: times in its logs will mislead; set up NTP there"
    return told


async def _latency_ms(connection: Connection, clock: Clock) -> float:
    taken = []
    for _ in range(_LATENCY_RUNS):
        before_s = clock.monotonic_s()
        await connection.run(["true"], timeout_s=_LATENCY_TIMEOUT_S)
        taken.append(clock.monotonic_s() - before_s)
    return statistics.median(taken) * 1000
