"""Is a worker well?"""

from pytest_bdd import given, then

from tests.bdd.world import World


@given("its worker is healthy")
@then("the worker's health is asked")
def given_worker_is_healthy(world: World) -> None:
    """Ask a worker's health by `arriero probe worker-health`.

    0; 1 NO_WORKERS, WORKER_UNHEALTHY, HEALTH_CHECK_ERROR (also out of time).
    """
    world.probe("worker-health")
