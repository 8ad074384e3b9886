"""How is a machine's agent started, stopped, read and taken away?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import NodeStep
from arriero.fabrics.base import Connection
from arriero.orchestrator.machines.survey import Tell
from arriero.orchestrator.machines.there import PYTHON_PLACES, ask, look

#: The first start of a fresh environment compiles what it imports.
START_TIMEOUT_S: Final = 60.0
#: The agent gives its workers 30 s (`stop_grace_s`), all at once.
STOP_GRACE_S: Final = 40.0
MARGIN_S: Final = 90.0
LOG_TIMEOUT_S: Final = 30.0
LOG_BYTES_MAX: Final = 4 * 1024 * 1024
_NO_LOG: Final = 66
#: $1 the log, $2 how many lines, $3 how many bytes.  See `runtime.log_files` for the one before.
_LOG_END: Final = f"""
[ -f "$1" ] || exit {_NO_LOG}
{{ cat "$1.1" 2>/dev/null; cat "$1"; }} | tail -n "$2" | tail -c "$3"
"""


async def start(
    connection: Connection, install_path: str, name: str, tell: Tell, *, uses_services: bool = True,
    places: Sequence[str] = PYTHON_PLACES,
) -> None:  # fmt: skip
    """Start the agent detached, unless one runs, and wait until its health route answers there.

    Raises DAEMON_START_FAILED (details: log_tail; nothing runs then), INSTALL_FAILED, NODE_UNREACHABLE.
    """
    python = await _python(connection, places)
    done = await ask(
        connection, python, "start", timeout_s=START_TIMEOUT_S + MARGIN_S, path=install_path, name=name,
        uses_services=uses_services, answer_timeout_s=START_TIMEOUT_S,
    )  # fmt: skip
    message = f"the agent was started, kept by {done['how']}" if done["is_new"] else "the agent runs already"
    tell(NodeStep(step="agent", message=message))


async def stop(
    connection: Connection, install_path: str, tell: Tell, *, grace_s: float = STOP_GRACE_S,
    places: Sequence[str] = PYTHON_PLACES,
) -> None:  # fmt: skip
    """Stop the agent and its workers: asked first, killed after `grace_s`.  Safe to call twice."""
    python = await _python(connection, places)
    done = await ask(
        connection, python, "stop", timeout_s=grace_s + MARGIN_S, path=install_path, grace_s=grace_s
    )
    message = "the agent has ended" if done["was_running"] else "no agent ran"
    if done["killed"]:
        message += f"; {done['killed']} processes had to be killed"
    tell(NodeStep(step="stop", message=message))


async def remove(
    connection: Connection, install_path: str, tell: Tell, *, purge: bool, grace_s: float = STOP_GRACE_S,
    places: Sequence[str] = PYTHON_PLACES,
) -> None:  # fmt: skip
    """Stop what we started there; with `purge` take everything away that arriero put there.

    Raises INSTALL_PATH_UNUSABLE if what is there is not ours.  Safe to call twice.
    """
    python = await _python(connection, places)
    done = await ask(
        connection, python, "remove", timeout_s=grace_s + 2 * MARGIN_S, path=install_path, purge=purge,
        grace_s=grace_s,
    )  # fmt: skip
    message = "nothing of arriero runs there any more"
    if purge:
        message = "nothing of arriero is left there" if done["is_clean"] else "what is not arriero's was left"
    tell(NodeStep(step="clean", message=message))


@dataclass(frozen=True, slots=True)
class LogEnd:
    """The last lines of a log, whole ones."""

    content: bytes
    #: Whether earlier ones of those that were asked for are left out: together they are too large.
    is_cut: bool


async def logs(
    connection: Connection, install_path: str, lines: int, *, bytes_max: int = LOG_BYTES_MAX
) -> LogEnd:
    """Return the last lines of the agent's log, of what was moved away from it too, `bytes_max` at most.

    Raises NOT_FOUND if it has none, NODE_UNREACHABLE.
    """
    path = f"{install_path}/home/logs/agent.log"
    # A byte more than there may be tells that there were more.
    argv = ["sh", "-c", _LOG_END, "sh", path, str(lines), str(bytes_max + 1)]
    try:
        done = await connection.run(argv, timeout_s=LOG_TIMEOUT_S, output_bytes_max=bytes_max + 1)
    except ArrieroError as error:
        if error.details.get("exit_code") == _NO_LOG:
            raise ArrieroError(ErrorCode.NOT_FOUND, "the agent there has no log") from error
        raise
    content = done.stdout
    is_cut = len(content) > bytes_max
    return LogEnd(content.partition(b"\n")[2] if is_cut else content, is_cut)


async def _python(connection: Connection, places: Sequence[str]) -> str:
    return (await look(connection, places)).best().path
