"""Which builds of the engine are on this machine, and which of them computes on what?

Beside the one of arriero's own environment they lie in `ARRIERO_HOME/engines/BUILD-VERSION/`: the
package in `site/`, and what is known of it in `build.json`.  Those of another version than the
environment's are shown and not used.
"""

import contextlib
import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from arriero.contracts.errors import ErrorCode, fail
from arriero.contracts.records import DeviceRecord, EngineBuild, EngineList
from arriero.domain import engine_builds as choice
from arriero.domain.engine_builds import BuildView, Platform, WantedBuild
from arriero.domain.preflight import PREFERENCE
from arriero.engines.llamacpp_backends import EngineAnswer, EngineDevice, ask
from arriero.runtime import state_dir

PACKAGE: Final = "xllamacpp"
FOLDER_NAME: Final = "engines"
SITE: Final = "site"
RECORD_NAME: Final = "build.json"
#: What is not finished, or about to go, begins so; it is no build.
NEW_PREFIX: Final = ".new-"
OLD_PREFIX: Final = ".old-"


class BuildFile(msgspec.Struct, frozen=True, kw_only=True):
    """`build.json`: what is known of an installed build."""

    name: str
    #: The wheel's, with its local label.
    version: str
    sha256: str
    wheel: str
    installed_unix: float


@dataclass(frozen=True, slots=True)
class FoundBuild:
    """A build that is here, with what it answered when it was asked."""

    record: EngineBuild
    devices: tuple[EngineDevice, ...]
    #: Folder that Python imports it from; None: arriero's own environment.
    site: Path | None = None

    @property
    def view(self) -> BuildView:
        """The build as a choice sees it."""
        record = self.record
        return BuildView(record.name, tuple(record.backends), record.is_own, record.problem)


def this_platform() -> Platform:
    """Return what builds for this machine have to be made for."""
    name, version = platform.libc_ver()
    parts = version.split(".")
    glibc = (int(parts[0]), int(parts[1])) if name == "glibc" and len(parts) >= 2 else None
    arch = platform.machine().lower()
    return Platform(
        os=platform.system().lower(),
        arch={"amd64": "x86_64"}.get(arch, arch),
        python=(sys.version_info[0], sys.version_info[1]),
        glibc=glibc,
    )


def engine_version() -> str:
    """Return the version that every build must have: that of the environment; empty if it has none."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return ""


def folder_of(home: Path) -> Path:
    """Return the folder of the builds of a state folder."""
    return home / FOLDER_NAME


def look(home: Path) -> tuple[FoundBuild, ...]:
    """Return all builds, each asked in a process of its own; blocks for some seconds."""
    return (_own(), *(_installed(site, known) for site, known in files(home)))


def files(home: Path) -> list[tuple[Path, BuildFile]]:
    """Return what was installed beside the environment's own build, with the folder it is imported from."""
    found = []
    for path in sorted(folder_of(home).glob(f"*/{RECORD_NAME}")):
        known = state_dir.read(path, BuildFile)
        if known is not None and not path.parent.name.startswith("."):
            found.append((path.parent / SITE, known))
    return found


def tidy(home: Path) -> None:
    """Remove what an installation that was killed left, and bring back the build it was replacing."""
    folder = folder_of(home)
    for path in folder.glob(f"{OLD_PREFIX}*"):
        name = path.name.removeprefix(OLD_PREFIX)
        if not (folder / name).exists():
            with contextlib.suppress(OSError):
                path.rename(folder / name)
    for path in folder.glob(".*"):
        shutil.rmtree(path, ignore_errors=True)


def listed(
    node: str, builds: Sequence[FoundBuild], wanted: WantedBuild, devices: Sequence[DeviceRecord]
) -> EngineList:
    """Return the answer of `GET /v1/engines`."""
    return EngineList(
        node=node,
        builds=[build.record for build in builds],
        wanted=wanted.name,
        why=wanted.why,
        driver_least=wanted.driver_least,
        advice=choice.advice([build.view for build in builds], wanted, devices, node=node),
    )


def site_for(backend: str, builds: Sequence[FoundBuild], wanted: str) -> Path | None:
    """Return the folder of the build that computes on `backend`; None: the environment's own."""
    chosen = choice.build_for(backend, [build.view for build in builds], wanted)
    if chosen is None:
        return None
    return next(build.site for build in builds if build.view == chosen)


def refuse_unusable(build: EngineBuild, answer: EngineAnswer, devices: Sequence[DeviceRecord]) -> None:
    """Raise BACKEND_UNAVAILABLE for a build that loads and does not see the card it is made for."""
    backend = choice.backend_of(build.name)
    has = next((device for device in devices if device.backend == backend), None)
    if has is None or any(device.backend == backend for device in answer.devices):
        return
    driver = f" with driver {has.driver}" if has.driver else ""
    fail(
        ErrorCode.BACKEND_UNAVAILABLE,
        f"the build {build.name} loads, and does not see {has.name}{driver}",
        build=build.name,
        backend=backend,
        suggested_action="Check the driver (`arriero doctor`); `arriero engines list` shows what suits it.",
    )


def described(
    name: str, version: str, answer: EngineAnswer, *, is_own: bool = False, sha256: str = "",
    installed_unix: float = 0.0,
) -> EngineBuild:  # fmt: skip
    """Return a build's record from what it answered."""
    backends = {device.backend for device in answer.devices}
    return EngineBuild(
        name=name,
        version=version,
        is_own=is_own,
        backends=[backend for backend in PREFERENCE if backend in backends],
        devices=[f"{device.backend}:{device.number} {device.name}" for device in answer.devices],
        sha256=sha256,
        installed_unix=installed_unix,
        problem=answer.problem,
    )


def _own() -> FoundBuild:
    version = engine_version()
    answer = ask() if version else EngineAnswer(problem=f"the package {PACKAGE} is not installed")
    backends = {device.backend for device in answer.devices}
    name = next((backend for backend in PREFERENCE if backend in backends), choice.CPU)
    return FoundBuild(described(name, version, answer, is_own=True), answer.devices)


def _installed(site: Path, known: BuildFile) -> FoundBuild:
    version = engine_version()
    if known.version.partition("+")[0] != version.partition("+")[0]:
        answer = EngineAnswer(
            problem=f"is of version {known.version}, arriero needs {version}: install it anew"
        )
    else:
        answer = ask(site)
    record = described(
        known.name, known.version, answer, sha256=known.sha256, installed_unix=known.installed_unix
    )
    return FoundBuild(record, answer.devices, site)
