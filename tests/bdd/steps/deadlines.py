"""Does one deadline, set by the person, end the work in every layer?"""

import os
import signal

from pytest_bdd import given, parsers, then

from arriero.client.api import Worker
from arriero.contracts.records import WorkerRunRecord
from arriero.domain.deadlines import for_next_hop
from arriero.runtime.state_dir import read
from arriero.testing.pool import eventually
from tests.bdd.world import LOG, World


@given("the orchestrator will be frozen while it relays")
def given_orchestrator_freezes(world: World) -> None:
    """Stop its process once the request computes; it goes on when the scenario ends."""
    pid = world.running_pool.process("orchestrator").pid

    def freeze() -> None:
        world.worker_in("busy")
        os.kill(pid, signal.SIGSTOP)
        LOG.info("the orchestrator is frozen")

    world.meanwhile = freeze
    world.at_end(lambda: os.kill(pid, signal.SIGCONT))


@given("the worker will be frozen while it computes")
def given_worker_freezes(world: World) -> None:
    pid = world.worker().pid

    def freeze() -> None:
        world.worker_in("busy")
        os.kill(pid, signal.SIGSTOP)
        LOG.info("the worker is frozen")

    world.meanwhile = freeze
    world.at_end(lambda: os.kill(pid, signal.SIGCONT))


@then("the time-out cascades")
def then_timeout_cascades(world: World) -> None:
    """Ask as a person does, with a deadline, and look at every layer afterwards.

    0 when the answer came in time; else 124 REQUEST_TIMEOUT, told by the innermost layer that could.
    """
    assert world.timeout_s is not None, "the scenario sets a deadline"
    limit = ["--max-tokens", str(world.max_tokens)] if world.max_tokens is not None else []
    before = timed_out_in_worker(world)
    answer = world.cli(
        "infer", "--model", world.model, *limit, "--timeout", f"{world.timeout_s:g}", world.prompt
    )
    world.tokens = [answer["text"]] if answer.get("text") else []
    world.kept["task_id"] = answer.get("task_id")
    world.kept["timed_out_before"] = before


@then("the worker gave up first, with less time than the person had")
def then_worker_gave_up(world: World) -> None:
    """The worker told the error; its limit is the person's, shrunk over two hops; it counted the end."""
    assert world.timeout_s is not None
    assert world.last_error is not None
    details = world.last_error.details
    assert details.get("layer") == "worker", dict(details)
    shrunk_ms = for_next_hop(for_next_hop(world.timeout_s * 1000))
    assert 0 < details["timeout_ms"] <= shrunk_ms, dict(details)
    assert timed_out_in_worker(world) == world.kept["timed_out_before"] + 1


@then("the orchestrator gave up in the worker's place")
def then_orchestrator_gave_up(world: World) -> None:
    assert world.last_error is not None
    assert world.last_error.details.get("layer") != "worker", dict(world.last_error.details)
    assert "orchestrator" in world.running_pool.daemon_log("orchestrator")
    state = world.running_pool.orchestrator.task(world.kept["task_id"]).state
    assert str(state) == "timed_out"


@then("the client gave up by itself")
def then_client_gave_up(world: World) -> None:
    assert world.last_error is not None
    assert "layer" not in world.last_error.details, dict(world.last_error.details)
    assert world.last_error.details.get("timeout_s"), dict(world.last_error.details)


@then(parsers.parse("the task is {state}"))
def then_task_is(world: World, state: str) -> None:
    pool = world.running_pool
    eventually(
        f"the task is {state}", lambda: str(pool.orchestrator.task(world.kept["task_id"]).state) == state
    )


@then("the slot is free again")
def then_slot_is_free(world: World) -> None:
    """The registry says idle with all slots, and the worker itself computes nothing."""

    def look() -> bool:
        record = world.worker()
        return str(record.state) == "idle" and record.slots_available == record.slots_total

    eventually("all slots are free", look)
    assert metric(world, "arriero_worker_slots_busy") == 0


def timed_out_in_worker(world: World) -> int:
    """Return how many requests ran out of time in the worker, as it counted them."""
    return metric(world, 'arriero_worker_requests_total{outcome="timed_out"}')


def worker_client(world: World) -> Worker:
    """Return a client of the worker, at its own address."""
    record = world.worker()
    known = read(world.running_pool.state.worker_file(record.worker_id), WorkerRunRecord)
    assert known is not None
    return Worker(record.url, known.token)


def metric(world: World, name: str) -> int:
    """Return a number of the worker's metrics page."""
    page = worker_client(world).raw("GET", "/metrics").content.decode()
    for line in page.splitlines():
        if line.startswith(f"{name} "):
            return int(float(line.split()[-1]))
    raise AssertionError(f"the worker has no metric {name}")
