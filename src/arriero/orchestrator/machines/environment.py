"""How does a machine get this version of arriero, whole or not at all?"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import NodeStep
from arriero.fabrics.base import Connection
from arriero.orchestrator.machines import carrying, lock, wheel
from arriero.orchestrator.machines.survey import Survey, Tell
from arriero.orchestrator.machines.there import ask

PREPARE_TIMEOUT_S: Final = 60.0
#: Beyond the time that the program there allows itself.
MARGIN_S: Final = 180.0
BUILD_TIMEOUT_S: Final = 900.0
INDEX_TIMEOUT_S: Final = 25.0
UNDO_TIMEOUT_S: Final = 120.0
#: A small package of the lock, of pure Python: an index that has it is asked for all.
_ASKED_FOR: Final = "sniffio"


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
    #: The environment that was the current one before; None if there was none.
    previous: str | None
    #: False: it was there, and nothing was done.
    is_new: bool


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
        return Installation(packed.tag, version, path, python, _before(survey), is_new=False)
    try:
        await ask(connection, python, "prepare", timeout_s=PREPARE_TIMEOUT_S, path=path)
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
            connection, python, "build", timeout_s=BUILD_TIMEOUT_S + MARGIN_S, path=path, tag=packed.tag,
            version=version, wheel=packed.path.name, pip=pip.path.name, carried=is_carried,
            timeout_s_of_pip=BUILD_TIMEOUT_S,
        )  # fmt: skip
    except ArrieroError as error:
        await _undo(connection, python, path, error, tell)
        raise
    tell(NodeStep(step="install", message=f"arriero {version} is installed in {path}"))
    return Installation(packed.tag, version, path, python, built["previous"], is_new=built["is_new"])


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


def _before(survey: Survey) -> str | None:
    others = [tag for tag in survey.environments if tag != survey.current]
    return others[-1] if others else None


async def _supply(
    connection: Connection, survey: Survey, tell: Tell, source: Source, pip: Path, tag: str, *, carry: bool
) -> bool:  # fmt: skip
    """See that the packages can be had there; return whether they were carried."""
    if tag in survey.environments:
        return False
    packages = lock.needed(lock.parse(wheel.lock_text(source.package)), survey.markers)
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
    target = lock.Target(
        survey.system, survey.machine, survey.libc, survey.system_version, survey.python_version
    )
    async with source.turn:
        found = await carrying.fetch(source.dist / "wheels", pip, packages, target, tell)
    await carrying.bring(
        connection, survey.python, path, {f"wheels/{each.name}": each for each in found}, tell
    )
    return True


async def _undo(connection: Connection, python: str, path: str, error: ArrieroError, tell: Tell) -> None:
    if error.code is ErrorCode.NODE_UNREACHABLE:
        return
    try:
        undone = await ask(connection, python, "undo", timeout_s=UNDO_TIMEOUT_S, path=path)
    except ArrieroError as failure:
        tell(NodeStep(step="rollback", message=f"could not be rolled back: {failure.message}"))
        return
    left = "nothing is left there" if undone["is_clean"] else "what was there before is there still"
    tell(NodeStep(step="rollback", message=f"rolled back: {left}"))
