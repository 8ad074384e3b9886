"""Three machines behind real SSH servers: what happens to the pool while the ways to them break?"""

import contextlib
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest

from arriero.contracts.errors import ErrorCode
from arriero.contracts.records import NodeRecord
from arriero.contracts.states import NodeState
from arriero.testing.hosts import Host, Hosts, why_not
from arriero.testing.pool import Pool, eventually

REASON = why_not()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
    pytest.mark.timeout(420),
]
#: What a machine that is cut off is missed after, and what one that is back is taken again after,
#: with what a busy machine that runs tests may add.
MISSED_LIMIT_S = 8.0
BACK_LIMIT_S = 8.0
#: Three installations at once, all packages carried: half a minute each where nothing else runs.
ADDED_LIMIT_S = 300.0


@pytest.fixture
def nothing_remains() -> None:
    """Of what tests start in hosts all is ended with them; `test_hosts` sees to that."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        for host in hosts:
            # A core or two have to do for all of them.
            host.home.joinpath(".config/arriero").mkdir(parents=True)
            host.home.joinpath(".config/arriero/config.toml").write_text("engine_threads = 1\n")
        yield hosts


@pytest.fixture(scope="module")
def pool(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """An orchestrator and the three that were added to it, each with a worker; the last one is far away."""
    with Pool() as pool, hosts[2].slow(200) as slow_target:
        pool.variable("HOME", str(tmp_path_factory.mktemp("no-keys")))
        pool.variable("SSH_AUTH_SOCK", "")
        pool.start("orchestrator")
        for host, adding in [(host, add(pool, host)) for host in hosts]:
            said, errors = adding.communicate(timeout=ADDED_LIMIT_S)
            assert adding.returncode == 0, f"{host.name}: {said} {errors}"
        lease = node(pool, hosts[2].name).lease
        moved = pool.run("nodes", "update", hosts[2].name, "--ssh", slow_target)
        assert moved.returncode == 0, moved.stderr
        eventually("it is held at its new address", lambda: node(pool, hosts[2].name).lease > lease)
        hosts[2].lose(5)
        for host in hosts:
            ready(pool, host, limit_s=30)
            assert infer(pool, host)
        yield pool


def add(pool: Pool, host: Host) -> subprocess.Popen[str]:
    given = ("--ssh", host.target, "--key", str(host.key), "--accept-host-key", host.fingerprint())
    return pool.begin("nodes", "add", host.name, *given)


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


def test_a_man_in_the_middle_is_refused(pool: Pool, hosts: Hosts) -> None:
    with hosts[0].slow(0) as target:
        given = ("--ssh", target, "--key", str(hosts[0].key), "--accept-host-key", hosts[1].fingerprint())
        done = pool.run("nodes", "add", "impostor", *given)
    assert done.returncode == 1 and str(ErrorCode.SSH_HOST_KEY_CHANGED) in done.stderr, done.stderr
    assert "impostor" not in {record.name for record in pool.orchestrator.nodes()}


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


def test_an_agent_that_is_killed_comes_back(pool: Pool, hosts: Hosts) -> None:
    host = hosts[1]
    workers = worker_pids(host)
    (agent,) = [one for one in host.processes() if command_of(one).endswith("arriero agent")]
    agent.kill()
    start_s = time.monotonic()
    eventually("its keeper starts another", lambda: has_new_agent(host, agent.pid), BACK_LIMIT_S)
    ready(pool, host, limit_s=30)
    assert infer(pool, host)
    print(f"its agent was killed: an answer after {time.monotonic() - start_s:.2f} s")
    assert worker_pids(host) == workers


def has_new_agent(host: Host, old_pid: int) -> bool:
    return any(one.pid != old_pid and command_of(one).endswith("arriero agent") for one in host.processes())
