"""`arriero up`: how do orchestrator and agent come up on this machine?"""

import signal
import time
from typing import Any, Final

import click

from arriero.cli import launch, options, render, teardown
from arriero.cli.narrator import Narrator
from arriero.cli.signals import Terminated, terminable, undisturbed
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.runtime import settings
from arriero.runtime.state_dir import StateDir

_EXAMPLES: Final = (
    "arriero up",
    "arriero up --port 0 --json",
    "arriero up --foreground        # for a service unit",
)
_WATCH_S: Final = 0.2


@click.command(epilog=options.examples(_EXAMPLES))
@click.option("--port", type=click.IntRange(0, 65535), help="Port of the orchestrator; 0 takes a free one.")
@click.option("--agent-port", type=click.IntRange(0, 65535), help="Port of the agent; 0 takes a free one.")
@click.option("--name", metavar="NAME", help="Name of this machine in the pool.")
@click.option("--foreground", is_flag=True, help="Stay, logs on stderr, until Ctrl-C or SIGTERM ends all.")
@click.option("--timeout", type=click.FloatRange(0, 3600, min_open=True), default=launch.START_TIMEOUT_S,
              show_default=True, metavar="S", help="Seconds both have to answer.")  # fmt: skip
@options.quiet_option
@options.json_option
def up(*, as_json: bool, quiet: bool, foreground: bool, timeout: float, **flags: Any) -> int:
    """Start orchestrator and agent on this machine.

    They stay in the background until `arriero down`.  What runs already is left alone.
    """
    state = options.state()
    narrator = Narrator(is_quiet=quiet)
    # Wrong settings are told here, before anything starts.
    found = settings.load(
        flags={
            "orchestrator_port": flags["port"], "agent_port": flags["agent_port"], "node_name": flags["name"],
        }
    )  # fmt: skip
    state.prepare()
    with terminable():
        starting = launch.Launch(
            state, tell=lambda text: narrator.say("arriero", text), log_to_stderr=foreground
        )
        with launch.turn(state):
            missing = [role for role in teardown.ROLES if state.running(role) is None]
            if foreground and len(missing) < 2:
                raise ArrieroError(ErrorCode.ALREADY_RUNNING, "an orchestrator or agent runs here already")
            for role in missing:
                narrator.say("arriero", f"starting the {role}")
                starting.begin(launch.Plan(role, _flags(role, flags, foreground)))
            starting.wait(timeout)
        _tell(state, missing, as_json=as_json)
        if foreground:
            _stay(state, starting, found.stop_grace_s, narrator)
    return 0


def _flags(role: str, given: dict[str, Any], foreground: bool) -> list[str]:
    flags = launch.with_us() if foreground else []
    port = given["port"] if role == "orchestrator" else given["agent_port"]
    if port is not None:
        flags += ["--port", str(port)]
    if role == "agent" and given["name"]:
        flags += ["--name", given["name"]]
    return flags


def _tell(state: StateDir, missing: list[str], *, as_json: bool) -> None:
    records = {role: state.running(role) for role in teardown.ROLES}
    if as_json:
        shown = {
            role: None
            if record is None
            else {"url": record.url, "pid": record.pid, "was_running": role not in missing}
            for role, record in records.items()
        }
        render.data(shown)
        return
    orchestrator = records["orchestrator"]
    if orchestrator is not None and "orchestrator" not in missing and _leaves_when_idle(orchestrator.pid):
        render.note(
            "it was started by `infer` and leaves when idle; `arriero down`, then `up`, makes it stay"
        )
    for role, record in records.items():
        if record is not None:
            how = "" if role in missing else "  (was running already)"
            render.out(f"{role:<13} {record.url}{how}")


def _leaves_when_idle(pid: int) -> bool:
    import psutil

    try:
        return "--background" in psutil.Process(pid).cmdline()
    except psutil.Error:
        return False


def _stay(state: StateDir, starting: launch.Launch, grace_s: float, narrator: Narrator) -> None:
    """Wait until a signal comes or a daemon ends; then end all."""
    try:
        while True:
            for role, process in starting.children().items():
                code = process.poll()
                if code is not None:
                    raise ArrieroError(
                        ErrorCode.DAEMON_START_FAILED, f"the {role} ended with exit code {code}", role=role
                    )
            time.sleep(_WATCH_S)
    except (KeyboardInterrupt, Terminated) as ended:
        # A service that was asked to stop and did has not failed.
        if isinstance(ended, Terminated) and ended.number != signal.SIGTERM:
            raise
    finally:
        with undisturbed():
            teardown.down(state, grace_s=grace_s, tell=lambda text: narrator.say("arriero", text))
