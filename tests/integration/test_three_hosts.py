"""Three machines behind real SSH servers: what happens to the pool while the ways to them break?

They become part of it by `nodes add` alone, with all packages carried, since they reach no index; and
they leave it by `nodes remove --purge`, after which nothing of us may be there.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator

import pytest
from tests.support.added import add, agents, node, prepare, status, worker_pids

from arriero.client.api import task_events
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import TaskEnd, TaskEvent, TaskFailed, TaskPlacing, TaskToken
from arriero.contracts.records import WorkerRecord
from arriero.contracts.requests import SpawnBody, TaskBody
from arriero.contracts.states import NodeState
from arriero.domain.worker_states import READY
from arriero.testing.gguf_writer import write_llama
from arriero.testing.hosts import Host, Hosts, why_not
from arriero.testing.pool import Pool, eventually

REASON = why_not()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.timeout(420),
]
#: What a machine that is cut off is missed after, and what one that is back is taken again after,
#: with what a machine that runs tests may add: it may be busy, or stand still for seconds.  `tests.bench.links` has the figures.
MISSED_LIMIT_S = 30.0
BACK_LIMIT_S = 30.0
READY_LIMIT_S = 60.0
LEFT_LIMIT_S = 180.0
MINUTE_S = 60.0
TINY = "hf:org/tiny:Q8_0"
#: A request that would compute for minutes at that pace.
LONG, TOKEN_S = 1500, 0.1


@pytest.fixture
def nothing_remains() -> None:
    """Of what tests start in hosts all is ended with them; `test_hosts` sees to that."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        for host in hosts:
            prepare(host)
        write_llama(hosts[0].home / "tiny.gguf")
        yield hosts


