"""More requests than a model has slots: another machine begins with it, by itself, and takes the next one."""

import threading
from collections.abc import Iterator

import pytest
from openai import OpenAI
from tests.support.there import orchestrator, other_agent, pool_with

from arriero.contracts.requests import SpawnBody
from arriero.contracts.states import NodeState, WorkerState
from arriero.testing.agents import AgentProcess
from arriero.testing.pool import Pool, eventually
from arriero.testing.sshd import SshServer, sshd_path

pytestmark = pytest.mark.skipif(sshd_path() is None, reason="sshd is not installed (openssh-server)")


@pytest.fixture
def there() -> Iterator[AgentProcess]:
    with other_agent() as running:
        yield running


@pytest.fixture
def pool(there: AgentProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """A machine here and one behind SSH."""
    with SshServer(tmp_path_factory.mktemp("sshd")) as server, pool_with(there, server) as made:
        made.start("agent")
        with orchestrator(made):
            eventually("both are there", lambda: statuses(made) == [NodeState.READY] * 2)
            yield made


def statuses(pool: Pool) -> list[NodeState]:
    return [node.status for node in pool.orchestrator.nodes()]


def ready_nodes(pool: Pool) -> list[str]:
    ready = (WorkerState.IDLE, WorkerState.BUSY)
    return sorted(worker.node for worker in pool.orchestrator.workers() if worker.state in ready)


def answered_by(pool: Pool, **place: str) -> str:
    """Have a short answer; return which machine gave it."""
    with OpenAI(base_url=f"{pool.record('orchestrator').url}/v1", api_key="none", max_retries=0) as sdk:
        raw = sdk.completions.with_raw_response.create(
            model="demo", prompt="x", max_tokens=2, extra_body={"arriero": place}
        )
        return raw.headers["X-Arriero-Node"]


class Held:
    """A request that has a slot until it is let go."""

    def __init__(self, pool: Pool) -> None:
        self._sdk = OpenAI(base_url=f"{pool.record('orchestrator').url}/v1", api_key="none", max_retries=0)
        stream = self._sdk.completions.create(model="demo", prompt="x", max_tokens=4000, stream=True)
        self._stream = stream
        next(iter(stream))

    def let_go(self) -> None:
        self._stream.close()
        self._sdk.close()


def test_a_model_whose_slots_are_taken_begins_on_another_machine(pool: Pool) -> None:
    slow = SpawnBody(model_ref="demo", engine="fake", options={"token_s": 0.05}, slots=1)
    pool.orchestrator.spawn(slow, node="here")
    eventually("it is ready", lambda: ready_nodes(pool) == ["here"])
    held = Held(pool)
    answers: list[str] = []
    # One that names its machine waits there, and has nothing begun elsewhere.
    first = threading.Thread(target=lambda: answers.append(answered_by(pool, node="here")))
    first.start()
    eventually("it waits", lambda: pool.orchestrator.workers()[0].queued == 1)
    assert [worker.node for worker in pool.orchestrator.workers()] == ["here"]
    second = threading.Thread(target=lambda: answers.append(answered_by(pool)))
    second.start()
    eventually("the other machine has it, too", lambda: ready_nodes(pool) == ["here", "there"])
    assert answered_by(pool) == "there"
    assert answers == []
    held.let_go()
    for thread in (first, second):
        thread.join(60)
    assert answers == ["here", "here"]
