"""Which devices of this machine can compute, and how much memory have they free?

Each source is a function over what it reads from, so that recordings of other machines drive its
tests.  A source that is not there gives no devices; one that fails gives a problem to show.
"""

import ctypes
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import psutil

from arriero.contracts.records import DeviceRecord
from arriero.runtime import cgroups

MIB: Final = 1024 * 1024
_SYSCTL_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """Devices that answered, and what is wrong with those that did not."""

    devices: tuple[DeviceRecord, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Memory:
    """Host memory in MiB; a memory cgroup's limit counts where it is the smaller."""

    total_mb: int
    free_mb: int
    is_limited_by_cgroup: bool


class Nvml(Protocol):
    """What is used of pynvml; every call may raise `NVMLError`."""

    NVMLError: type[Exception]

    def nvmlInit(self) -> None: ...  # noqa: N802, D102  pynvml's name.
    def nvmlShutdown(self) -> None: ...  # noqa: N802, D102  pynvml's name.
    def nvmlSystemGetDriverVersion(self) -> Any: ...  # noqa: N802, D102  pynvml's name.
    def nvmlDeviceGetCount(self) -> int: ...  # noqa: N802, D102  pynvml's name.
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...  # noqa: N802, D102  pynvml's name.
    def nvmlDeviceGetName(self, handle: Any) -> Any: ...  # noqa: N802, D102  pynvml's name.
    def nvmlDeviceGetUUID(self, handle: Any) -> Any: ...  # noqa: N802, D102  pynvml's name.
    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any: ...  # noqa: N802, D102  pynvml's name.


def read(processor: str = "") -> DeviceReport:
    """Return all devices of this machine, the CPU by the name given; blocks for some milliseconds."""
    total = memory()
    reports = [DeviceReport((cpu(processor or cpu_name(), total),))]
    reports.append(nvidia(_pynvml(), os.environ))
    if platform.system() == "Darwin":
        reports.append(metal(_sysctl, total))
    return DeviceReport(
        tuple(device for report in reports for device in report.devices),
        tuple(problem for report in reports for problem in report.problems),
    )


def memory() -> Memory:
    """Return total and free host memory."""
    host = psutil.virtual_memory()
    total, free = host.total, host.available
    is_limited = False
    path = cgroups.memory_cgroup(os.getpid())
    if path is not None:
        limit = cgroups.memory_limit_and_usage(path)
        if limit is not None:
            left = max(0, limit.limit_bytes - limit.usage_bytes)
            total = min(total, limit.limit_bytes)
            is_limited = left < free
            free = min(free, left)
    return Memory(total // MIB, free // MIB, is_limited)


def disk_free_mb(path: Path) -> int:
    """Return the free room of the disk that holds `path`, 0 if it cannot be told."""
    try:
        return psutil.disk_usage(str(path)).free // MIB
    except OSError:
        return 0


def cpu(name: str, host: Memory) -> DeviceRecord:
    """Return the CPU as a device; its memory is the host's."""
    return DeviceRecord(
        id="cpu", backend="cpu", name=name, memory_mb=host.total_mb, memory_free_mb=host.free_mb
    )


def cpu_name() -> str:
    """Return the processor's name as people know it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        if platform.system() == "Darwin":
            return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def nvidia(nvml: Nvml | None, env: Mapping[str, str]) -> DeviceReport:
    """Return the NVIDIA cards, numbered as CUDA will number them in PCI order.

    `CUDA_VISIBLE_DEVICES` hides and reorders.  No driver at all is no problem.
    """
    if nvml is None:
        return DeviceReport()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        is_absent = type(error).__name__ in ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded")
        return DeviceReport(problems=() if is_absent else (f"NVIDIA: {error}",))
    try:
        return _nvidia_cards(nvml, env.get("CUDA_VISIBLE_DEVICES"))
    except nvml.NVMLError as error:
        return DeviceReport(problems=(f"NVIDIA: {error}",))
    finally:
        nvml.nvmlShutdown()


def _nvidia_cards(nvml: Nvml, visible: str | None) -> DeviceReport:
    driver = _text(nvml.nvmlSystemGetDriverVersion())
    devices: list[DeviceRecord] = []
    problems: list[str] = []
    handles = []
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            handles.append((index, _text(nvml.nvmlDeviceGetUUID(handle)), handle))
        except nvml.NVMLError as error:
            problems.append(f"NVIDIA card {index}: {error}")
    order = _visible([(index, uuid) for index, uuid, _ in handles], visible)
    for number, index in enumerate(order):
        handle = next(handle for at, _, handle in handles if at == index)
        try:
            room = nvml.nvmlDeviceGetMemoryInfo(handle)
            devices.append(
                DeviceRecord(
                    id=f"cuda:{number}",
                    backend="cuda",
                    name=_text(nvml.nvmlDeviceGetName(handle)),
                    memory_mb=int(room.total) // MIB,
                    memory_free_mb=int(room.free) // MIB,
                    driver=driver,
                )
            )
        except nvml.NVMLError as error:
            problems.append(f"NVIDIA card {index}: {error}")
    return DeviceReport(tuple(devices), tuple(problems))


def _visible(cards: list[tuple[int, str]], visible: str | None) -> list[int]:
    """Return the card numbers that CUDA shows, in its order: it stops at the first wrong entry."""
    if visible is None:
        return [index for index, _ in cards]
    order: list[int] = []
    for entry in (part.strip() for part in visible.split(",")):
        found = [index for index, uuid in cards if entry == str(index) or (entry and uuid.startswith(entry))]
        if len(found) != 1 or found[0] in order:
            break
        order.append(found[0])
    return order


def metal(sysctl: Callable[[str], str | None], host: Memory) -> DeviceReport:
    """Return the GPU of an Apple chip: it shares the host's memory, up to the wired limit.

    Without a limit of its own the system gives the GPU two thirds of the memory up to 36 GiB,
    three quarters above (Metal's recommendedMaxWorkingSetSize on such machines).
    """
    if sysctl("hw.optional.arm64") != "1":
        return DeviceReport()
    size = sysctl("hw.memsize") or ""
    if not size.isdigit():
        return DeviceReport(problems=("Metal: the size of the memory is not told",))
    total_mb = int(size) // MIB
    wired = sysctl("iogpu.wired_limit_mb") or "0"
    limit_mb = int(wired) if wired.isdigit() else 0
    if limit_mb == 0:
        limit_mb = total_mb * 2 // 3 if total_mb <= 36 * 1024 else total_mb * 3 // 4
    device = DeviceRecord(
        id="metal:0",
        backend="metal",
        name=f"{sysctl('machdep.cpu.brand_string') or 'Apple'} GPU",
        memory_mb=limit_mb,
        memory_free_mb=min(limit_mb, host.free_mb),
    )
    return DeviceReport((device,))


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _sysctl(name: str) -> str | None:
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name],
            capture_output=True,
            text=True,
            timeout=_SYSCTL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _pynvml() -> Nvml | None:
    try:
        import pynvml
    except (ImportError, OSError, ctypes.ArgumentError):
        return None
    module: Nvml = pynvml
    return module
