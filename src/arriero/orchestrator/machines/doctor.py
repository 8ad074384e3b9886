"""What is wrong with a machine that arriero is installed on?"""

from collections.abc import Sequence
from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import NodeStep
from arriero.contracts.records import Finding
from arriero.fabrics.base import Connection
from arriero.orchestrator.machines.survey import survey
from arriero.orchestrator.machines.there import PYTHON_PLACES, ask
from arriero.runtime.clock import Clock

#: Every file of the environment is read through.
EXAMINE_TIMEOUT_S: Final = 180.0
#: What a survey warns of by the name of its step, where there is an error code for it.
_WARNED: Final = {"disk": ErrorCode.INSUFFICIENT_DISK}


async def doctor(
    connection: Connection, install_path: str, *, clock: Clock, places: Sequence[str] = PYTHON_PLACES
) -> list[Finding]:
    """Return what was looked at there, and what of it is wrong.  Raises NODE_UNREACHABLE."""
    found: list[Finding] = []

    def tell(step: NodeStep) -> None:
        is_ok = not step.message.startswith("warning")
        code = None if is_ok else _WARNED.get(step.step)
        found.append(Finding(name=step.step, is_ok=is_ok, message=step.message, code=code))

    try:
        machine = await survey(connection, install_path, tell, clock=clock, places=places)
        answer = await ask(
            connection, machine.python, "examine", timeout_s=EXAMINE_TIMEOUT_S, path=machine.install_path
        )
    except ArrieroError as error:
        if error.code is ErrorCode.NODE_UNREACHABLE:
            raise
        failed = Finding(
            name="survey", is_ok=False, message=error.message, code=error.code, advice=error.advice
        )
        return [*found, failed]
    for each in answer:
        code = None if each["is_ok"] else ErrorCode(each["code"])
        found.append(Finding(name=each["name"], is_ok=each["is_ok"], message=each["message"], code=code))
    return found
