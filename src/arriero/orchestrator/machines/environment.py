"""How does a machine get this version of arriero, whole or not at all?"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import NodeStep
from arriero.fabrics.base import Connection
from arriero.orchestrator.machines import carrying, lock, wheel
from arriero.orchestrator.machines.survey import Survey, Tell, check_disk
from arriero.orchestrator.machines.there import ask

PREPARE_TIMEOUT_S: Final = 60.0
#: Beyond the time that the program there allows itself.
MARGIN_S: Final = 180.0
#: Nothing new on the disk there for so long, see `environment_child.PipWatch`; and in all.
BUILD_STALL_S: Final = 120.0
BUILD_TOTAL_S: Final = 7200.0
INDEX_TIMEOUT_S: Final = 25.0
UNDO_TIMEOUT_S: Final = 120.0
#: Somebody waits for a command that was interrupted to end.
UNDO_CANCELLED_S: Final = 30.0
#: A small package of the lock, of pure Python: an index that has it is asked for all.
_ASKED_FOR: Final = "sniffio"


class _PipTold(msgspec.Struct, frozen=True):
    """How far pip is on a machine, as the program there says."""

    gathered: int
    installed: int
    package: str


class _Told(msgspec.Struct, frozen=True):
    told: _PipTold


_TOLD: Final = msgspec.json.Decoder(_Told)


@dataclass(frozen=True, slots=True)
class Source:
    """Where on our machine that comes from which is installed on others."""

    #: Keeps the wheel, its lock, pip and the wheels that are carried.
    dist: Path
    #: The package's folder that the wheel is packed of.
    package: Path
    #: Several machines may be added at a time; what they share is made once.
    turn: asyncio.Lock


@dataclass(frozen=True, slots=True)
class Installation:
    """What is installed on a machine now."""

    tag: str
    version: str
    #: Absolute.
    install_path: str
    #: The Python there that can run our programs.
    python: str
    #: The environment that was the current one before and is not now; None if there was none.
    previous: str | None
    #: False: it was there, and nothing was done.
    is_new: bool
    #: Whether an agent's home was there before, with the models of a node that was removed.
    had_home: bool = True


async def install(
    connection: Connection, survey: Survey, tell: Tell, *, source: Source, carry: bool
) -> Installation:
    """Install `source.package` beside what is there, and make it the current one.

    Raises INSTALL_PATH_UNUSABLE, INSUFFICIENT_DISK, PACKAGE_UNAVAILABLE, INSTALL_FAILED: then what was there
    before stays, and nothing is left if there was nothing; NODE_UNREACHABLE: then the next one goes on.
    """
    path, python = survey.install_path, survey.python
    dist = source.dist
    async with source.turn:
        packed = await asyncio.to_thread(wheel.pack, dist, source.package)
        pip = await asyncio.to_thread(wheel.pack_pip, dist)
    version = packed.version
    if packed.tag == survey.current:
        tell(NodeStep(step="install", message=f"arriero {version} is there already ({packed.tag})"))
        return Installation(packed.tag, version, path, python, None, is_new=False)
    if packed.tag not in survey.environments:
        check_disk(survey)
    try:
        prepared = await ask(connection, python, "prepare", timeout_s=PREPARE_TIMEOUT_S, path=path)
        if packed.tag not in survey.environments:
            own = {
                packed.path.name: packed.path,
                pip.path.name: pip.path,
                "runtime.txt": dist / "runtime.txt",
            }
            await carrying.bring(connection, python, path, own, tell)
        is_carried = await _supply(connection, survey, tell, source, pip.path, packed.tag, carry=carry)
        tell(NodeStep(step="install", message=f"making the environment {packed.tag}"))
        built = await ask(
            connection, python, "build", timeout_s=BUILD_TOTAL_S + MARGIN_S, path=path, tag=packed.tag,
            version=version, wheel=packed.path.name, pip=pip.path.name, carried=is_carried,
            stall_s_of_pip=BUILD_STALL_S, total_s_of_pip=BUILD_TOTAL_S,
            on_line=_progress(len(_packages(survey, source)) + 1, tell),
        )  # fmt: skip
    except ArrieroError as error:
        # What is unreachable cannot be rolled back: the next one goes on there.
        if error.code is not ErrorCode.NODE_UNREACHABLE:
            await _undo(connection, python, path, tell)
        if error.code is ErrorCode.INSTALL_FAILED:
            carrying.check_had(error, _target(survey))
        raise
    except asyncio.CancelledError:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(UNDO_CANCELLED_S):
                await _undo(connection, python, path, tell)
        raise
    tell(NodeStep(step="install", message=f"arriero {version} is installed in {path}"))
    return Installation(
        packed.tag,
        version,
        path,
        python,
        built["previous"],
        is_new=built["is_new"],
        had_home=prepared["has_home"],
    )


async def switch_back(connection: Connection, installation: Installation, tell: Tell) -> None:
    """Make the environment before an installation the current one, and take the new one away.

    Raises INSTALL_FAILED if there was none before; NODE_UNREACHABLE.
    """
    if installation.previous is None:
        raise ArrieroError(ErrorCode.INSTALL_FAILED, "there is no environment to go back to", last_lines=[])
    await ask(
        connection, installation.python, "switch", timeout_s=UNDO_TIMEOUT_S, path=installation.install_path,
        tag=installation.previous, drop=installation.tag,
    )  # fmt: skip
    tell(NodeStep(step="rollback", message=f"back to the environment {installation.previous}"))


async def _supply(
    connection: Connection, survey: Survey, tell: Tell, source: Source, pip: Path, tag: str, *, carry: bool
) -> bool:  # fmt: skip
    """See that the packages can be had there; return whether they were carried."""
    if tag in survey.environments:
        return False
    packages = _packages(survey, source)
    path = survey.install_path
    if not carry:
        asked = next((each for each in packages if each.name == _ASKED_FOR), packages[0])
        has_index = await ask(
            connection, survey.python, "index", timeout_s=INDEX_TIMEOUT_S + MARGIN_S, path=path,
            requirement=asked.line(), pip=pip.name, timeout_s_of_pip=INDEX_TIMEOUT_S,
        )  # fmt: skip
        if has_index:
            tell(NodeStep(step="package", message="its own package index has the packages"))
            return False
        tell(NodeStep(step="package", message="it has no package index: the packages are carried"))
    async with source.turn:
        found = await carrying.fetch(source.dist / "wheels", pip, packages, _target(survey), tell)
    await carrying.bring(
        connection, survey.python, path, {f"wheels/{each.name}": each for each in found}, tell
    )
    return True


def _target(survey: Survey) -> lock.Target:
    return lock.Target(
        survey.system, survey.machine, survey.libc, survey.system_version, survey.python_version
    )


def _packages(survey: Survey, source: Source) -> list[lock.Pinned]:
    """Return what the machine needs besides our own package."""
    return lock.needed(lock.parse(wheel.lock_text(source.package)), survey.markers)


def _progress(total: int, tell: Tell) -> Callable[[bytes], None]:
    """Return what tells how far pip is there: first it gets hold of all packages, then it unpacks them."""

    furthest = 0.0

    def hear(line: bytes) -> None:
        nonlocal furthest
        try:
            told = _TOLD.decode(line).told
        except msgspec.DecodeError:
            # The answer, or what else the machine has to say.
            return
        gathered, installed = (min(max(count, 0), total) for count in (told.gathered, told.installed))
        message = f"{installed} of {total} packages are in place"
        if not installed:
            message = f"{gathered} of {total} packages: {told.package[:80]}"
        fraction = (gathered + installed) / (2 * total)
        # It only rises, whatever a machine says: so there is an end to what is told.
        if fraction > furthest:
            furthest = fraction
            tell(NodeStep(step="install", message=message, fraction=fraction))

    return hear


async def roll_back(connection: Connection, installation: Installation, tell: Tell) -> None:
    """Undo an installation that came to its end, once its agent is stopped; nothing if it did nothing.

    Raises NODE_UNREACHABLE.
    """
    if installation.previous is not None:
        await switch_back(connection, installation, tell)
        return
    if not installation.is_new:
        return
    await _undo(
        connection, installation.python, installation.install_path, tell, drop=installation.tag,
        keeps_home=installation.had_home,
    )  # fmt: skip


async def _undo(
    connection: Connection, python: str, path: str, tell: Tell, *, drop: str = "", keeps_home: bool = True
) -> None:
    try:
        undone = await ask(
            connection, python, "undo", timeout_s=UNDO_TIMEOUT_S, path=path, drop=drop, keeps_home=keeps_home
        )
    except ArrieroError as failure:
        tell(NodeStep(step="rollback", message=f"could not be rolled back: {failure.message}"))
        return
    left = "nothing is left there" if undone["is_clean"] else "what was there before is there still"
    tell(NodeStep(step="rollback", message=f"rolled back: {left}"))
