"""How far is a download?"""

import json
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

from pytest_bdd import given, parsers, then, when

from arriero.client.api import Caller
from arriero.contracts.requests import DownloadBody
from arriero.testing.gguf_writer import write_llama
from tests.bdd.world import LOG, World

DOWNLOAD = "the download"


def serve_model(world: World, *answers: Mapping[str, object]) -> str:
    """Have a file server give a model, by the script of `answers`; return the model's reference."""
    path = world.tmp / "served.gguf"
    write_llama(path)
    server = world.start_server(
        "arriero.testing.fault_server", "--file", str(path), "--answers", json.dumps(answers or [{}])
    )
    world.addresses["the origin"] = server.url
    world.model = f"{server.url}/served.gguf"
    return world.model


@given("an origin that serves a model")
def given_origin(world: World) -> None:
    serve_model(world)


@given(parsers.parse("an origin that serves a model after {count:d} failures"))
def given_flaky_origin(world: World, count: int) -> None:
    serve_model(world, *([{"status": 503}] * count), {})


@given("an origin that breaks off once in the middle")
def given_breaking_origin(world: World) -> None:
    serve_model(world, {"cut_after": 100_000}, {})


@given(parsers.parse("an origin that answers {status:d} to everything"))
def given_refusing_origin(world: World, status: int) -> None:
    serve_model(world, {"status": status})


@given("an origin that sends the beginning and then nothing")
def given_stalling_origin(world: World) -> None:
    serve_model(world, {"stall_after": 50_000})


@given("an origin that serves something that is no model")
def given_origin_of_junk(world: World) -> None:
    path = world.tmp / "junk.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 4096)
    server = world.start_server("arriero.testing.fault_server", "--file", str(path), "--answers", "[{}]")
    world.model = f"{server.url}/junk.gguf"


@when("the agent begins to fetch the model")
def when_agent_fetches(world: World) -> None:
    """Ask the agent over HTTP, so that its progress can be read."""
    agent = world.running_pool.agent
    started = agent.start_download(DownloadBody(model_ref=world.model).model_ref)
    world.addresses[DOWNLOAD] = urljoin(agent.url + "/", started.progress_url)
    LOG.info("download %s of %s", started.download_id, world.model)


@when("the agent will be killed while its progress is read")
def when_agent_dies_meanwhile(world: World) -> None:
    def kill() -> None:
        world.hears("[probe] downloading")
        world.running_pool.kill("agent")
        LOG.info("the agent is killed")

    world.meanwhile = kill


@given("a download that nobody knows")
def given_unknown_download(world: World) -> None:
    agent = world.running_pool.agent
    world.addresses[DOWNLOAD] = f"{agent.url}/v1/models/download/progress?download_id=d-ffffffffffff"


@given("the broken server has a download")
def given_broken_download(world: World) -> None:
    server = world.url or ""
    world.addresses[DOWNLOAD] = f"{server}/v1/models/download/progress?download_id=d-00000000b0b0"


@then(parsers.parse("the progress of {url} streams"))
def then_download_progress_stream(world: World, url: str) -> None:
    """Read a download's progress to its end by `arriero probe download-progress`.

    0; 1 SSE_CONNECTION_FAILED, SSE_CONNECTION_ERROR, or the download's own error; 124 SSE_CONNECTION_TIMEOUT.
    """
    limits = ["--silence", f"{world.timeout_s:g}"] if world.timeout_s is not None else []
    seen = world.probe("download-progress", world.address(url), *limits, look_up=False)
    world.events = seen["frames"]


@then(parsers.parse("the first {count:d} event of the progress of {url} streams"))
def then_download_progress_begins(world: World, count: int, url: str) -> None:
    seen = world.probe("download-progress", world.address(url), "--events", str(count), look_up=False)
    world.events = seen["frames"]
    assert len(world.events) == count


@then("the bytes never go back and end at the whole")
def then_bytes_rise(world: World) -> None:
    counts = [frame["bytes_downloaded"] for frame in world.events]
    assert counts == sorted(counts), counts
    assert counts[-1] == world.events[-1]["bytes_total"] > 0


@then(parsers.parse("the last stage is {stage}"))
def then_last_stage(world: World, stage: str) -> None:
    assert world.events[-1]["stage"] == stage, world.events[-1]


@then("the model's file is whole")
def then_file_is_whole(world: World) -> None:
    """Compare the file that was fetched with the one that was served, byte by byte."""
    path = world.events[-1]["local_path"]
    with open(path, "rb") as fetched, (world.tmp / "served.gguf").open("rb") as served:  # noqa: PTH123 - a text of the wire
        assert fetched.read() == served.read()


@then("fetching it retries with exponential backoff")
def then_retries_with_exponential_backoff(world: World) -> None:
    """Have the agent fetch the model, and hold every wait that its progress tells against the rule.

    Full jitter: before attempt n + 1 anything up to 100 ms doubled n - 1 times, 30 s at most; and the
    next attempt begins no earlier.  Ends as `arriero probe download-progress` judges the download.
    """
    when_agent_fetches(world)
    # The waits are short: they are read here, from the first moment on, and judged once more by the probe.
    frames = read_progress(world.addresses[DOWNLOAD], world.running_pool.record("agent").token)
    then_download_progress_stream(world, DOWNLOAD)
    world.events = frames
    attempts = [frame.get("attempt", 1) for frame in frames]
    assert attempts == sorted(attempts), attempts
    waits = {f.get("attempt", 1): (f["at_s"], f["retry_in_s"]) for f in frames if "retry_in_s" in f}
    LOG.info("attempts %s, waits %s", sorted(set(attempts)), waits)
    assert waits, "no wait was told"
    for attempt, (at_s, wait_s) in waits.items():
        bound_s = min(30.0, 0.1 * 2 ** (attempt - 1))
        assert 0.0 <= wait_s <= bound_s, f"before attempt {attempt + 1}: {wait_s} s, the bound is {bound_s} s"
        later = [frame["at_s"] for frame in frames if frame.get("attempt", 1) > attempt]
        # Both moments are when a frame was read, a little after it was sent.
        assert not later or later[0] - at_s >= wait_s - 0.1, f"attempt {attempt + 1} came too early"


def read_progress(url: str, token: str) -> list[dict[str, Any]]:
    """Read a download's progress stream to its end; each frame with the moment it was read (`at_s`)."""
    split = urlsplit(url)
    caller = Caller(f"{split.scheme}://{split.netloc}", token)
    frames: list[dict[str, Any]] = []
    with caller.stream("GET", f"{split.path}?{split.query}", silence_s=20.0) as stream:
        for event in stream:
            if event.event == "error":
                break
            if event.comment is None:
                frames.append({"at_s": time.monotonic(), **json.loads(event.data)})
    return frames


@then(parsers.parse("{count:d} attempts were made"))
def then_attempts(world: World, count: int) -> None:
    told = max(frame.get("attempt", 1) for frame in world.events)
    assert told == count, [frame.get("attempt", 1) for frame in world.events]
