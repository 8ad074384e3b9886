"""Which build of the engine does a machine that joins get?  (The one that suits its hardware.)"""

from typing import Final

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorResponse, from_body
from arriero.contracts.events import CheckFrame, NodeStep
from arriero.contracts.records import EngineList
from arriero.contracts.requests import EngineInstallBody
from arriero.domain.engine_builds import install_command
from arriero.orchestrator.machines.survey import Tell
from arriero.orchestrator.nodes import Node

#: A build is looked at in a process of its own, and a wheel of 500 MB may come slowly; beats come meanwhile.
SILENCE_S: Final = 60.0
_EVENT_STREAM: Final = {"Accept": "text/event-stream"}


async def fit_engine(node: Node, tell: Tell) -> None:
    """Have the build that suits a machine installed there, unless it is; each step is told.

    One that cannot be had keeps nobody from joining: the machine says what it lacks wherever it matters,
    and nothing runs on a slower backend because of it.
    """
    try:
        found = await node.peer.call("GET", "/v1/engines", answer=EngineList)
        usable = {build.name for build in found.builds if not build.problem}
        if found.wanted in usable:
            tell(
                NodeStep(step="engine", message=f"its engine is {found.wanted}: {found.why}", actor=node.name)
            )
            return
        message = f"needs the engine's build {found.wanted}: {found.why}"
        tell(NodeStep(step="engine", message=message, actor=node.name))
        await _install(node, tell)
    except ArrieroError as error:
        message = f"its engine was not installed: {error.message}"
        tell(NodeStep(step="engine", message=message, actor=node.name))
        message = f"{error.advice} The command is `{install_command(node.name)}`."
        tell(NodeStep(step="engine", message=message, actor=node.name))
    else:
        tell(NodeStep(step="engine", message=f"has the build {found.wanted} now", actor=node.name))


async def _install(node: Node, tell: Tell) -> None:
    events = node.peer.events(
        "/v1/engines/install",
        method="POST",
        body=EngineInstallBody(),
        headers=_EVENT_STREAM,
        silence_s=SILENCE_S,
    )
    try:
        async for event in events:
            if event.comment is not None or event.is_done or not event.data:
                continue
            if event.event == "error":
                raise from_body(msgspec.json.decode(event.data, type=ErrorResponse).error)
            try:
                frame = msgspec.json.decode(event.data, type=CheckFrame)
            except msgspec.ValidationError:
                continue  # The answer, which the next question brings as well.
            fraction = frame.bytes_read / frame.bytes_total if frame.bytes_total else None
            tell(NodeStep(step="engine", message=frame.what, actor=node.name, fraction=fraction))
    finally:
        await events.aclose()
