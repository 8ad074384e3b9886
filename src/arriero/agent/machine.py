"""What has this machine, and what of it is free now?  (`GET /v1/capabilities`, and preflight)"""

import asyncio
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from arriero.agent import engine_builds, engine_memory
from arriero.agent.engine_builds import FoundBuild
from arriero.contracts.errors import ArrieroError
from arriero.contracts.records import Capabilities, DeviceRecord, EngineList
from arriero.contracts.version import API_VERSION, __version__
from arriero.domain.engine_builds import CPU, Platform, WantedBuild, wanted_build
from arriero.domain.preflight import Resources, offered_backends
from arriero.engines import registry
from arriero.engines.llamacpp_backends import EngineDevice
from arriero.runtime import devices, logs, processes
from arriero.runtime.devices import MIB, DeviceReport

#: The driver of an idle card may take seconds to wake, that of a broken one never does.
LOOK_LIMIT_S: Final = 10.0


class Machine:
    """This machine as its agent knows it.  `home` lies on the disk that counts.

    `engines` names the installed engines with their versions, `builds` the builds of llama.cpp with
    what each can compute with; they are asked once, at start and after an installation.  A card that
    none was made for is shown among the devices, and its backend is not offered; where `backend` (the
    setting) chooses the CPU it is not shown either: nobody misses it.
    """

    def __init__(
        self, *, node: str, home: Path, engines: Mapping[str, str], builds: Sequence[FoundBuild],
        platform: Platform, backend: str = "", is_recalled: bool = False,
    ) -> None:  # fmt: skip
        self.node = node
        #: What is known of the builds was told to the agent before: they should be asked again.
        self.is_recalled = is_recalled
        self.platform = platform
        self._home = home
        self._engines = dict(engines)
        self._builds = tuple(builds)
        self._is_cpu_chosen = backend == CPU
        self._cpu_name = devices.cpu_name()
        self._machine_id = processes.machine_id()
        self._report = DeviceReport()
        self._looking: asyncio.Future[None] | None = None
        self._log = logs.get("arriero.agent.machine")

    def look(self) -> None:
        """Read the devices anew; blocks for some milliseconds.  New problems are logged."""
        report = devices.read(self._cpu_name)
        for problem in set(report.problems) - set(self._report.problems):
            self._log.warning("device_problem", problem=problem)
        found = shown_devices(self._engine_devices(), report.devices, is_cpu_chosen=self._is_cpu_chosen)
        self._report = DeviceReport(found, report.problems)

    async def look_aside(self, *, within_s: float = LOOK_LIMIT_S) -> None:
        """Read the devices anew without blocking the loop; what takes longer is known with a later look.

        Whoever comes meanwhile waits for the look that is under way: a broken card has one thread wait.
        """
        if self._looking is None:
            self._looking = asyncio.get_running_loop().run_in_executor(None, self.look)
            self._looking.add_done_callback(self._looked)
        await asyncio.wait({self._looking}, timeout=within_s)

    def _looked(self, look: asyncio.Future[None]) -> None:
        self._looking = None
        if not look.cancelled() and look.exception() is not None:
            self._log.error("devices_not_read", exc_info=look.exception())

    def take(self, builds: Sequence[FoundBuild]) -> bool:
        """Compute with these builds from now on; what is loaded goes on with the one it has.

        Return whether they are others, or have other devices, than those before.
        """
        before, self._builds = self._builds, tuple(builds)
        return [build.record for build in before] != [build.record for build in self._builds]

    @property
    def devices(self) -> tuple[DeviceRecord, ...]:
        """The devices as of the last look."""
        return self._report.devices

    def wanted_build(self) -> WantedBuild:
        """Return the build of the engine that suits this machine."""
        return wanted_build(self.platform, self._report.devices)

    def engine_folder(self, backend: str) -> Path | None:
        """Return the folder of the build that computes on `backend`; None: the environment's own."""
        return engine_builds.site_for(backend, self._builds, self.wanted_build().name)

    def engine_list(self) -> EngineList:
        """Return the builds there are, and the one that suits."""
        return engine_builds.listed(self.node, self._builds, self.wanted_build(), self._report.devices)

    def _engine_devices(self) -> list[EngineDevice]:
        """Return what the builds can compute with, each device once."""
        found = {
            (device.backend, device.number): device
            for build in self._builds
            if not build.record.problem
            for device in build.devices
        }
        return list(found.values())

    def resources(self) -> Resources:
        """Return what is free: memory and disk as they are now, devices as of the last look."""
        memory = devices.memory()
        return Resources(
            node=self.node,
            ram_free_mb=memory.free_mb,
            disk_free_mb=devices.disk_free_mb(self._home),
            backends=offered_backends(
                [device.backend for device in self._engine_devices()], self._report.devices
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
            advice=self.engine_list().advice,
            machine_id=self._machine_id,
        )


async def look_at_machine(node: str, home: Path, *, backend: str = "") -> Machine:
    """Return what this machine has, its engines asked; what a killed installation left is removed.

    Where the agent before has asked them since the boot, its word is taken for now.
    """

    def look() -> Machine:
        engine_builds.tidy(home)
        recalled = engine_memory.recall(home)
        builds = engine_builds.look(home) if recalled is None else recalled
        if recalled is None:
            engine_memory.remember(home, builds)
        return Machine(
            node=node,
            home=home,
            engines=installed_engines(),
            builds=builds,
            platform=engine_builds.this_platform(),
            backend=backend,
            is_recalled=recalled is not None,
        )

    machine = await asyncio.to_thread(look)
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


def shown_devices(
    engine_devices: Sequence[EngineDevice], known: Sequence[DeviceRecord], *, is_cpu_chosen: bool
) -> tuple[DeviceRecord, ...]:
    """Return a machine's devices; where the CPU is chosen for good, those alone that can compute."""
    found = (*known, *seen_by_engine_alone(engine_devices, known))
    if not is_cpu_chosen:
        return found
    usable = {device.backend for device in engine_devices}
    return tuple(device for device in found if device.backend in usable)


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
