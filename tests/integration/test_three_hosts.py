"""Three machines behind real SSH servers: what happens to the pool while the ways to them break?"""

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from arriero.contracts.errors import ErrorCode
from arriero.contracts.records import Capabilities, NodeRecord
from arriero.contracts.states import NodeState
from arriero.contracts.version import API_VERSION, __version__
from arriero.fabrics.base import INSTALL_PATH
from arriero.orchestrator.store import open_database
from arriero.orchestrator.store.nodes import NodeEntry, NodeStore
from arriero.runtime.entropy import SystemEntropy
from arriero.testing.hosts import Host, Hosts, why_not
from arriero.testing.pool import Pool, eventually

REASON = why_not()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.timeout(150),
]
#: What a machine that is cut off is missed after, and what one that is back is taken again after,
#: with what a busy machine that runs tests may add.
MISSED_LIMIT_S = 8.0
BACK_LIMIT_S = 8.0
IMPOSTOR = "impostor"


@pytest.fixture
def nothing_remains() -> None:
    """Of what tests start in hosts all is ended with them; `test_hosts` sees to that."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        if hosts[0].run([sys.executable, "-V"], may_fail=True).returncode:
            pytest.skip(f"{sys.executable} lies in a folder that each host has for its own")
        yield hosts


@pytest.fixture(scope="module")
def pool(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """An orchestrator that holds all three, the last one over a slow line that loses, with a worker each."""
    with Pool() as pool, hosts[2].slow(200) as slow_target:
        hosts[2].lose(5)
        pool.variable("HOME", str(tmp_path_factory.mktemp("no-keys")))
        pool.variable("SSH_AUTH_SOCK", "")
        pool.state.prepare()
        entries = [entry_of(host) for host in hosts]
        entries[2] = entry_of(hosts[2], ssh=slow_target)
        # Somebody else's key at the address of the first.
        entries.append(entry_of(hosts[0], name=IMPOSTOR, host_key=hosts[1].fingerprint()))
        asyncio.run(register(pool, entries))
        for host in hosts:
            start_agent(host)
        pool.start("orchestrator")
        for host in hosts:
            ready(pool, host, limit_s=30)
            assert infer(pool, host)
        yield pool


def entry_of(
    host: Host, *, ssh: str | None = None, name: str | None = None, host_key: str | None = None
) -> NodeEntry:
    known = Capabilities(
        name=name or host.name, version=__version__, api_version=API_VERSION, backends=[], devices=[],
        engines={}, ram_mb=0, ram_free_mb=0, disk_free_mb=0, cpu_cores=1, os="linux", arch="",
    )  # fmt: skip
    return NodeEntry(
        name=name or host.name,
        ssh=ssh or host.target,
        key_path=str(host.key),
        host_key=host_key or host.fingerprint(),
        install_path=INSTALL_PATH,
        capabilities=known,
    )


async def register(pool: Pool, entries: list[NodeEntry]) -> None:
    database = await open_database(pool.state.orchestrator_db)
    try:
        store = await NodeStore.open(database, SystemEntropy())
        for entry in entries:
            await store.save(entry)
    finally:
        await database.close()


def start_agent(host: Host) -> None:
    home = host.home_there / INSTALL_PATH / "home"
    host.run(["mkdir", "-p", str(home)])
    own = ["ARRIERO_NODE_NAME=" + host.name, "ARRIERO_AGENT_PORT=0", f"ARRIERO_HOME={home}"]
    detached = 'setsid "$@" </dev/null >>/tmp/agent.log 2>&1 &'
    own += ["ARRIERO_ENGINE_THREADS=1", sys.executable, "-m", "arriero", "agent"]
    host.run(["sh", "-c", detached, "sh", "env", *own])


def node(pool: Pool, name: str) -> NodeRecord:
    return next(record for record in pool.orchestrator.nodes() if record.name == name)


def ready(pool: Pool, host: Host, *, limit_s: float) -> float:
    """Wait until a host is ready; return how long that took."""
    start_s = time.monotonic()
    eventually(f"{host.name} is ready", lambda: node(pool, host.name).status is NodeState.READY, limit_s)
    return time.monotonic() - start_s


def missed(pool: Pool, host: Host) -> float:
    """Wait until a host is missed; return how long that took."""
    start_s = time.monotonic()
    eventually(
        f"{host.name} is missed",
        lambda: node(pool, host.name).status is NodeState.UNREACHABLE,
        MISSED_LIMIT_S,
    )
    return time.monotonic() - start_s


def infer(pool: Pool, host: Host) -> str:
    done = pool.run(
        "infer", "--node", host.name, "--model", "demo", "--max-tokens", "5", "--temperature", "0", "Hello",
        timeout_s=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def worker_pids(host: Host) -> list[int]:
    """Return the processes of a host's workers and engines."""
    return sorted(process.pid for process in host.processes() if "worker" in command_of(process))


def command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def test_all_answer_and_nothing_listens_but_on_loopback(pool: Pool, hosts: Hosts) -> None:
    answers = {infer(pool, host) for host in hosts}
    assert len(answers) == 1
    assert {worker.node for worker in pool.orchestrator.workers()} == {host.name for host in hosts}
    for host in hosts:
        listeners = host.listening()
        assert len(listeners) > 2
        assert [one for one in listeners if one.address != "127.0.0.1"] == [(host.address, 22, "sshd")]


def test_another_host_key_is_refused(pool: Pool) -> None:
    impostor = node(pool, IMPOSTOR)
    assert impostor.status is NodeState.UNREACHABLE and impostor.error is not None
    assert impostor.error.code in (ErrorCode.SSH_HOST_KEY_CHANGED, ErrorCode.SSH_HOST_KEY_UNKNOWN)


@pytest.mark.parametrize(("fault", "lasts_s"), [("cut", 5), ("cut", 60), ("half-open", 5)])
def test_a_link_that_breaks_kills_no_worker(pool: Pool, hosts: Hosts, fault: str, lasts_s: int) -> None:
    host = hosts[0]
    workers = worker_pids(host)
    assert workers
    start_s = time.monotonic()
    host.cut() if fault == "cut" else host.drop_packets()
    missed_s = missed(pool, host)
    assert infer(pool, hosts[1])
    # How long it lasts is what is asked about here; nothing is waited for.
    time.sleep(max(lasts_s - (time.monotonic() - start_s), 0))
    host.heal()
    back_s = ready(pool, host, limit_s=BACK_LIMIT_S)
    print(f"{fault} for {lasts_s} s: missed after {missed_s:.2f} s, back {back_s:.2f} s after it was healed")
    assert worker_pids(host) == workers
    assert infer(pool, host)


def test_a_restart_of_sshd(pool: Pool, hosts: Hosts) -> None:
    host = hosts[1]
    workers, lease = worker_pids(host), node(pool, host.name).lease
    host.restart_sshd()
    eventually("it is held anew", lambda: node(pool, host.name).lease > lease)
    print(f"sshd was restarted: back after {ready(pool, host, limit_s=BACK_LIMIT_S):.2f} s")
    assert worker_pids(host) == workers
    assert infer(pool, host)


def test_an_agent_that_is_killed_and_comes_back(pool: Pool, hosts: Hosts) -> None:
    host = hosts[1]
    workers = worker_pids(host)
    (agent,) = [one for one in host.processes() if command_of(one).endswith("-m arriero agent")]
    agent.kill()
    print(f"its agent was killed: missed after {missed(pool, host):.2f} s")
    start_agent(host)
    print(f"started again: back after {ready(pool, host, limit_s=30):.2f} s")
    assert worker_pids(host) == workers
    assert infer(pool, host)
