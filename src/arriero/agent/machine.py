"""What has this machine, and what of it is free now?  (`GET /v1/capabilities`, and preflight)"""

import asyncio
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from arriero.contracts.errors import ArrieroError
from arriero.contracts.records import Capabilities, DeviceRecord
from arriero.contracts.version import API_VERSION, __version__
from arriero.domain.preflight import Resources, offered_backends
from arriero.engines import registry
from arriero.engines.llamacpp_backends import EngineDevice, engine_devices
from arriero.runtime import devices, logs
from arriero.runtime.devices import MIB, DeviceReport


class Machine:
    """This machine as its agent knows it.  `home` lies on the disk that counts.

    `engines` names the installed engines with their versions, `engine_devices` what the engine can
    compute with; both are asked for once, at start.  A card that the engine was not built for is
    shown among the devices, and its backend is not offered.
    """

    def __init__(
        self, *, node: str, home: Path, engines: Mapping[str, str], engine_devices: Sequence[EngineDevice]
    ) -> None:
        self.node = node
        self._home = home
        self._engines = dict(engines)
        self._engine_devices = tuple(engine_devices)
        self._cpu_name = devices.cpu_name()
        self._report = DeviceReport()
        self._log = logs.get("arriero.agent.machine")

    def look(self) -> None:
        """Read the devices anew; blocks for some milliseconds.  New problems are logged."""
        report = devices.read(self._cpu_name)
        for problem in set(report.problems) - set(self._report.problems):
            self._log.warning("device_problem", problem=problem)
        self._report = DeviceReport(
            (*report.devices, *seen_by_engine_alone(self._engine_devices, report.devices)), report.problems
        )

    async def look_aside(self) -> None:
        """Read the devices anew without blocking the loop."""
        await asyncio.to_thread(self.look)

    def resources(self) -> Resources:
        """Return what is free: memory and disk as they are now, devices as of the last look."""
        memory = devices.memory()
        return Resources(
            node=self.node,
            ram_free_mb=memory.free_mb,
            disk_free_mb=devices.disk_free_mb(self._home),
            backends=offered_backends(
                [device.backend for device in self._engine_devices], self._report.devices
            ),
            devices=self._report.devices,
            is_limited_by_cgroup=memory.is_limited_by_cgroup,
        )

    def capabilities(self) -> Capabilities:
        """Return the machine as lists show it, devices as of the last look."""
        memory = devices.memory()
        resources = self.resources()
        return Capabilities(
            name=self.node,
            version=__version__,
            api_version=API_VERSION,
            backends=list(resources.backends),
            devices=list(resources.devices),
            engines=self._engines,
            ram_mb=memory.total_mb,
            ram_free_mb=memory.free_mb,
            disk_free_mb=resources.disk_free_mb,
            cpu_cores=os.cpu_count() or 1,
            os=platform.system().lower(),
            arch=platform.machine(),
        )


async def look_at_machine(node: str, home: Path) -> Machine:
    """Return what this machine has, its engines asked."""
    versions, found = await asyncio.to_thread(lambda: (installed_engines(), engine_devices()))
    machine = Machine(node=node, home=home, engines=versions, engine_devices=found)
    await machine.look_aside()
    return machine


def installed_engines() -> dict[str, str]:
    """Return the engines that are installed, with their versions."""
    versions: dict[str, str] = {}
    for name in registry.KINDS:
        try:
            versions[name] = registry.kind(name).probe().get("version", "")
        except ArrieroError:
            continue
    return versions


def seen_by_engine_alone(
    engine_devices: Sequence[EngineDevice], known: Sequence[DeviceRecord]
) -> list[DeviceRecord]:
    """Return the devices of backends that have no source of their own, with their memory at start."""
    own = {device.backend for device in known}
    return [
        DeviceRecord(
            id=f"{device.backend}:{device.number}",
            backend=device.backend,
            name=device.name,
            memory_mb=device.memory_bytes // MIB,
            memory_free_mb=device.memory_free_bytes // MIB,
        )
        for device in engine_devices
        if device.backend not in own and device.backend != "cpu"
    ]
