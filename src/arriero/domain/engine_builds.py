"""Which build of the engine suits a machine, which of several computes, and what is a person told of it?

The engine is published as one package in several builds: one for processors (with Metal on Apple's
chips), and one for each version of an accelerator's toolkit, each in an index of its own.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from arriero.contracts.records import DeviceRecord

CPU: Final = "cpu"
METAL: Final = "metal"
#: The package's CUDA builds, the newest first, with the oldest branch of NVIDIA's driver that each
#: works with: most cards run code that the driver itself compiles, and a driver compiles nothing
#: newer than its own CUDA (12.8 came with branch 570, 13.2 with 595).  Cards that CUDA 13 dropped
#: (before Turing) have no driver beyond branch 580, so the driver alone decides.
CUDA_BUILDS: Final = (("cu132", "13.2", 595), ("cu128", "12.8", 570))
#: The CUDA builds are made on a system with this C library.
CUDA_GLIBC_LEAST: Final = (2, 35)
#: What they are linked to and do not bring along; the number is that of CUDA's major version.
_CUDA_LIBRARIES: Final = ("libcudart.so", "libcublas.so")
_CUDA_NAME: Final = re.compile(r"cu([0-9]{2})[0-9]")
_CUDA_ARCHES: Final = ("x86_64", "aarch64")
#: What a build's name begins with, and the backend that it brings.
_BACKENDS: Final = (
    ("cu", "cuda"),
    ("rocm", "rocm"),
    ("vulkan", "vulkan"),
    ("metal", "metal"),
    ("cpu", "cpu"),
)


@dataclass(frozen=True, slots=True)
class Platform:
    """What a build has to be made for."""

    #: "linux" or "darwin".
    os: str
    arch: str
    python: tuple[int, int]
    #: Version of the GNU C library; None where there is none, or it is not known.
    glibc: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class WantedBuild:
    """The build that suits a machine."""

    name: str
    #: One sentence, for people.
    why: str
    #: The oldest branch of the driver that it works with; 0: it needs none.
    driver_least: int = 0
    #: What keeps every build from using the machine's accelerator, and what to do; empty: nothing.
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class BuildView:
    """A build that is here, as a choice sees it."""

    name: str
    backends: tuple[str, ...]
    #: Whether it belongs to arriero's own environment, and was not installed beside it.
    is_own: bool = False
    #: Why it cannot be used; empty: it can.
    problem: str = ""


def wanted_build(platform: Platform, devices: Iterable[DeviceRecord]) -> WantedBuild:
    """Return the build that gets the most out of a machine."""
    found = list(devices)
    cards = [device for device in found if device.backend == "cuda"]
    if cards:
        return _for_nvidia(platform, cards)
    metal = next((device for device in found if device.backend == METAL), None)
    if metal is not None:
        return WantedBuild(METAL, f"{metal.name} computes by Metal")
    return WantedBuild(CPU, "the machine has no accelerator that a build is chosen for by itself")


def _for_nvidia(platform: Platform, cards: Sequence[DeviceRecord]) -> WantedBuild:
    card = cards[0]
    has = f"{card.name} with driver {card.driver or 'of an unknown version'}"
    if platform.os != "linux" or platform.arch not in _CUDA_ARCHES:
        obstacle = f"there is no CUDA build of the engine for {platform.os} {platform.arch}"
        return WantedBuild(CPU, f"{has}, but {obstacle}", obstacle=obstacle)
    if platform.glibc is not None and platform.glibc < CUDA_GLIBC_LEAST:
        obstacle = (
            f"the CUDA builds of the engine need glibc {_dotted(CUDA_GLIBC_LEAST)}, "
            f"the system has {_dotted(platform.glibc)}: a newer system is needed"
        )
        return WantedBuild(CPU, f"{has}, but {obstacle}", obstacle=obstacle)
    branch = driver_branch(card.driver)
    for name, toolkit, least in CUDA_BUILDS:
        if branch is not None and branch >= least:
            return WantedBuild(name, f"{has}: CUDA {toolkit} needs driver {least} or newer", least)
    least = min(least for _, _, least in CUDA_BUILDS)
    obstacle = f"no build of the engine works with a driver older than {least}: install a newer driver first"
    return WantedBuild(CPU, f"{has}, but {obstacle}", least, obstacle)


def driver_branch(version: str) -> int | None:
    """Return the branch of an NVIDIA driver: 570 of `570.124.06`; None if that is no version."""
    first = version.strip().partition(".")[0]
    return int(first) if first.isascii() and first.isdigit() and len(first) <= 6 else None


def backend_of(build: str) -> str:
    """Return the backend that a build brings by its name; empty for a name that tells none."""
    return next((backend for start, backend in _BACKENDS if build.startswith(start)), "")


def needed_libraries(build: str) -> tuple[str, ...]:
    """Return the libraries that a build cannot be loaded without, as the system's linker names them."""
    cuda = _CUDA_NAME.fullmatch(build)
    return tuple(f"{library}.{cuda[1]}" for library in _CUDA_LIBRARIES) if cuda is not None else ()


def build_for(backend: str, builds: Iterable[BuildView], wanted: str) -> BuildView | None:
    """Return the build that computes on `backend`: of those that can, the best one; None if none can.

    On the CPU the environment's own; else the one that suits the machine, then the newest.
    """
    able = [build for build in builds if not build.problem and backend in build.backends]
    if backend == CPU:
        return min(able, key=lambda build: (not build.is_own, build.name), default=None)
    return max(able, key=lambda build: (build.name == wanted, not build.is_own, build.name), default=None)


def backends_of(builds: Iterable[BuildView]) -> frozenset[str]:
    """Return what can be computed with by the builds that work."""
    return frozenset(backend for build in builds if not build.problem for backend in build.backends)


def unused_accelerator(backends: Iterable[str], devices: Iterable[DeviceRecord]) -> DeviceRecord | None:
    """Return an accelerator of a machine that can compute on its CPU alone; None if all is well.

    Work that names no backend belongs on it, so it is refused rather than left to the CPU.
    """
    if any(backend != CPU for backend in backends):
        return None
    return next((device for device in devices if device.backend != CPU), None)


def install_command(node: str = "") -> str:
    """Return the command that installs the build that suits a machine."""
    return "arriero engines install" + (f" --node {node}" if node else "")


def advice(
    builds: Sequence[BuildView], wanted: WantedBuild, devices: Sequence[DeviceRecord], *, node: str = ""
) -> list[str]:
    """Return what a person should know of the engine on a machine, with what to do; empty: all is well."""
    idle = unused_accelerator(backends_of(builds), devices)
    if idle is None:
        return []
    broken = next((build for build in builds if build.name == wanted.name and build.problem), None)
    if wanted.obstacle:
        told = f"{idle.name} is not used: {wanted.obstacle}"
    elif broken is not None:
        told = (
            f"{idle.name} is not used: the engine's build {broken.name} {broken.problem}; "
            f"`{install_command(node)}` installs it anew"
        )
    else:
        told = (
            f"{idle.name} is not used: no build of the engine for it is installed; "
            f"`{install_command(node)}` installs {wanted.name}"
        )
    return [f"{told}; until then only work that asks for `--backend cpu` runs here"]


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
