"""Which orchestrator serves this command: one that runs, or one started for it?"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from arriero.cli.narrator import Narrator
from arriero.cli.options import client_of
from arriero.cli.signals import undisturbed
from arriero.client import discovery
from arriero.client.api import Orchestrator
from arriero.client.stream import TASK_CODES
from arriero.runtime import settings
from arriero.runtime.state_dir import StateDir

if TYPE_CHECKING:
    from arriero.cli.launch import Plan, Started

#: A whole pool of one answer ends in a hurry: nobody else has anything running in it.
_EPHEMERAL_GRACE_S: Final = 5.0


@contextlib.contextmanager
def serving(*, is_ephemeral: bool, narrator: Narrator, timeout_s: float | None) -> Iterator[Orchestrator]:
    """Hold an orchestrator to ask: ARRIERO_URL's, the one that runs here, or one started now.

    With `is_ephemeral` what was started is gone afterwards, also when this process is killed, and also the
    workers on other machines, whose agents stay; else it stays in the background until it has been idle.
    What somebody else started is never stopped.
    """
    given = discovery.given_orchestrator()
    if given is not None:
        yield client_of(given, codes=TASK_CODES)
        return
    # Wrong settings are told before anything starts, and also where nothing needs to be started.
    settings.load()
    state = discovery.state_of()
    ours: list[Started] = []
    try:
        with _interruptions_end(state, ours, is_ephemeral):
            ours += _started(state, is_ephemeral=is_ephemeral, narrator=narrator, timeout_s=timeout_s)
            yield client_of(discovery.orchestrator(), codes=TASK_CODES)
    finally:
        narrator.clear()


@contextlib.contextmanager
def _interruptions_end(state: StateDir, ours: list["Started"], is_ephemeral: bool) -> Iterator[None]:
    try:
        yield
    finally:
        if is_ephemeral and ours:
            from arriero.cli import teardown

            with undisturbed():
                roles = {started.role for started in ours}
                teardown.down(state, grace_s=_EPHEMERAL_GRACE_S, tell=lambda _: None, roles=roles)


def _started(
    state: StateDir, *, is_ephemeral: bool, narrator: Narrator, timeout_s: float | None
) -> list["Started"]:
    """Start what is missing, and return what was started."""
    if state.running("orchestrator") is not None and not _is_agent_missing(state):
        return []
    from arriero.cli import launch

    state.prepare()
    with launch.turn(state):
        plans = _plans(state, is_ephemeral=is_ephemeral)
        if not plans:
            return []
        names = " and ".join(f"{plan.role}" for plan in plans)
        narrator.say("arriero", f"starting {names} in the background")
        starting = launch.Launch(state, tell=lambda text: narrator.say("arriero", text))
        for plan in plans:
            starting.begin(plan)
        limit_s = launch.START_TIMEOUT_S if timeout_s is None else min(timeout_s, launch.START_TIMEOUT_S)
        return [started for started in starting.wait(limit_s).values() if started.is_ours]


def _is_agent_missing(state: StateDir) -> bool:
    """Return whether this machine's agent died without cleaning up.

    An orchestrator without any agent here is as somebody wanted it: its nodes are elsewhere.
    """
    return state.running("agent") is None and state.recorded("agent") is not None


def _plans(state: StateDir, *, is_ephemeral: bool) -> list["Plan"]:
    from arriero.cli import launch

    needs_orchestrator = state.running("orchestrator") is None
    needs_agent = state.running("agent") is None and (needs_orchestrator or _is_agent_missing(state))
    bound = launch.with_us() if is_ephemeral else []
    found, default = settings.load(), settings.Settings()
    plans = []
    if needs_orchestrator:
        # A port that nobody chose is no reason to fail: whoever asks looks into the run file.
        any_port = found.orchestrator_port == default.orchestrator_port
        flags = ["--background", *bound, *(["--port", "0"] if is_ephemeral and any_port else [])]
        # Only an agent that came with it leaves with it; those of other machines are those machines' own.
        flags += ["--with-agent"] if needs_agent else []
        flags += ["--ephemeral"] if is_ephemeral else []
        plans.append(launch.Plan("orchestrator", flags, any_port=any_port))
    if needs_agent:
        any_port = found.agent_port == default.agent_port
        flags = [*bound, *(["--port", "0"] if is_ephemeral and any_port else [])]
        env = {"ARRIERO_LEASE_S": "0"} if is_ephemeral else {}
        plans.append(launch.Plan("agent", flags, env, any_port=any_port))
    return plans
