"""What was the installed llama.cpp built to compute with, and which devices does it see?

Asked in a process of its own: a build for an accelerator takes hold of the cards when it looks,
and would keep some of their memory for as long as the process that asked.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

import msgspec

#: Loading a driver for the first time after boot may take long.
ASK_TIMEOUT_S: Final = 30.0
#: ggml's device names, as `llama-server --list-devices` prints them, and our backends.
_BACKENDS: Final = {
    "CPU": "cpu",
    "CUDA": "cuda",
    "ROCm": "rocm",
    "HIP": "rocm",
    "Vulkan": "vulkan",
    "MTL": "metal",
    "Metal": "metal",
    "SYCL": "sycl",
}
_NAME: Final = re.compile(r"([A-Za-z]+)(\d*)")
_ASK: Final = (
    "import json, xllamacpp; print(json.dumps([[d['name'], d['description'], d['memory_total'],"
    " d['memory_free']] for d in xllamacpp.get_device_info()]))"
)


@dataclass(frozen=True, slots=True)
class EngineDevice:
    """A device as the engine sees it."""

    backend: str
    #: Number among the devices of its backend; the CPU has 0.
    number: int
    name: str
    memory_bytes: int
    memory_free_bytes: int


def engine_devices(python: str = sys.executable) -> tuple[EngineDevice, ...]:
    """Return the devices that the installed engine can compute with; blocks up to 30 s.

    Empty where the engine is not installed or cannot be loaded.
    """
    try:
        done = subprocess.run(
            [python, "-I", "-c", _ASK],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=ASK_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return read_devices(done.stdout) if done.returncode == 0 else ()


def read_devices(output: bytes) -> tuple[EngineDevice, ...]:
    """Return the devices that the asking process printed; names that are not known are left out."""
    lines = output.splitlines()
    try:
        rows = msgspec.json.decode(lines[-1] if lines else b"", type=list[tuple[str, str, int, int]])
    except msgspec.DecodeError:
        return ()
    found = []
    for name, description, total, free in rows:
        match = _NAME.fullmatch(name)
        backend = _BACKENDS.get(match[1]) if match else None
        if match and backend:
            found.append(EngineDevice(backend, int(match[2] or 0), description, total, free))
    return tuple(found)
