"""What is a machine, and what has it?  Runs there, see `there_child.py`."""

import contextlib
import ctypes
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from arriero.orchestrator.machines.there_child import (
    Facts,
    current,
    existing,
    path_problem,
    whole,
)


def survey(install_path: str) -> Facts:
    """Return what the machine is and has; leave nothing there."""
    path = Path(install_path).absolute()
    problem = path_problem(path)
    disk = os.statvfs(existing(path))
    return {
        "install_path": str(path),
        "path_problem": problem,
        "disk_free_mb": disk.f_bavail * disk.f_frsize // 2**20,
        "environments": whole(path),
        "current": current(path),
        "hostname": platform.node(),
        "user_id": os.getuid(),
        "libc": _libc(),
        "system_version": platform.mac_ver()[0] or platform.release(),
        "markers": _markers(),
        "missing_libraries": _missing_libraries(),
        "gpu": _gpu(),
        "unix": time.time(),
    }


def _libc() -> str:
    if sys.platform != "linux":
        return ""
    with contextlib.suppress(ValueError, OSError):
        found = os.confstr("CS_GNU_LIBC_VERSION")
        if found:
            return found
    for loader in sorted(Path("/lib").glob("ld-musl-*.so.1")):
        said = subprocess.run([loader], capture_output=True, text=True, check=False).stderr
        version = next((line.split()[1] for line in said.splitlines() if line.startswith("Version ")), "1.1")
        return f"musl {version}"
    return ""


def _markers() -> dict[str, str]:
    """Return what the conditions in a lock ask for."""
    version = sys.implementation.version
    return {
        "implementation_name": sys.implementation.name,
        "implementation_version": ".".join(map(str, version[:3])),
        "os_name": os.name,
        "platform_machine": platform.machine(),
        "platform_python_implementation": platform.python_implementation(),
        "platform_release": platform.release(),
        "platform_system": platform.system(),
        "platform_version": platform.version(),
        "python_full_version": platform.python_version(),
        "python_version": ".".join(platform.python_version_tuple()[:2]),
        "sys_platform": sys.platform,
    }


def _missing_libraries() -> list[str]:
    if sys.platform != "linux":
        return []
    missing = []
    for name in ("libgomp.so.1",):
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    return missing


def _gpu() -> str:
    if sys.platform == "darwin":
        return "Apple GPU (Metal)" if platform.machine() == "arm64" else ""
    found = shutil.which("nvidia-smi", path=os.environ.get("PATH", "") + ":/usr/bin:/usr/local/bin")
    if found:
        ask = [found, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True).stdout
            return "; ".join(", driver ".join(line.split(", ")) for line in said.splitlines()[:16])
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0][:200]
    return ""


ACTIONS: dict[str, Any] = {"survey": survey}
