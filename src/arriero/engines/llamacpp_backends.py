"""What was a build of llama.cpp made to compute with, and which devices does it see?

Asked in a process of its own: a build for an accelerator takes hold of the cards when it looks,
and would keep some of their memory for as long as the process that asked.
"""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
#: With a folder as its argument, the build in it is asked, and nothing else will do.
_ASK: Final = (
    "import json, os, sys; given = sys.argv[1:]; sys.path[:0] = given; import xllamacpp\n"
    "real = os.path.realpath\n"
    "if given and not real(xllamacpp.__file__).startswith(real(given[0]) + os.sep):"
    " sys.exit('the folder has no xllamacpp')\n"
    "print(json.dumps([[d['name'], d['description'], d['memory_total'], d['memory_free']]"
    " for d in xllamacpp.get_device_info()]))"
)
_NOT_FOUND: Final = "cannot open shared object file"
_LOAD: Final = "import ctypes, sys\nfor name in sys.argv[1:]: ctypes.CDLL(name)"
_REASON_CHARS_MAX: Final = 300


@dataclass(frozen=True, slots=True)
class EngineDevice:
    """A device as the engine sees it."""

    backend: str
    #: Number among the devices of its backend; the CPU has 0.
    number: int
    name: str
    memory_bytes: int
    memory_free_bytes: int


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """What a build says of itself."""

    devices: tuple[EngineDevice, ...] = ()
    #: Why it cannot be used, as the interpreter or the system put it; empty: it can.
    problem: str = ""


def engine_devices(python: str = sys.executable) -> tuple[EngineDevice, ...]:
    """Return the devices that the environment's own build can compute with; blocks up to 30 s.

    Empty where the engine is not installed or cannot be loaded.
    """
    return ask(python=python).devices


def ask(folder: Path | None = None, *, python: str = sys.executable) -> EngineAnswer:
    """Load the build in `folder`, or the environment's own, and ask for its devices; blocks up to 30 s."""
    argv = [python, "-I", "-c", _ASK, *([os.fspath(folder)] if folder is not None else [])]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=ASK_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return EngineAnswer(problem=f"did not answer within {ASK_TIMEOUT_S:g} s")
    except OSError as error:
        return EngineAnswer(problem=f"cannot be asked: {error.strerror}")
    if done.returncode != 0:
        return EngineAnswer(problem=_reason(done))
    found = read_devices(done.stdout)
    return EngineAnswer(found, "" if found else "tells of no device")


def missing_library(names: Sequence[str]) -> str:
    """Return what the system says of the first of these libraries that it does not find; empty if of none.

    In a process of its own, as a build is loaded: what is loaded stays.  Blocks up to 30 s.
    """
    argv = [sys.executable, "-I", "-c", _LOAD, *names]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=ASK_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    reason = _reason(done) if done.returncode else ""
    return reason if _NOT_FOUND in reason else ""


def _reason(done: "subprocess.CompletedProcess[bytes]") -> str:
    if done.returncode < 0:
        return f"ended by signal {-done.returncode} when it was loaded: is it made for another processor?"
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return (lines[-1] if lines else f"ended with {done.returncode}")[-_REASON_CHARS_MAX:]


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
