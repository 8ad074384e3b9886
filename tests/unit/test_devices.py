"""Devices of machines that are not here, as they were recorded, and of the machine that is."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arriero.contracts.records import DeviceRecord
from arriero.engines.llamacpp_backends import (
    EngineDevice,
    ask,
    engine_devices,
    missing_library,
    read_devices,
)
from arriero.runtime import devices
from arriero.runtime.devices import Memory, metal, nvidia

FIXTURES = Path(__file__).parent.parent / "fixtures" / "devices"


def recording(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text("utf-8"))
    return found


class ReplayedNvml:
    """pynvml's names over a recording; errors are classes named as pynvml's are."""

    NVMLError: type[Exception] = type("NVMLError", (Exception,), {})

    def __init__(self, recorded: dict[str, Any]) -> None:
        self._recorded = recorded
        self.is_open = False

    def _maybe_fail(self, error: list[str] | None) -> None:
        if error is not None:
            raise type(error[0], (self.NVMLError,), {})(error[1])

    def nvmlInit(self) -> None:  # noqa: N802  pynvml's name.
        self._maybe_fail(self._recorded.get("init_error"))
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802  pynvml's name.
        self.is_open = False

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802  pynvml's name.
        return str(self._recorded["nvmlSystemGetDriverVersion"])

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802  pynvml's name.
        return len(self._recorded["cards"])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:  # noqa: N802  pynvml's name.
        found: dict[str, Any] = self._recorded["cards"][index]
        return found

    def nvmlDeviceGetName(self, handle: Any) -> bytes:  # noqa: N802  pynvml's name.
        # Older versions of pynvml answer with bytes.
        return str(handle["name"]).encode()

    def nvmlDeviceGetUUID(self, handle: Any) -> str:  # noqa: N802  pynvml's name.
        return str(handle["uuid"])

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:  # noqa: N802  pynvml's name.
        self._maybe_fail(handle.get("memory_error"))
        return SimpleNamespace(**handle["memory"])


def seen(name: str, visible: str | None = None) -> devices.DeviceReport:
    nvml = ReplayedNvml(recording(name))
    report = nvidia(nvml, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert not nvml.is_open, "the library is let go of"
    return report


def test_two_cards() -> None:
    report = seen("nvidia-two-cards")
    assert report.problems == ()
    assert report.devices == (
        DeviceRecord(
            id="cuda:0",
            backend="cuda",
            name="NVIDIA GeForce RTX 4090",
            memory_mb=24564,
            memory_free_mb=22994,
            driver="570.124.06",
        ),
        DeviceRecord(
            id="cuda:1",
            backend="cuda",
            name="NVIDIA GeForce RTX 3060",
            memory_mb=12288,
            memory_free_mb=4000,
            driver="570.124.06",
        ),
    )


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1,0", ["RTX 3060", "RTX 4090"]),
        ("1", ["RTX 3060"]),
        ("GPU-c07d", ["RTX 3060"]),
        ("", []),
        ("-1", []),
        ("0,7,1", ["RTX 4090"]),
        ("0,0", ["RTX 4090"]),
    ],
)
def test_visible_devices_hide_and_reorder_as_cuda_does(visible: str, names: list[str]) -> None:
    found = seen("nvidia-two-cards", visible).devices
    assert [device.name.removeprefix("NVIDIA GeForce ") for device in found] == names
    assert [device.id for device in found] == [f"cuda:{number}" for number in range(len(names))]


def test_a_lost_card_is_a_problem_and_the_other_keeps_its_number() -> None:
    report = seen("nvidia-lost-card")
    assert [device.id for device in report.devices] == ["cuda:1"]
    assert report.problems == ("NVIDIA card 0: GPU is lost",)


def test_a_broken_driver_is_a_problem() -> None:
    report = seen("nvidia-driver-mismatch")
    assert report.devices == ()
    assert "mismatch" in report.problems[0]


def test_no_driver_is_no_problem() -> None:
    assert seen("nvidia-no-driver") == devices.DeviceReport()
    assert nvidia(None, {}) == devices.DeviceReport()


def mac(name: str) -> devices.DeviceReport:
    recorded = recording(name)
    host = Memory(**recorded["host"], is_limited_by_cgroup=False)
    return metal(recorded["sysctl"].get, host)


def test_apple_chips_share_their_memory_up_to_the_wired_limit() -> None:
    [large] = mac("mac-m2-max-64").devices
    assert (large.id, large.backend, large.name) == ("metal:0", "metal", "Apple M2 Max GPU")
    assert (large.memory_mb, large.memory_free_mb) == (49152, 41210)
    [small] = mac("mac-m1-16-wired").devices
    assert (small.memory_mb, small.memory_free_mb) == (14336, 9000)


def test_intel_macs_have_none() -> None:
    assert mac("mac-intel") == devices.DeviceReport()


def test_this_machine_has_a_cpu_and_memory() -> None:
    report = devices.read()
    [cpu] = [device for device in report.devices if device.backend == "cpu"]
    assert cpu.id == "cpu"
    assert cpu.name
    memory = devices.memory()
    assert 0 < memory.free_mb <= memory.total_mb
    assert cpu.memory_mb == memory.total_mb


def test_the_installed_engine_tells_what_it_was_built_for() -> None:
    assert "cpu" in {device.backend for device in engine_devices()}


def test_an_engine_that_cannot_be_asked_has_no_devices() -> None:
    assert engine_devices(python="/nonexistent/python") == ()


def test_an_engine_that_cannot_be_asked_says_why(tmp_path: Path) -> None:
    assert ask(python="/nonexistent/python").problem.startswith("cannot be asked: ")
    assert ask(tmp_path).problem == "the folder has no xllamacpp", "the environment's own is not taken for it"
    package = tmp_path / "xllamacpp.py"
    for code, problem in (
        ("raise ImportError('libcudart.so.12: cannot open')", "ImportError: libcudart.so.12: cannot open"),
        ("import os; os.kill(os.getpid(), 4)", "ended by signal 4 when it was loaded"),
        ("def get_device_info(): return []", "tells of no device"),
    ):
        package.write_text(code)
        assert problem in ask(tmp_path).problem


def test_a_library_that_the_system_does_not_find_is_told() -> None:
    assert missing_library(()) == ""
    told = missing_library(("no-such-library.so.12",))
    assert "no-such-library.so.12: cannot open shared object file" in told


def test_the_engines_names_are_read() -> None:
    told = json.dumps(
        [
            ["CPU", "A processor", 100, 50],
            ["CUDA1", "A card", 200, 150],
            ["Vulkan0", "Another card", 300, 250],
            ["MTL0", "Apple", 1, 1],
            ["Quantum7", "not ours", 1, 1],
        ]
    )
    found = read_devices(b"ggml_cuda_init: found 1 device\n" + told.encode() + b"\n")
    assert found == (
        EngineDevice("cpu", 0, "A processor", 100, 50),
        EngineDevice("cuda", 1, "A card", 200, 150),
        EngineDevice("vulkan", 0, "Another card", 300, 250),
        EngineDevice("metal", 0, "Apple", 1, 1),
    )
    assert read_devices(b"") == ()
    assert read_devices(b"Segmentation fault\n") == ()
