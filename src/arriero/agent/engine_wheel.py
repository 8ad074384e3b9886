"""Is this file a wheel of the engine that can be installed here?  (its name, its own words, its checksum)"""

import email.parser
import hashlib
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from arriero.agent.engine_builds import PACKAGE
from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.domain import wheels
from arriero.domain.engine_builds import Platform
from arriero.domain.wheels import WheelName

#: The largest builds have some 700 MB.
WHEEL_BYTES_MAX: Final = 2_000_000_000
_UNPACKED_BYTES_MAX: Final = 8_000_000_000
_METADATA_BYTES_MAX: Final = 4_000_000
_CHUNK: Final = 1 << 20
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class CheckedWheel:
    """A wheel that may be installed."""

    path: Path
    version: str
    sha256: str
    unpacked_bytes: int


def check_name(name: str, platform: Platform, version: str) -> WheelName:
    """Return the parts of a wheel's name.

    Raises INVALID_REQUEST if it is none of the engine's, or is for another version, system, processor
    or Python.
    """
    parts = wheels.parse(name)
    if parts is None:
        fail(ErrorCode.INVALID_REQUEST, f"{name[:200]!r} is no name of a wheel", wheel=name[:200])
    if parts.package != PACKAGE:
        fail(ErrorCode.INVALID_REQUEST, f"{name[:200]} is no wheel of {PACKAGE}", wheel=name[:200])
    _check_version(name, parts.version, version)
    reason = wheels.why_not(parts, platform)
    if reason:
        fail(
            ErrorCode.INVALID_REQUEST,
            f"{name[:200]} {reason}",
            wheel=name[:200],
            suggested_action="Take the wheel that is made for that machine.",
        )
    return parts


def copy(source: Path, target: Path, tell: Callable[[int, int], None]) -> None:
    """Copy a wheel; blocks.  Raises INVALID_REQUEST if it cannot be read, INSUFFICIENT_DISK."""
    try:
        total = source.stat().st_size
        _check_size(total)
        _check_room(target.parent, total)
        with source.open("rb") as reading, target.open("xb") as writing:
            done = 0
            while chunk := reading.read(_CHUNK):
                writing.write(chunk)
                done += len(chunk)
                tell(done, total)
    except OSError as error:
        raise ArrieroError(
            ErrorCode.INVALID_REQUEST, f"the wheel {source.name[:200]} cannot be read: {error.strerror}"
        ) from error


def check(path: Path, platform: Platform, version: str, *, sha256: str | None) -> CheckedWheel:
    """Read a wheel through and return it; blocks.

    Raises what `check_name` raises; INSTALL_FAILED if its bytes are not what they should be (another
    checksum, cut off, damaged, another package within); INSUFFICIENT_DISK if it does not fit unpacked.
    """
    parts = check_name(path.name, platform, version)
    _check_size(path.stat().st_size)
    found = _hash(path)
    if sha256 is not None and found != sha256:
        fail(
            ErrorCode.INSTALL_FAILED,
            f"{path.name} has the sha256 {found}, {sha256} was asked for",
            expected=sha256,
            actual=found,
            suggested_action="Get the wheel again, or compare the checksum with its publisher's.",
        )
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = _check_inside(archive, parts, path.name)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise ArrieroError(
            ErrorCode.INSTALL_FAILED,
            f"{path.name} is no whole wheel: {error}",
            suggested_action="Get the wheel again.",
        ) from error
    _check_room(path.parent, unpacked)
    return CheckedWheel(path, parts.version, found, unpacked)


def _check_inside(archive: zipfile.ZipFile, parts: WheelName, name: str) -> int:
    """Return the unpacked size of a wheel whose own words agree with its name."""
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > _UNPACKED_BYTES_MAX:
        raise ValueError(f"it unpacks to {unpacked} bytes, at most {_UNPACKED_BYTES_MAX} can be")
    told = [
        entry for entry in archive.infolist()
        if entry.filename.endswith(".dist-info/METADATA") and entry.filename.count("/") == 1
    ]  # fmt: skip
    if len(told) != 1 or told[0].file_size > _METADATA_BYTES_MAX:
        raise ValueError("it has no METADATA")
    words = email.parser.BytesParser().parsebytes(archive.read(told[0]), headersonly=True)
    package, version = wheels.normal_name(words["Name"] or ""), words["Version"] or ""
    if (package, version) != (parts.package, parts.version):
        raise ValueError(f"it is {package} {version} within")
    return unpacked


def _check_version(name: str, version: str, wanted: str) -> None:
    if wheels.public_version(version) != wheels.public_version(wanted):
        fail(
            ErrorCode.INVALID_REQUEST,
            f"{name[:200]} is of version {version}, arriero needs {wanted}",
            wheel=name[:200],
            suggested_action=f"Take the wheel of version {wanted}.",
        )


def _check_size(size: int) -> None:
    if size > WHEEL_BYTES_MAX:
        fail(
            ErrorCode.REQUEST_TOO_LARGE,
            f"the wheel has {size} bytes, the limit is {WHEEL_BYTES_MAX}",
            limit_bytes=WHEEL_BYTES_MAX,
        )


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        fail(
            ErrorCode.INSUFFICIENT_DISK,
            f"a build of the engine needs {needed // _MIB} MB, the disk has {free // _MIB} MB free",
            required_mb=needed // _MIB,
            available_mb=free // _MIB,
        )


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
