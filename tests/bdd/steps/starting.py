"""Does a worker come up?"""

import msgspec
from pytest_bdd import given, parsers, then, when

from arriero.agent.held import callback_token
from arriero.client.api import Agent
from arriero.client.connection import Limits
from arriero.contracts.errors import ArrieroError
from arriero.contracts.records import WorkerRunRecord
from arriero.contracts.requests import ReadyCallback
from arriero.runtime.state_dir import read
from tests.bdd.world import LOG, World


@given("I wait for the model, too")
def given_wait_for_model(world: World) -> None:
    world.kept["until"] = "idle"


@when("a worker is spawned")
def when_spawn_worker_process(world: World) -> None:
    """Have a worker started by `arriero probe worker-spawn`, and watch it until it is registered.

    0; 1 WORKER_BINARY_NOT_FOUND, WORKER_START_FAILED, NO_READY_WORKERS, NODE_UNREACHABLE and what else
    the agent refuses with; 124 WORKER_READY_TIMEOUT.
    """
    until = world.kept.get("until", "registered")
    seen = world.probe("worker-spawn", "--model", world.model, "--until", until, has_worker=False)
    world.worker_id = seen.get("worker_id", world.worker_id)
    world.kept["stages"] = seen["stages"]


@given("the worker's HTTP server has started")
@then("the worker's HTTP server starts")
def given_worker_http_started(world: World) -> None:
    """Wait until the worker's HTTP server answers with its id; the codes of `worker-ready`."""
    _watch(world, "http")


@given("the worker has sent its ready callback")
@then("the worker sends its ready callback")
def given_worker_sent_callback(world: World) -> None:
    """Wait until the agent has taken the worker's ready callback; the codes of `worker-ready`."""
    _watch(world, "callback")


@then("the worker is registered")
def then_register_worker(world: World) -> None:
    """Wait until the registry lists the worker with its address; the codes of `worker-ready`."""
    _watch(world, "registered")


@given("the worker is ready and idle")
@then("the worker becomes ready and idle")
def given_worker_ready_idle(world: World) -> None:
    """Wait until the worker takes requests; the codes of `worker-ready`.

    0; 1 NO_READY_WORKERS, WORKER_START_FAILED; 124 WORKER_READY_TIMEOUT, LOADING_TIMEOUT.
    """
    _watch(world, "idle")


def _watch(world: World, stage: str) -> None:
    seen = world.probe("worker-ready", "--until", stage)
    world.kept["stages"] = seen["stages"]
    if world.last_exit_code == 0:
        assert stage in seen["stages"], seen


@then(parsers.parse("the stages reached are {stages}"))
def then_stages(world: World, stages: str) -> None:
    assert list(world.kept["stages"]) == stages.replace(",", " ").split()


@when("the same worker calls back with another address")
def when_calls_back_again(world: World) -> None:
    """Send the agent a second ready callback, with the worker's own token and an address that is not its."""
    _call_back(world, world.worker().url.rsplit(":", 1)[0] + ":1", callback_token(_run(world).token))


@when("somebody else calls back for the worker")
def when_stranger_calls_back(world: World) -> None:
    """Send the agent a ready callback with a token that is not the worker's."""
    _call_back(world, world.worker().url, "0" * 64)


def _run(world: World) -> WorkerRunRecord:
    run = read(world.running_pool.state.worker_file(world.worker().worker_id), WorkerRunRecord)
    assert run is not None
    return run


def _call_back(world: World, url: str, token: str) -> None:
    record = world.worker()
    body = ReadyCallback(
        worker_id=record.worker_id, url=url, model_ref=record.model_ref, backend="cpu", device="cpu"
    )
    agent = Agent(world.running_pool.record("agent").url, token, limits=Limits(total_s=60))
    try:
        agent.send("POST", "/v1/workers/ready", body=msgspec.to_builtins(body))
    except ArrieroError as error:
        LOG.info("the callback was refused: %s", error)
        world.took(int(error.kind.exit_code), error.code.value, error.message, **error.body().details)
    else:
        world.took(0, None)
