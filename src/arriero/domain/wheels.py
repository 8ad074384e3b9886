"""What does the name of a wheel say, and does it fit a machine?  (packaging's binary distributions)"""

import re
from dataclasses import dataclass
from typing import Final

from arriero.domain.engine_builds import Platform

_NAME: Final = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.]{0,99})-(?P<version>[0-9][A-Za-z0-9_.!+]{0,99})(-[0-9][A-Za-z0-9_.]{0,29})?"
    r"-(?P<python>[a-z0-9_.]{1,60})-(?P<abi>[a-z0-9_.]{1,60})-(?P<platform>[a-z0-9_.]{1,200})\.whl"
)
_PYTHON: Final = re.compile(r"(cp|py)(\d)(\d*)")
_GLIBC: Final = re.compile(r"manylinux_(\d+)_(\d+)_(.+)")
#: What the older names of a system's C library stand for.
_OLD_GLIBC: Final = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}


@dataclass(frozen=True, slots=True)
class WheelName:
    """The parts of a wheel's file name."""

    #: As it compares: lower case, `-` between words.
    package: str
    version: str
    pythons: tuple[str, ...]
    abis: tuple[str, ...]
    platforms: tuple[str, ...]


def parse(file_name: str) -> WheelName | None:
    """Return the parts of a wheel's file name; None if it is none."""
    match = _NAME.fullmatch(file_name)
    if match is None:
        return None
    return WheelName(
        package=normal_name(match["name"]),
        version=match["version"],
        pythons=tuple(match["python"].split(".")),
        abis=tuple(match["abi"].split(".")),
        platforms=tuple(match["platform"].split(".")),
    )


def normal_name(name: str) -> str:
    """Return a package's name as names are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def public_version(version: str) -> str:
    """Return a version without its local label: `2026.10.1` of `2026.10.1+cu128`."""
    return version.partition("+")[0]


def why_not(wheel: WheelName, platform: Platform) -> str:
    """Return why a wheel does not fit a machine; empty if it does."""
    if not any(_fits_python(python, wheel.abis, platform.python) for python in wheel.pythons):
        shown = f"{'.'.join(wheel.pythons)}-{'.'.join(wheel.abis)}"
        return f"is for Python {shown}, here runs {platform.python[0]}.{platform.python[1]}"
    if not any(_fits_system(tag, platform) for tag in wheel.platforms):
        glibc = f" with glibc {platform.glibc[0]}.{platform.glibc[1]}" if platform.glibc else ""
        return f"is for {', '.join(wheel.platforms)}, the machine is {platform.os} {platform.arch}{glibc}"
    return ""


def _fits_python(tag: str, abis: tuple[str, ...], python: tuple[int, int]) -> bool:
    match = _PYTHON.fullmatch(tag)
    if match is None:
        return False
    wanted = (int(match[2]), int(match[3] or 0))
    if match[1] == "py" or "none" in abis:
        return "none" in abis and wanted[0] == python[0] and wanted <= python
    if "abi3" in abis:
        return wanted[0] == python[0] and wanted <= python
    return wanted == python and f"cp{python[0]}{python[1]}" in abis


def _fits_system(tag: str, platform: Platform) -> bool:
    if tag == "any":
        return True
    if platform.os == "darwin":
        return tag.startswith("macosx_") and tag.endswith((f"_{platform.arch}", "_universal2"))
    if platform.os != "linux":
        return False
    if tag == f"linux_{platform.arch}":
        return True
    match = _GLIBC.fullmatch(tag)
    if match is not None:
        least, arch = (int(match[1]), int(match[2])), match[3]
    else:
        old, _, arch = tag.partition("_")
        if old not in _OLD_GLIBC:
            return False
        least = _OLD_GLIBC[old]
    return arch == platform.arch and (platform.glibc is None or least <= platform.glibc)
