"""What can be done with a machine that is reached?  All of it behind one class."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from arriero.contracts.records import Finding
from arriero.fabrics.base import Connection
from arriero.orchestrator.machines import environment, running
from arriero.orchestrator.machines.doctor import doctor
from arriero.orchestrator.machines.environment import Installation, Source
from arriero.orchestrator.machines.running import LogEnd
from arriero.orchestrator.machines.survey import Survey, Tell, survey
from arriero.orchestrator.machines.there import PYTHON_PLACES
from arriero.orchestrator.machines.wheel import PACKAGE
from arriero.runtime.clock import Clock


class Machines:
    """Puts arriero onto machines and runs it there; `dist` keeps the wheel, its lock and what is carried.

    `places` are more folders there to look for a Python in; without `uses_services` the agent is always
    kept by a process of our own.  `package` is the folder of the arriero that is installed.
    """

    def __init__(
        self,
        dist: Path,
        clock: Clock,
        *,
        places: Sequence[str] = PYTHON_PLACES,
        uses_services: bool = True,
        package: Path = PACKAGE,
    ) -> None:
        self._source = Source(dist, package, asyncio.Lock())
        self._clock = clock
        self._places = tuple(places)
        self._uses_services = uses_services

    async def survey(self, connection: Connection, install_path: str, tell: Tell) -> Survey:
        """Return what a machine is and has, see `survey.survey`."""
        return await survey(connection, install_path, tell, clock=self._clock, places=self._places)

    async def install(
        self, connection: Connection, found: Survey, tell: Tell, *, carry: bool = False
    ) -> Installation:
        """Install the running version, see `environment.install`; `carry`: do not ask its index at all."""
        return await environment.install(connection, found, tell, source=self._source, carry=carry)

    async def switch_back(self, connection: Connection, installation: Installation, tell: Tell) -> None:
        """Go back to the environment before, see `environment.switch_back`."""
        await environment.switch_back(connection, installation, tell)

    async def roll_back(self, connection: Connection, installation: Installation, tell: Tell) -> None:
        """Stop the agent and undo an installation, see `environment.roll_back`."""
        await self.stop(connection, installation.install_path, tell)
        await environment.roll_back(connection, installation, tell)

    async def start(self, connection: Connection, install_path: str, name: str, tell: Tell) -> None:
        """Start the agent, see `running.start`."""
        await running.start(
            connection, install_path, name, tell, uses_services=self._uses_services, places=self._places
        )

    async def stop(self, connection: Connection, install_path: str, tell: Tell) -> None:
        """Stop the agent and its workers, see `running.stop`."""
        await running.stop(connection, install_path, tell, places=self._places)

    async def remove(self, connection: Connection, install_path: str, tell: Tell, *, purge: bool) -> None:
        """Take away what we put there, see `running.remove`."""
        await running.remove(connection, install_path, tell, purge=purge, places=self._places)

    async def logs(self, connection: Connection, install_path: str, lines: int) -> LogEnd:
        """Return the end of the agent's log, see `running.logs`."""
        return await running.logs(connection, install_path, lines)

    async def doctor(self, connection: Connection, install_path: str) -> list[Finding]:
        """Return what is well and what is wrong there, see `doctor.doctor`."""
        return await doctor(connection, install_path, clock=self._clock, places=self._places)
