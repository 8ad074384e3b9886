"""Does a model load, and is it told how far?"""

from pytest_bdd import then

from tests.bdd.world import World


@then("its loading progress streams")
def then_stream_loading_progress(world: World) -> None:
    """Read a worker's loading up to `ready` by `arriero probe loading-progress`.

    0; 1 NO_WORKERS, PROGRESS_STREAM_FAILED, PROGRESS_STREAM_ERROR; 124 PROGRESS_STREAM_TIMEOUT.
    """
    seen = world.probe("loading-progress")
    world.events = seen["frames"]


@then("the fraction rises to 1 and the stage is ready")
def then_fraction_rises(world: World) -> None:
    fractions = [frame["fraction"] for frame in world.events]
    assert fractions == sorted(fractions), fractions
    assert world.events[-1]["stage"] == "ready"
    assert fractions[-1] == 1.0
