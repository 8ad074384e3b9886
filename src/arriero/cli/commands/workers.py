"""`arriero workers`: which workers are there, how is one stopped, what does its log say?"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import click

from arriero.cli import options, render
from arriero.cli.signals import terminable
from arriero.client import discovery
from arriero.client.api import Agent, Orchestrator
from arriero.client.connection import Limits
from arriero.contracts import ids
from arriero.contracts.errors import ArrieroError, ErrorCode, Exit
from arriero.contracts.records import WorkerRecord
from arriero.contracts.states import WorkerState

_COLUMNS: Final = (
    "worker",
    "state",
    "model",
    "node",
    "device",
    "slots",
    "queued",
    "memory",
    "idle for",
    "pid",
)
_STOP_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.1
_LIST_EXAMPLES: Final = ("arriero workers list", "arriero ps --json")


@click.group(epilog=options.examples(("arriero workers list", "arriero workers logs -f w-0123456789ab")))
def workers() -> None:
    """List and stop workers, read their logs."""


@click.command("list", epilog=options.examples(_LIST_EXAMPLES))
@options.json_option
def list_workers(*, as_json: bool) -> int:
    """List the workers of the pool."""
    found = _pool().workers()
    if as_json:
        render.data({"workers": found})
    else:
        show_workers(found)
    return Exit.OK


workers.add_command(list_workers)


@workers.command(
    "stop", epilog=options.examples(("arriero workers stop w-0123456789ab", "arriero workers stop --all"))
)
@click.argument("worker_ids", nargs=-1, metavar="[ID]...")
@click.option("--all", "is_all", is_flag=True, help="Stop every worker of the pool.")
@click.option("--timeout", type=click.FloatRange(0, 3600, min_open=True), default=_STOP_TIMEOUT_S,
              show_default=True, metavar="S", help="Seconds to wait for each.")  # fmt: skip
@options.json_option
def stop_workers(*, worker_ids: Sequence[str], is_all: bool, timeout: float, as_json: bool) -> int:
    """Stop workers gracefully: what they compute is finished first, within the grace time."""
    if bool(worker_ids) == is_all:
        raise click.UsageError("name the workers to stop, or give --all")
    client = _pool()
    chosen = list(worker_ids) if worker_ids else [record.worker_id for record in client.workers()]
    for worker_id in chosen:
        client.stop_worker(_checked(worker_id), timeout_s=timeout)
    for worker_id in chosen:
        _wait_stopped(client, worker_id, deadline=time.monotonic() + timeout)
        if not as_json:
            render.out(f"{worker_id} stopped")
    if as_json:
        render.data({"stopped": chosen})
    elif not chosen:
        render.note("there are no workers")
    return Exit.OK


@workers.command(
    "logs", epilog=options.examples(("arriero workers logs w-0123456789ab", "arriero workers logs -f w-…"))
)
@click.argument("worker_id", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on.")
@click.option("--json", "as_json", is_flag=True, help="Print {worker_id, lines} as JSON (not with --follow).")
def logs(*, worker_id: str, follow: bool, as_json: bool) -> int:
    """Print a worker's log."""
    if follow and as_json:
        raise click.UsageError("--follow has no end, and --json needs one")
    _checked(worker_id)
    with terminable():
        content = _local_log(worker_id) if not follow else None
        if content is None:
            pieces = _log_of_pool(worker_id, follow=follow)
            if not as_json:
                for piece in pieces:
                    render.log(piece)
                return Exit.OK
            content = b"".join(pieces)
    if as_json:
        render.data({"worker_id": worker_id, "lines": content.decode("utf-8", "replace").splitlines()})
    else:
        render.log(content)
    return Exit.OK


def _log_of_pool(worker_id: str, *, follow: bool) -> Iterator[bytes]:
    """Yield a log as the orchestrator passes it on, wherever the worker lives; this agent's without one."""
    if discovery.given_orchestrator() is None and discovery.state_of().running("orchestrator") is None:
        agent = discovery.agent()
        return Agent(agent.url, agent.token).worker_log(worker_id, follow=follow)
    return options.orchestrator().worker_log(worker_id, follow=follow)


def show_workers(found: Sequence[WorkerRecord]) -> None:
    """Print workers as a table."""
    now = time.time()
    render.table(
        _COLUMNS,
        [
            [
                record.worker_id,
                f"{record.state} {record.load_fraction:.0%}"
                if record.state == "loading"
                else str(record.state),
                record.model_ref,
                record.node,
                record.device,
                f"{record.slots_total - record.slots_available}/{record.slots_total}",
                str(record.queued),
                render.mib_text(record.memory_mb) if record.memory_mb else "",
                render.seconds_text(now - record.last_activity_unix) if record.state == "idle" else "",
                str(record.pid),
            ]
            for record in found
        ],
    )


def _pool() -> Orchestrator | Agent:
    """Return who knows the workers: the orchestrator, or this machine's agent where none runs."""
    limits = Limits(total_s=30.0, attempts=3)
    try:
        address = discovery.orchestrator()
    except ArrieroError as error:
        if error.code is not ErrorCode.NOT_RUNNING:
            raise
        agent = discovery.agent()
        return Agent(agent.url, agent.token, limits=limits)
    return Orchestrator(address.url, address.token, limits=limits)


def _wait_stopped(client: Orchestrator | Agent, worker_id: str, *, deadline: float) -> None:
    """Wait until a worker that was told to stop has ended.  Raises REQUEST_TIMEOUT at the deadline."""
    while True:
        try:
            if client.worker(worker_id).state in (WorkerState.STOPPED, WorkerState.FAILED):
                return
        except ArrieroError as error:
            if error.code is ErrorCode.WORKER_NOT_FOUND:
                return
            raise
        if time.monotonic() > deadline:
            raise ArrieroError(
                ErrorCode.REQUEST_TIMEOUT, f"{worker_id} drains still; it ends when what it computes is done"
            )
        time.sleep(_POLL_S)


def _checked(worker_id: str) -> str:
    if not ids.WORKER_ID.fullmatch(worker_id):
        raise ArrieroError(
            ErrorCode.WORKER_NOT_FOUND, f"{worker_id[:80]!r} is no worker id (w- and 12 hex digits)"
        )
    return worker_id


def _local_log(worker_id: str) -> bytes | None:
    """Return the log from its file: the dead are readable without an agent; None if it is not here."""
    path: Path = options.state().logs / "workers" / f"{worker_id}.log"
    try:
        older = path.with_name(path.name + ".1")
        return (older.read_bytes() if older.exists() else b"") + path.read_bytes()
    except OSError:
        return None
