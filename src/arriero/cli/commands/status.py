"""`arriero status`: what runs here, and does it answer?"""

import time
from typing import Any, Final

import click

from arriero.cli import options, render, teardown
from arriero.cli.commands.workers import show_workers
from arriero.client import discovery
from arriero.client.api import Agent, Orchestrator
from arriero.client.connection import Limits
from arriero.contracts.errors import ArrieroError, Exit
from arriero.contracts.records import WorkerRecord
from arriero.runtime.processes import is_alive
from arriero.runtime.state_dir import StateDir, worker_identity

_EXAMPLES: Final = ("arriero status", "arriero status --json", "arriero status || arriero up")
_LIMITS: Final = Limits(connect_s=2.0, total_s=3.0)


@click.command(epilog=options.examples(_EXAMPLES))
@options.json_option
def status(*, as_json: bool) -> int:
    """Show orchestrator, agent and workers.

    Exit codes: 0 orchestrator and agent answer, 1 one of them does not.
    """
    state = options.state()
    given = discovery.given_orchestrator()
    daemons: dict[str, dict[str, Any] | None]
    if given is not None:
        daemons = {"orchestrator": _remote(given)}
    else:
        daemons = {role: _local(state, role) for role in teardown.ROLES}
    workers = _workers(state, given)
    is_well = all(daemon is not None and daemon["answers"] for daemon in daemons.values())
    if as_json:
        render.data({**daemons, "workers": workers})
        return Exit.OK if is_well else Exit.ERROR
    rows = []
    for role, daemon in daemons.items():
        if daemon is None:
            rows.append([role, "not running", "", "", "", ""])
        else:
            up = render.seconds_text(time.time() - daemon["started"]) if daemon["started"] else ""
            how = "running" if daemon["answers"] else "does not answer"
            rows.append([role, how, daemon["url"], str(daemon["pid"] or ""), up, daemon["version"]])
    render.table(["part", "state", "address", "pid", "up for", "version"], rows)
    if workers:
        render.out("")
        show_workers(workers)
    if not is_well:
        render.note("start what is missing: `arriero up`")
    return Exit.OK if is_well else Exit.ERROR


def _local(state: StateDir, role: str) -> dict[str, Any] | None:
    record = state.running(role)
    if record is None:
        return None
    kind = Agent if role == "agent" else Orchestrator
    return {
        "url": record.url,
        "pid": record.pid,
        "version": record.version,
        "started": record.started,
        "answers": _answers(kind(record.url, record.token, limits=_LIMITS)),
    }


def _remote(address: discovery.Address) -> dict[str, Any]:
    client = Orchestrator(address.url, address.token, limits=_LIMITS)
    try:
        health = client.health()
    except ArrieroError as error:
        render.note(f"{error.code}: {error.message}")
        return {"url": address.url, "pid": None, "version": "", "started": 0, "answers": False}
    found = {"url": address.url, "pid": health.pid or None, "version": health.version, "started": 0}
    return {**found, "answers": True}


def _answers(client: Agent | Orchestrator) -> bool:
    try:
        client.health()
    except ArrieroError:
        return False
    return True


def _workers(state: StateDir, given: discovery.Address | None) -> list[WorkerRecord]:
    """Return the workers as the orchestrator knows them, else the agent, else their own files."""
    asked: list[Agent | Orchestrator] = []
    address = given or discovery.running_orchestrator(state)
    if address is not None:
        asked.append(Orchestrator(address.url, address.token, limits=_LIMITS))
    agent = discovery.running_agent(state)
    if agent is not None and given is None:
        asked.append(Agent(agent.url, agent.token, limits=_LIMITS))
    for client in asked:
        try:
            return client.workers()
        except ArrieroError:
            continue
    if given is not None:
        return []
    return [run.record for run in state.worker_runs() if is_alive(worker_identity(run))]
