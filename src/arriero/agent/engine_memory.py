"""What did the agent before know of the builds of the engine?  (`ARRIERO_HOME/engines.json`)

Asking them takes as long as all the rest of an agent's start, and longer where a driver is slow.  An
agent that follows one of the same boot begins with its answers, and asks when it is at work.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from arriero.agent import engine_builds
from arriero.agent.engine_builds import BuildFile, FoundBuild
from arriero.contracts.records import EngineBuild
from arriero.engines.llamacpp_backends import EngineDevice
from arriero.runtime import processes, state_dir


class KnownBuild(msgspec.Struct, frozen=True, kw_only=True):
    """A build with what it answered."""

    record: EngineBuild
    devices: list[EngineDevice]
    #: Folder that Python imports it from; empty: arriero's own environment.
    site: str


class KnownBuilds(msgspec.Struct, frozen=True, kw_only=True):
    """All of them, and where the answers hold: in this boot, for this environment."""

    boot_id: str
    environment: str
    version: str
    builds: list[KnownBuild]


def remember(home: Path, builds: Sequence[FoundBuild]) -> None:
    """Write down, blocking, what the builds answered; a disk that is full is no matter."""
    known = [
        KnownBuild(record=build.record, devices=list(build.devices), site=str(build.site or ""))
        for build in builds
    ]
    boot_id, environment, version = _here()
    with contextlib.suppress(OSError):
        state_dir.write(
            _path(home),
            KnownBuilds(boot_id=boot_id, environment=environment, version=version, builds=known),
        )


def recall(home: Path) -> tuple[FoundBuild, ...] | None:
    """Return, blocking, what the builds answered the agent before; None: they have to be asked.

    So it is after a boot, in another environment, where other builds are installed by now, and where one
    had a problem: that may be gone.
    """
    known = state_dir.read(_path(home), KnownBuilds)
    if known is None or (known.boot_id, known.environment, known.version) != _here():
        return None
    installed = [(str(site), *_which(file)) for site, file in engine_builds.files(home)]
    told = [(build.site, *_which(build.record)) for build in known.builds if build.site]
    if told != installed or any(build.record.problem for build in known.builds):
        return None
    return tuple(
        FoundBuild(build.record, tuple(build.devices), Path(build.site) if build.site else None)
        for build in known.builds
    )


def _which(build: BuildFile | EngineBuild) -> tuple[str, str, str, float]:
    return build.name, build.version, build.sha256, build.installed_unix


def _path(home: Path) -> Path:
    return home / "engines.json"


def _here() -> tuple[str, str, str]:
    return processes.boot_id(), sys.prefix, engine_builds.engine_version()
