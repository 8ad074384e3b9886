"""What goes along when an orchestrator goes: agents and workers on a machine behind a real sshd."""

from collections.abc import Iterator

import pytest
from tests.support.there import orchestrator, other_agent, pool_with

from arriero.contracts.records import WorkerRecord
from arriero.contracts.requests import SpawnBody
from arriero.contracts.states import WorkerState
from arriero.runtime import processes
from arriero.testing.agents import AgentProcess
from arriero.testing.pool import Pool, eventually
from arriero.testing.sshd import SshServer, sshd_path

pytestmark = pytest.mark.skipif(sshd_path() is None, reason="sshd is not installed (openssh-server)")


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def there() -> Iterator[AgentProcess]:
    """The agent of the other machine."""
    with other_agent() as running:
        yield running


@pytest.fixture
def pool(there: AgentProcess, server: SshServer) -> Iterator[Pool]:
    """A pool to which that machine belongs; nothing runs here yet."""
    with pool_with(there, server) as made:
        yield made
        assert made.stop() == []


def loaded(pool: Pool, there: AgentProcess) -> WorkerRecord:
    """Have the orchestrator start a worker on the other machine."""
    spawned = pool.orchestrator.spawn(SpawnBody(model_ref="demo", engine="fake"), node="there")
    return there.wait_worker(spawned.worker_id, WorkerState.IDLE)


def has_ended(there: AgentProcess, record: WorkerRecord) -> bool:
    return there.client.worker(record.worker_id).state is WorkerState.STOPPED


def test_with_cascade_agents_and_workers_of_other_machines_go_along(pool: Pool, there: AgentProcess) -> None:
    pool.start("agent")
    with orchestrator(pool, "--cascade") as daemon:
        record = loaded(pool, there)
        daemon.terminate()
        assert daemon.wait(60) == 0
    assert there.process is not None and there.process.wait(30) == 0
    assert there.state.worker_runs() == [] and processes.identity(record.pid) is None
    assert pool.process("agent").wait(30) == 0


@pytest.mark.parametrize("flags", [(), ("--with-agent",)])
def test_without_it_they_stay(pool: Pool, there: AgentProcess, flags: tuple[str, ...]) -> None:
    with orchestrator(pool, *flags) as daemon:
        record = loaded(pool, there)
        daemon.terminate()
        assert daemon.wait(60) == 0
        assert there.client.worker(record.worker_id).state is WorkerState.IDLE


def test_an_ephemeral_orchestrator_takes_its_workers_along_and_no_others(
    pool: Pool, there: AgentProcess
) -> None:
    other = there.wait_worker(there.spawn("demo", engine="fake").worker_id, WorkerState.IDLE)
    with orchestrator(pool, "--ephemeral") as daemon:
        record = loaded(pool, there)
        daemon.terminate()
        assert daemon.wait(60) == 0
        assert has_ended(there, record), "it was waited for"
    assert there.client.worker(other.worker_id).state is WorkerState.IDLE


def test_the_workers_of_one_that_was_killed_go_too(pool: Pool, there: AgentProcess) -> None:
    with orchestrator(pool, "--ephemeral") as daemon:
        record = loaded(pool, there)
        daemon.kill()
        daemon.wait(60)
        eventually("its worker is gone", lambda: has_ended(there, record))
    # It had no time to tidy up after itself.
    down = pool.begin("down")
    told, _ = down.communicate(timeout=60)
    assert down.returncode == 0 and "removed what was left behind" in told
