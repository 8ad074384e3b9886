"""Which models are there?"""

import shutil

from pytest_bdd import given, parsers, then, when

from arriero.testing.gguf_writer import write_llama
from tests.bdd.world import World


@given(parsers.parse("the model is {ref}"))
def given_model(world: World, ref: str) -> None:
    world.model = ref


@given(parsers.parse("a model file {name}"))
def given_model_file(world: World, name: str) -> None:
    write_llama(world.tmp / name)
    world.kept["path"] = world.tmp / name


@given(parsers.parse("a file {name} that is no model"))
def given_junk_file(world: World, name: str) -> None:
    (world.tmp / name).write_bytes(b"not a model at all" * 100)


@given("the model's file is removed")
@when("the model's file is removed")
def when_file_is_removed(world: World) -> None:
    path = world.kept["path"]
    shutil.move(path, path.with_suffix(".away"))


@when("the model's file is changed")
def when_file_is_changed(world: World) -> None:
    path = world.kept["path"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)


@when(parsers.parse("the catalog is asked for {ref}"))
def when_query_model_catalog(world: World, ref: str) -> None:
    """Ask the agent's catalog by `arriero probe catalog`.

    0; 1 MODEL_NOT_FOUND, INVALID_MODEL_REFERENCE.
    """
    world.probe("catalog", "--model", _ref(world, ref), has_worker=False)


@then(parsers.parse("the model {path} is registered in the catalog"))
def then_register_model_in_catalog(world: World, path: str) -> None:
    """Have the agent take a file into its catalog, and read it again from there.

    By `arriero probe download-start` and `model-registered`: 0; 1 INVALID_MODEL_PATH, MODEL_CORRUPTED.
    """
    ref = (world.tmp / path).as_uri()
    world.probe("download-start", "--model", ref, has_worker=False)
    if world.last_exit_code == 0:
        world.probe("model-registered", "--model", ref, has_worker=False)


@then(parsers.parse("the file behind {ref} is as registered"))
def then_model_is_registered(world: World, ref: str) -> None:
    """Have the agent read a model's file again by `arriero probe model-registered`."""
    world.probe("model-registered", "--model", _ref(world, ref), has_worker=False)


@then("the files behind the whole catalog are as registered")
def then_all_models_are_registered(world: World) -> None:
    seen = world.probe("model-registered", has_worker=False)
    world.kept["models"] = seen["models"]


@when(parsers.parse("a download of {ref} is begun"))
def when_initiate_download(world: World, ref: str) -> None:
    """Have the agent fetch a model by `arriero probe download-start`, until it has begun.

    0; 1 MODEL_NOT_FOUND, INVALID_MODEL_REFERENCE, INVALID_MODEL_PATH, DOWNLOAD_FAILED and what else the agent tells.
    """
    seen = world.probe("download-start", "--model", _ref(world, ref), has_worker=False)
    world.events = seen.get("frames", [])
    if "progress_url" in seen:
        world.addresses["the download"] = seen["progress_url"]


def _ref(world: World, ref: str) -> str:
    """Return the reference a feature file means: `the model`, `the file NAME`, or one as it stands."""
    if ref == "the model":
        return world.model
    if ref.startswith("the file "):
        return (world.tmp / ref.removeprefix("the file ")).as_uri()
    return ref
