"""What does the Hub give, and who has the model already?"""

import shutil
from pathlib import Path

from pytest_bdd import given, parsers, then, when

from arriero.testing.gguf_writer import write_llama
from arriero.testing.pool import Pool, eventually
from tests.bdd.steps.downloads import DOWNLOAD, when_agent_fetches
from tests.bdd.world import World
from tests.support.other_programs import hf_cache

TOKEN = "hf_notASecret"
REPO = "someone/tiny"


def _serve_hub(world: World, *arguments: str) -> None:
    """Start a Hub with the repository; the scenario's programs know no other."""
    folder = world.tmp / "repo"
    folder.mkdir()
    whole = write_llama(folder / "tiny-Q8_0.gguf")
    shutil.copy(whole, world.tmp / "served.gguf")
    given = [f"--token={TOKEN}", *arguments]
    kind = next((a for a in ("--gated", "--private") if a in given), "--repo")
    given = [argument for argument in given if argument != kind]
    server = world.start_server("arriero.testing.hub", f"{kind}={REPO}={folder}", *given)
    world.addresses["the hub"] = server.url
    pool = world.make_pool()
    pool.variable("HF_ENDPOINT", server.url)
    pool.variable("HOME", str(world.tmp))


@given("a hub with a model")
def given_hub(world: World) -> None:
    _serve_hub(world)


@given(parsers.parse("a hub where the model is {kind}"))
def given_hub_that_refuses(world: World, kind: str) -> None:
    _serve_hub(world, f"--{kind}")


@given(parsers.parse("a hub that sends {count:d} bytes a second"))
def given_slow_hub(world: World, count: int) -> None:
    _serve_hub(world, f"--rate={count}")


@given("its token is known here")
def given_token(world: World) -> None:
    world.make_pool().variable("HF_TOKEN", TOKEN)


@given("the Hugging Face cache has the same model")
def given_cached(world: World) -> None:
    content = (world.tmp / "served.gguf").read_bytes()
    hf_cache(world.tmp / ".cache" / "huggingface" / "hub", REPO, {"tiny-Q8_0.gguf": content})


@given("another agent that has the model")
def given_other_agent(world: World) -> None:
    other = world.ends.enter_context(Pool({"node_name": "attic"}))
    other.variable("HF_ENDPOINT", world.addresses["the hub"])
    other.start("agent")
    world.at_end(other.stop)
    started = other.agent.start_download(world.model)
    eventually(
        "the other agent has it",
        lambda: any(record.model_ref == world.model for record in other.agent.models()),
    )
    assert started.holder
    world.kept["other"] = other.state.home


@given("the hub is gone")
@when("the hub is gone")
def when_hub_is_gone(world: World) -> None:
    # Nobody listens there any more: whatever comes now comes from elsewhere.
    world.make_pool().variable("HF_ENDPOINT", "http://127.0.0.1:9")


@when(parsers.parse("{ref} is pulled"))
def when_pulled(world: World, ref: str) -> None:
    world.cli("models", "pull", ref)


@when("the model is pulled from the other agent")
def when_pulled_from_other(world: World) -> None:
    world.cli("models", "pull", "--from", str(world.kept["other"]), world.model)


@then(parsers.parse("the model came from {source}"))
def then_source(world: World, source: str) -> None:
    assert world.answer["source"].startswith(source), world.answer
    name = world.answer["model"]["files"][0]
    folder: Path = world.running_pool.state.models / world.answer["model"]["model_id"]
    if not world.answer["model"]["is_external"]:
        assert (folder / name).read_bytes() == (world.tmp / "served.gguf").read_bytes()


@when("the agent is killed in the middle of fetching the model, and started again")
def when_killed_in_the_middle(world: World) -> None:
    when_agent_fetches(world)
    pool = world.running_pool

    def is_under_way() -> bool:
        (download,) = pool.agent.downloads()
        return download.bytes_downloaded > 0

    eventually("bytes have come", is_under_way)
    pool.kill("agent")
    pool.start("agent")
    # The same download, at the new agent's address.
    path = world.addresses[DOWNLOAD].partition("/v1/")[2]
    world.addresses[DOWNLOAD] = f"{pool.agent.url}/v1/{path}"


@when("the catalog is damaged while the agent is away")
def when_catalog_is_damaged(world: World) -> None:
    pool = world.running_pool
    pool.kill("agent")
    pool.state.catalog_db.write_bytes(b"no database at all" * 1000)
    for suffix in ("-wal", "-shm"):
        pool.state.catalog_db.with_name(pool.state.catalog_db.name + suffix).unlink(missing_ok=True)
    pool.start("agent")


@then("the damaged catalog is set aside and said aloud")
def then_set_aside(world: World) -> None:
    catalog = world.running_pool.agent.catalog()
    assert any("set aside as catalog.db.corrupt-1" in notice for notice in catalog.notices), catalog.notices
    assert world.running_pool.state.catalog_db.with_name("catalog.db.corrupt-1").exists()
