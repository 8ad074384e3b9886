"""A machine behind a real sshd while it computes: it is drained, it is removed, it is probed."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from tests.support.there import orchestrator, other_agent, pool_with, status

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import NodeStep
from arriero.contracts.records import WorkerRecord
from arriero.contracts.requests import SpawnBody
from arriero.contracts.states import NodeState, WorkerState
from arriero.testing.agents import AgentProcess
from arriero.testing.pool import Pool, eventually
from arriero.testing.sshd import SshServer, sshd_path

pytestmark = pytest.mark.skipif(sshd_path() is None, reason="sshd is not installed (openssh-server)")
TOKENS = 200


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def there() -> Iterator[AgentProcess]:
    with other_agent() as running:
        yield running


@pytest.fixture
def pool(there: AgentProcess, server: SshServer) -> Iterator[Pool]:
    with pool_with(there, server) as made, orchestrator(made):
        yield made


@pytest.fixture
def worker(pool: Pool, there: AgentProcess) -> WorkerRecord:
    """A worker on the other machine that takes its time for each token."""
    body = SpawnBody(model_ref="demo", engine="fake", options={"token_s": 0.04})
    spawned = pool.orchestrator.spawn(body, node="there")
    return there.wait_worker(spawned.worker_id, WorkerState.IDLE)


class Stream(threading.Thread):
    """A client of OpenAI's SDK that reads an answer of the other machine to its end."""

    def __init__(self, pool: Pool, proxy: str = "") -> None:
        super().__init__()
        self._url = f"{pool.record('orchestrator').url}{proxy}/v1"
        self.begun = threading.Event()
        self.chunks = 0
        self.error: openai.APIError | None = None

    def run(self) -> None:
        with OpenAI(base_url=self._url, api_key="none", max_retries=0, timeout=60) as sdk:
            try:
                for chunk in self._ask(sdk):
                    self.chunks += bool(chunk.choices and chunk.choices[0].text)
                    self.begun.set()
            except openai.APIError as error:
                self.error = error

    def _ask(self, sdk: OpenAI) -> Any:
        return sdk.completions.create(
            model="demo",
            prompt="x",
            max_tokens=TOKENS,
            stream=True,
            extra_body={"arriero": {"node": "there"}},
        )

    def __enter__(self) -> "Stream":
        self.start()
        assert self.begun.wait(60), "no token came"
        return self

    def __exit__(self, *exc: object) -> None:
        self.join(60)
        assert not self.is_alive(), "it hangs"


def test_a_drained_machine_ends_its_streams_whatever_road_they_came_and_takes_no_new_one(
    pool: Pool, worker: WorkerRecord
) -> None:
    steps: list[str] = []

    def drain(wait_s: float) -> None:
        pool.orchestrator.drain_node("there", lambda step: steps.append(step.message), wait_s=wait_s)

    with Stream(pool) as chosen, Stream(pool, f"/v1/workers/{worker.worker_id}/proxy") as passed_on:
        eventually(
            "both are told of", lambda: pool.orchestrator.worker(worker.worker_id).slots_available == 2
        )
        with pytest.raises(ArrieroError) as late:
            drain(0.1)
        assert (late.value.code, late.value.message) == (
            ErrorCode.REQUEST_TIMEOUT, "there still has 2 requests after 0.1 s",
        )  # fmt: skip
        refused = Stream(pool)
        refused.run()
        assert refused.error is not None and refused.error.code == ErrorCode.NODE_DRAINING
        drain(60)
        assert "waits for 2 requests there" in steps
    assert (chosen.error, chosen.chunks) == (passed_on.error, passed_on.chunks) == (None, TOKENS)


def test_a_machine_that_is_removed_ends_its_streams_with_one_error(
    pool: Pool, there: AgentProcess, worker: WorkerRecord
) -> None:
    with Stream(pool) as stream:
        pool.orchestrator.remove_node("there", lambda _: None, purge=False, force=False)
    assert stream.error is not None and stream.error.code == ErrorCode.WORKER_LOST, stream.error
    assert worker.worker_id in str(stream.error.message) and 0 < stream.chunks < TOKENS
    assert pool.orchestrator.nodes() == [] and pool.orchestrator.workers() == []
    assert there.process is not None and there.process.wait(30) == 0
    assert there.state.worker_runs() == []


def test_an_upgrade_that_waited_for_a_removal_leaves_the_machine_alone(pool: Pool) -> None:
    steps: list[str] = []
    refused: list[ArrieroError] = []

    def upgrade() -> None:
        try:
            pool.orchestrator.upgrade_node("there", lambda step: steps.append(step.message), carry=False)
        except ArrieroError as error:
            refused.append(error)

    upgrading = threading.Thread(target=upgrade)

    def meanwhile(_: NodeStep) -> None:
        if upgrading.ident is None:
            upgrading.start()

    pool.orchestrator.remove_node("there", meanwhile, purge=False, force=False)
    upgrading.join(30)
    assert [error.code for error in refused] == [ErrorCode.NODE_NOT_FOUND]
    assert steps == ["there is being removed: waits for the end of that"]


def test_probes_reach_a_worker_of_another_machine_and_tell_when_it_is_cut_off(
    pool: Pool, server: SshServer, worker: WorkerRecord
) -> None:
    def probe(*arguments: str) -> tuple[int, str]:
        done = pool.run("probe", *arguments, "--timeout", "20", "--json")
        error = json.loads(done.stdout)["error"]
        return done.returncode, error["code"] if error is not None else ""

    mine = ("--worker", worker.worker_id)
    asked = {
        "worker-health": mine,
        "worker-state": (*mine, "--expect", "idle"),
        "worker-ready": mine,
        "loading-progress": mine,
        "tokens": (*mine, "--prompt", "x", "--max-tokens", "5", "--expect-tokens", "5"),
    }
    assert {name: probe(name, *more) for name, more in asked.items()} == dict.fromkeys(asked, (0, ""))
    far = f"{pool.record('orchestrator').url}/v1/nodes/there/proxy"
    assert probe("catalog", "--model", "demo", "--url", far) == (0, "")
    assert probe("download-start", "--model", "demo", "--url", far) == (0, "")
    server.kill()
    eventually("it is missed", lambda: status(pool) is NodeState.UNREACHABLE)
    assert {name: probe(name, *more) for name, more in asked.items()} == {
        "worker-health": (1, ErrorCode.HEALTH_CHECK_ERROR),
        "worker-state": (0, ""),
        "worker-ready": (1, ErrorCode.NO_READY_WORKERS),
        "loading-progress": (1, ErrorCode.PROGRESS_STREAM_FAILED),
        "tokens": (1, ErrorCode.TOKEN_STREAM_FAILED),
    }
