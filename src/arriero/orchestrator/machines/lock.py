"""Which packages does a lock ask for on a machine, and which wheels fit there?

Pure: the machine's own words (`Survey`) go in.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from packaging.markers import Marker
from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from arriero.contracts.errors import ErrorCode, fail

_PINNED: Final = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)\s*(?:;\s*(?P<marker>.*))?")
_HASH: Final = re.compile(r"--hash=sha256:([0-9a-f]{64})")
#: The oldest glibc that wheels are made for (PEP 600), by processor.
_GLIBC_OLDEST: Final = {"x86_64": 5, "aarch64": 17}
VERSION_MAX: Final = 99
_LEGACY: Final = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}


@dataclass(frozen=True, slots=True)
class Pinned:
    """One package of a lock."""

    name: str
    version: str
    #: A condition on system and Python; empty: always.
    marker: str
    hashes: frozenset[str]

    def line(self) -> str:
        """Return it as pip reads it, without its condition."""
        return " ".join(
            [f"{self.name}=={self.version}", *(f"--hash=sha256:{h}" for h in sorted(self.hashes))]
        )


@dataclass(frozen=True, slots=True)
class Target:
    """What wheels must fit: a system, a processor, a C library, a CPython."""

    system: str
    machine: str
    libc: str
    system_version: str
    python_version: tuple[int, int, int]

    def __str__(self) -> str:
        libc = f" ({self.libc})" if self.libc else ""
        return f"{self.system} {self.machine}{libc}"

    @property
    def python(self) -> str:
        """The Python, as people write it."""
        return ".".join(map(str, self.python_version[:2]))

    def platforms(self) -> list[str]:
        """Return the platforms of wheels that run there, the closest first."""
        if self.system == "Darwin":
            version = _numbers(self.system_version)
            return list(mac_platforms((version[0], version[1]), self.machine))
        kind, _, version_text = self.libc.partition(" ")
        minor = _numbers(version_text)[1]
        if kind == "musl":
            return [f"musllinux_1_{each}_{self.machine}" for each in range(minor, -1, -1)]
        found = []
        for each in range(minor, _GLIBC_OLDEST.get(self.machine, 17) - 1, -1):
            found.append(f"manylinux_2_{each}_{self.machine}")
            if each in _LEGACY:
                found.append(f"{_LEGACY[each]}_{self.machine}")
        return [*found, f"linux_{self.machine}"]

    def tags(self) -> frozenset[Tag]:
        """Return all tags of wheels that run there."""
        platforms = self.platforms()
        version = self.python_version[:2]
        interpreter = f"cp{version[0]}{version[1]}"
        return frozenset(
            [
                *cpython_tags(version, [interpreter], platforms),
                *compatible_tags(version, interpreter, platforms),
            ]
        )


def _numbers(version: str) -> tuple[int, int]:
    found = [int(number) for number in re.findall(r"[0-9]+", version)[:2]]
    # Its own words, of which a list is made: what no version will be is none.
    found = [min(number, VERSION_MAX) for number in found]
    return (found[0], found[1]) if len(found) == 2 else (found[0] if found else 0, 0)


def parse(text: str) -> list[Pinned]:
    """Return the packages of a lock, as `uv pip compile --generate-hashes` writes it.

    Raises INSTALL_FAILED if a line is no pinned package with hashes.
    """
    found = []
    for entry in _entries(text):
        match = _PINNED.match(entry.split(" --hash", 1)[0].strip())
        hashes = frozenset(_HASH.findall(entry))
        if match is None or not hashes:
            fail(ErrorCode.INSTALL_FAILED, f"the lock has a line that pins nothing: {entry[:80]!r}")
        marker = (match["marker"] or "").strip()
        found.append(Pinned(canonicalize_name(match["name"]), match["version"], marker, hashes))
    return found


def _entries(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        entry = line.strip()
        if entry and not entry.startswith("#"):
            yield entry


def needed(packages: Iterable[Pinned], markers: Mapping[str, str]) -> list[Pinned]:
    """Return the packages whose conditions hold on a machine with these markers."""
    environment = dict(markers) | {"extra": ""}
    return [each for each in packages if not each.marker or Marker(each.marker).evaluate(environment)]


def fits(filename: str, package: Pinned, tags: frozenset[Tag]) -> bool:
    """Return whether a file's name is that of a wheel of a package that runs where `tags` do."""
    try:
        name, version, _, of_file = parse_wheel_filename(filename)
    except InvalidWheelFilename:
        return False
    return name == package.name and str(version) == package.version and not tags.isdisjoint(of_file)
