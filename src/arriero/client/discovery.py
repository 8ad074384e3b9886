"""Where do orchestrator, agent and workers of our own pool answer, and with which token?"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.runtime import settings
from arriero.runtime.processes import is_alive
from arriero.runtime.state_dir import StateDir, worker_identity

_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})


class Address(msgspec.Struct, frozen=True):
    """Where a daemon answers; `token` is empty where none is demanded."""

    url: str
    token: str = ""


def state_of(env: Mapping[str, str] | None = None) -> StateDir:
    """Return the state folder that settings and environment name; it need not exist.

    Raises INVALID_SETTINGS if only a whole look at the settings could tell, and they are not valid.
    """
    env = os.environ if env is None else env
    if env.get("ARRIERO_HOME"):
        # A wrong setting elsewhere must not keep anybody from looking at, or ending, a pool.
        return StateDir(Path(env["ARRIERO_HOME"]).expanduser().absolute())
    return StateDir(settings.load(env).home_path())


def given_orchestrator(env: Mapping[str, str] | None = None) -> Address | None:
    """Return the orchestrator that ARRIERO_URL names; None if it is not set."""
    env = os.environ if env is None else env
    url = env.get("ARRIERO_URL", "")
    return Address(url.rstrip("/"), env.get("ARRIERO_API_KEY", "")) if url else None


def running_orchestrator(state: StateDir) -> Address | None:
    """Return the orchestrator that runs with this state folder; None if none does."""
    return _running(state, "orchestrator")


def running_agent(state: StateDir) -> Address | None:
    """Return the agent that runs with this state folder; None if none does."""
    return _running(state, "agent")


def orchestrator(env: Mapping[str, str] | None = None) -> Address:
    """Return ARRIERO_URL's orchestrator, else the one of the state folder.

    Raises NOT_RUNNING if there is none.
    """
    found = given_orchestrator(env) or running_orchestrator(state_of(env))
    if found is None:
        raise ArrieroError(ErrorCode.NOT_RUNNING, "no orchestrator runs with this state folder")
    return found


def agent(env: Mapping[str, str] | None = None) -> Address:
    """Return the agent of the state folder.  Raises NOT_RUNNING if there is none."""
    found = running_agent(state_of(env))
    if found is None:
        raise ArrieroError(ErrorCode.NOT_RUNNING, "no agent runs with this state folder")
    return found


def token_for(url: str, env: Mapping[str, str] | None = None) -> str:
    """Return the token to send to `url`: the one of our own daemon or worker that answers there.

    ARRIERO_API_KEY belongs to ARRIERO_URL alone.  Empty where the address is none of ours.
    """
    wanted = _host_and_port(url)
    if wanted is None:
        return ""
    given = given_orchestrator(env)
    if given is not None and _host_and_port(given.url) == wanted:
        return given.token
    state = state_of(env)
    for found in (_running(state, "agent"), _running(state, "orchestrator")):
        if found is not None and _host_and_port(found.url) == wanted:
            return found.token
    for run in state.worker_runs():
        if _host_and_port(run.record.url) == wanted and is_alive(worker_identity(run)):
            return run.token
    return ""


def _running(state: StateDir, role: str) -> Address | None:
    record = state.running(role)
    return None if record is None else Address(record.url.rstrip("/"), record.token)


def _host_and_port(url: str) -> tuple[str, int] | None:
    try:
        split = urlsplit(url)
        host, port = split.hostname, split.port
    except ValueError:
        return None
    if not host:
        return None
    return ("loopback" if host in _LOOPBACK else host, port or (443 if split.scheme == "https" else 80))
