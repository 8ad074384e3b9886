"""What has this machine, and what of it is free now?  (`GET /v1/capabilities`, and preflight)"""

import asyncio
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from arriero.contracts.records import Capabilities
from arriero.contracts.version import API_VERSION, __version__
from arriero.domain.preflight import Resources, offered_backends
from arriero.runtime import devices, logs
from arriero.runtime.devices import DeviceReport


class Machine:
    """This machine as its agent knows it.  `home` lies on the disk that counts.

    `engines` names the installed engines with their versions, `engine_backends` what they were
    built for; both are asked for once, at start.
    """

    def __init__(
        self, *, node: str, home: Path, engines: Mapping[str, str], engine_backends: Sequence[str]
    ) -> None:
        self.node = node
        self._home = home
        self._engines = dict(engines)
        self._engine_backends = tuple(engine_backends)
        self._report = DeviceReport()
        self._log = logs.get("arriero.agent.machine")

    def look(self) -> None:
        """Read the devices anew; blocks for some milliseconds.  New problems are logged."""
        report = devices.read()
        for problem in set(report.problems) - set(self._report.problems):
            self._log.warning("device_problem", problem=problem)
        self._report = report

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
            backends=offered_backends(self._engine_backends, self._report.devices),
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