@pytest.fixture(scope="module")
def pool(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """An orchestrator and the three that were added to it, each with a worker; the last one is far away."""
    before = {host.name: files_of(host) for host in hosts}
    with Pool() as pool, hosts[2].slow(200) as slow_target:
        pool.variable("HOME", str(tmp_path_factory.mktemp("no-keys")))
        pool.variable("SSH_AUTH_SOCK", "")
        pool.start("orchestrator")
        assert pool.orchestrator.nodes() == []
        add(pool, hosts)
        lease = node(pool, hosts[2].name).lease
        moved = pool.run("nodes", "update", hosts[2].name, "--ssh", slow_target)
        assert moved.returncode == 0, moved.stderr
        eventually("it is held at its new address", lambda: node(pool, hosts[2].name).lease > lease)
        hosts[2].lose(5)
        for host in hosts:
            ready(pool, host, limit_s=READY_LIMIT_S)
            assert infer(pool, "--node", host.name)
        yield pool
        # From far away, with what is lost on the way, this would take as long as all the rest.
        hosts[2].heal()
        moved = pool.run("nodes", "update", hosts[2].name, "--ssh", hosts[2].target)
        assert moved.returncode == 0, moved.stderr
        for leaving in [pool.begin("nodes", "remove", host.name, "--purge") for host in hosts]:
            _, errors = leaving.communicate(timeout=LEFT_LIMIT_S)
            assert leaving.returncode == 0, errors
        assert pool.orchestrator.nodes() == []
        for host in hosts:
            nothing_is_left(host, before[host.name])


def files_of(host: Host) -> set[str]:
    """Return all that lies where its programs may write, but for the files of its sshd."""
    there = {str(path.relative_to(host.folder)) for path in host.folder.rglob("*")}
    return {name for name in there if not name.startswith("run/ssh/")}


def nothing_is_left(host: Host, before: set[str]) -> None:
    def others() -> list[str]:
        return [str(each) for each in host.processes() if not each.name().startswith(("sshd", "nsenter"))]

    eventually(f"nothing runs on {host.name}", lambda: not others(), BACK_LIMIT_S)
    assert sorted(files_of(host) - before) == [], host.name


def ready(pool: Pool, host: Host, *, limit_s: float = BACK_LIMIT_S) -> None:
    eventually(f"{host.name} is ready", lambda: status(pool, host.name) is NodeState.READY, limit_s)


def missed(pool: Pool, host: Host) -> None:
    eventually(
        f"{host.name} is missed", lambda: status(pool, host.name) is NodeState.UNREACHABLE, MISSED_LIMIT_S
    )


def infer(pool: Pool, *where: str) -> str:
    done = pool.run(
        "infer", *where, "--model", "demo", "--max-tokens", "5", "--temperature", "0", "Hello", timeout_s=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_answer_and_nothing_listens_but_on_loopback(pool: Pool, hosts: Hosts) -> None:
    answers = {infer(pool, "--node", host.name) for host in hosts} | {infer(pool)}
    assert len(answers) == 1
    demo = [worker for worker in pool.orchestrator.workers() if worker.model_ref == "demo"]
    assert {worker.node for worker in demo} == {host.name for host in hosts}
    for host in hosts:
        listeners = host.listening()
        assert len(listeners) > 2
        assert [one for one in listeners if one.address != "127.0.0.1"] == [(host.address, 22, "sshd")]


def test_a_man_in_the_middle_is_refused(pool: Pool, hosts: Hosts) -> None:
    with hosts[0].slow(0) as target:
        given = ("--ssh", target, "--key", str(hosts[0].key), "--accept-host-key", hosts[1].fingerprint())
        done = pool.run("nodes", "add", "impostor", *given)
    assert done.returncode == 1 and str(ErrorCode.SSH_HOST_KEY_CHANGED) in done.stderr, done.stderr
    assert "impostor" not in {record.name for record in pool.orchestrator.nodes()}


@pytest.mark.parametrize("fault", [Host.cut, Host.drop_packets])
def test_a_link_that_breaks_kills_no_worker(pool: Pool, hosts: Hosts, fault: object) -> None:
    host = hosts[1]
    workers = worker_pids(host)
    assert workers and callable(fault)
    with healed(pool, host):
        fault(host)
        missed(pool, host)
        assert infer(pool, "--node", hosts[0].name) == infer(pool)
    assert worker_pids(host) == workers
    assert infer(pool, "--node", host.name)


def test_a_minute_without_a_link_while_the_others_go_on(pool: Pool, hosts: Hosts) -> None:
    near, source, far = hosts[1], hosts[0], hosts[2]
    # Only one of them can have got it: nobody reaches its origin.
    done = pool.run(
        "models", "import", str(source.home_there / "tiny.gguf"), "--as", TINY, "--node", source.name
    )
    assert done.returncode == 0, done.stderr
    assert pulled_from(pool, near) == f"node {source.name}"
    workers = worker_pids(source)
    with healed(pool, source):
        source.cut()
        since_s = time.monotonic()
        missed(pool, source)
        # The only one that has it now, and that can be reached.
        assert pulled_from(pool, far) == f"node {near.name}"
        a_stream_that_is_cut_ends_once_and_for_all(pool, near)
        what_was_not_begun_is_answered_elsewhere(pool, near, far)
        # How long it lasts is what is asked about here; nothing is waited for.
        time.sleep(max(MINUTE_S - (time.monotonic() - since_s), 0))
    assert worker_pids(source) == workers
    assert infer(pool, "--node", source.name)


def pulled_from(pool: Pool, host: Host) -> str:
    done = pool.run("models", "pull", TINY, "--node", host.name, "--json", timeout_s=120)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["source"])


def fake_worker(pool: Pool, host: Host, token_s: float) -> WorkerRecord:
    """Have a worker whose pace is known, of the model that was copied."""
    body = SpawnBody(model_ref=TINY, engine="fake", options={"token_s": token_s}, slots=2)
    made = pool.orchestrator.spawn(body, node=host.name)
    return eventually("it is ready", lambda: idle(pool, made.worker_id), READY_LIMIT_S)


def idle(pool: Pool, worker_id: str) -> WorkerRecord | None:
    """Return a worker whose slots are all free."""
    record = pool.orchestrator.worker(worker_id)
    is_idle = record.slots_available == record.slots_total and record.state in READY
    return record if is_idle else None


@contextlib.contextmanager
def healed(pool: Pool, host: Host) -> Iterator[None]:
    """Mend the way to a machine at the end, whatever happened."""
    try:
        yield
    finally:
        host.heal()
    ready(pool, host)


def told_of(pool: Pool, body: TaskBody, act: Callable[[TaskEvent], None]) -> list[TaskEvent]:
    """Return all that the client of a task is told, to the end of its stream; act on it as it comes."""
    told = []
    with pool.orchestrator.run_task(body) as stream:
        try:
            for event in task_events(stream):
                told.append(event)
                act(event)
        except ArrieroError:
            # A stream that ends with an error has no mark of a whole one.
            assert isinstance(told[-1], TaskFailed)
    return told


def a_stream_that_is_cut_ends_once_and_for_all(pool: Pool, host: Host) -> None:
    worker = fake_worker(pool, host, TOKEN_S)
    body = TaskBody(model=TINY, prompt="on and on", max_tokens=LONG, ignore_eos=True)

    def act(event: TaskEvent) -> None:
        if isinstance(event, TaskToken) and event.index == 5:
            host.drop_packets()

    with healed(pool, host):
        told = told_of(pool, body, act)
        missed(pool, host)
    tokens = [event.index for event in told if isinstance(event, TaskToken)]
    assert tokens == list(range(len(tokens))) and 5 < len(tokens) < LONG
    assert [event.node for event in told if isinstance(event, TaskPlacing) and event.node] == [host.name]
    assert not [event for event in told if isinstance(event, TaskEnd)]
    (failed,) = [event for event in told if isinstance(event, TaskFailed)]
    assert failed is told[-1] and failed.error.code in (ErrorCode.WORKER_LOST, ErrorCode.NODE_UNREACHABLE)
    # Without the new lease it would go on for the rest of its minutes.
    eventually("the old one has ended", lambda: idle(pool, worker.worker_id), BACK_LIMIT_S)
    pool.orchestrator.stop_worker(worker.worker_id)


def what_was_not_begun_is_answered_elsewhere(pool: Pool, host: Host, other: Host) -> None:
    # Its first token takes minutes.
    slow = fake_worker(pool, host, LONG * TOKEN_S)
    quick: list[WorkerRecord] = []

    def act(event: TaskEvent) -> None:
        if isinstance(event, TaskPlacing) and event.node == host.name and not quick:
            quick.append(fake_worker(pool, other, 0.0))
            host.drop_packets()

    with healed(pool, host):
        told = told_of(pool, TaskBody(model=TINY, prompt="Hello", max_tokens=8), act)
    places = [event.node for event in told if isinstance(event, TaskPlacing) and event.node]
    assert places == [host.name, other.name], told
    tokens = [event.index for event in told if isinstance(event, TaskToken)]
    assert tokens and tokens == list(range(len(tokens))), told
    assert isinstance(told[-1], TaskEnd)
    eventually("the first one has ended", lambda: idle(pool, slow.worker_id), BACK_LIMIT_S)
    for worker in (slow, *quick):
        pool.orchestrator.stop_worker(worker.worker_id)


def test_a_restart_of_sshd(pool: Pool, hosts: Hosts) -> None:
    host = hosts[1]
    workers, lease = worker_pids(host), node(pool, host.name).lease
    host.restart_sshd()
    eventually("it is held anew", lambda: node(pool, host.name).lease > lease)
    ready(pool, host)
    assert worker_pids(host) == workers
    assert infer(pool, "--node", host.name)


def test_an_agent_that_is_killed_comes_back(pool: Pool, hosts: Hosts) -> None:
    host = hosts[1]
    workers = worker_pids(host)
    (agent,) = agents(host)
    agent.kill()
    eventually(
        "its keeper starts another", lambda: any(one.pid != agent.pid for one in agents(host)), BACK_LIMIT_S
    )
    ready(pool, host, limit_s=READY_LIMIT_S)
    assert infer(pool, "--node", host.name)
    assert worker_pids(host) == workers
