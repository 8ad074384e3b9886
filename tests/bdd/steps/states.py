"""Where is a worker, and which way does it go?"""

import subprocess

from pytest_bdd import given, parsers, then, when

from arriero.testing.pool import ARRIERO, eventually
from tests.bdd.world import LOG, World


@then(parsers.parse("the worker goes to {state}"))
def then_worker_transitions_to_state(world: World, state: str) -> None:
    """Watch a worker by `arriero probe worker-state` until it is in `state`.

    0; 1 NO_WORKERS, UNKNOWN_WORKER_STATE, WORKER_STATE_MISMATCH, INVALID_STATE_TRANSITION.
    """
    seen = world.probe("worker-state", "--expect", state, "--watch")
    world.kept["states"] = seen["states"]


@then(parsers.parse("the worker is {state} now"))
def then_worker_is(world: World, state: str) -> None:
    """One look: the same codes as watching."""
    seen = world.probe("worker-state", "--expect", state)
    world.kept["states"] = seen["states"]


@then(parsers.parse("the worker goes from {from_state} through {through_state} to {to_state}"))
def then_worker_transitions(world: World, from_state: str, through_state: str, to_state: str) -> None:
    """Watch a worker go this way by `arriero probe worker-state`; the same codes as above."""
    way = ["--from", from_state, "--through", through_state, "--expect", to_state]
    seen = world.probe("worker-state", *way)
    world.kept["states"] = seen["states"]


@then(parsers.parse("the states seen are {states}"))
def then_states_seen(world: World, states: str) -> None:
    assert world.kept["states"] == states.replace(",", " ").split()


@given("a request will come while the worker is watched")
def given_request_meanwhile(world: World) -> None:
    """Ask for tokens as soon as the program that watches has said so."""

    def ask() -> None:
        world.hears("is idle")
        limit = ["--max-tokens", str(world.max_tokens)] if world.max_tokens is not None else []
        asking = [*ARRIERO, "probe", "tokens", "--prompt", world.prompt, *limit]
        process = subprocess.Popen(
            asking,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=world.env,
        )
        world.ends.callback(process.wait, 60)
        LOG.info("a request is on its way")

    world.meanwhile = ask


@when("the worker is told to stop")
def when_worker_is_told_to_stop(world: World) -> None:
    world.running_pool.agent.stop_worker(world.worker().worker_id)


@then("the worker goes out of the registry")
def then_worker_leaves_registry(world: World) -> None:
    """Wait until the orchestrator has no living worker."""
    pool = world.running_pool
    eventually("no worker is left", lambda: not pool.orchestrator.workers())
