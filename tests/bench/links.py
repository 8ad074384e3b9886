"""How soon is a machine missed that is cut off, and how soon is it back?

`python -m tests.bench.links` adds three machines (network namespaces, each with an sshd), breaks the way
to each of them in each manner, a third of a beat apart, and prints a JSON line: for each fault the
seconds of all three, from the fault to `unreachable` in the orchestrator's list, and from its end to
`ready`.  About three minutes on two cores, one of them for the longest cut; needs root on Linux.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from arriero.contracts.errors import ArrieroError
from arriero.contracts.states import NodeState
from arriero.testing.hosts import Host, Hosts, why_not
from arriero.testing.pool import Pool, eventually
from tests.support import added

#: Beats come once a second: machines are cut off at different times between two of them.
APART_S = 0.36
LOOK_S = 0.005
LIMIT_S = 30.0
#: So long machines that are far away and lose packets are watched: none should be missed.
STEADY_S = 20.0
Act = Callable[[Host], None]


def faults(pool: Pool, hosts: Hosts, break_it: Act, mend: Act, *, lasts_s: float) -> dict[str, list[float]]:
    """Break and mend the way to each machine; return when each was missed and back."""
    start_s = time.monotonic()
    due = [(start_s + APART_S * index, host, break_it) for index, host in enumerate(hosts)]
    due += [(at_s + lasts_s, host, mend) for at_s, host, _ in list(due)]
    broken_s: dict[str, float] = {}
    mended_s: dict[str, float] = {}
    missed: dict[str, float] = {}
    back: dict[str, float] = {}
    client = pool.orchestrator
    while len(back) < len(hosts) or len(missed) < len(hosts):
        now_s = time.monotonic()
        assert now_s < start_s + lasts_s + LIMIT_S, f"missed {missed}, back {back}"
        while due and due[0][0] <= now_s:
            _, host, act = due.pop(0)
            if act is break_it:
                # From before it is broken: commands that do so take a while.
                broken_s[host.name] = time.monotonic()
            act(host)
            if act is mend:
                mended_s[host.name] = time.monotonic()
        for record in client.nodes():
            name, is_ready = record.name, record.status is NodeState.READY
            seen_s = time.monotonic()
            if record.status is NodeState.UNREACHABLE and name in broken_s:
                missed.setdefault(name, seen_s - broken_s[name])
            if is_ready and name in missed and name in mended_s:
                back.setdefault(name, seen_s - mended_s[name])
        time.sleep(LOOK_S)
    return {"missed_s": _rounded(missed), "back_s": _rounded(back)}


def sshd_restarts(pool: Pool, hosts: Hosts) -> dict[str, list[float]]:
    """Restart each sshd; return when each machine was held anew after it listened."""
    back = {}
    for host in hosts:
        before = added.node(pool, host.name).lease
        host.restart_sshd()
        start_s = time.monotonic()
        eventually(f"{host.name} is held anew", lambda: _is_held(pool, host, above=before), LIMIT_S)  # noqa: B023
        back[host.name] = time.monotonic() - start_s
    return {"back_s": _rounded(back)}


def _is_held(pool: Pool, host: Host, *, above: int) -> bool:
    record = added.node(pool, host.name)
    return record.lease > above and record.status is NodeState.READY


def agent_kills(pool: Pool, hosts: Hosts) -> dict[str, list[float]]:
    """Kill each agent; return when each machine answers a question about its models again."""
    back = {}
    for host in hosts:
        (old,) = added.agents(host)
        old.kill()
        start_s = time.monotonic()
        eventually(f"{host.name} has an agent", lambda: _answers(pool, host), LIMIT_S)  # noqa: B023
        back[host.name] = time.monotonic() - start_s
    return {"back_s": _rounded(back)}


def _answers(pool: Pool, host: Host) -> bool:
    try:
        pool.orchestrator.node_agent(host.name).catalog()
    except ArrieroError:
        return False
    return True


def steady(pool: Pool, hosts: Hosts) -> int:
    """Watch machines that nobody cuts off; return how often one was missed all the same."""
    wrong, was = 0, {host.name: NodeState.READY for host in hosts}
    end_s = time.monotonic() + STEADY_S
    while time.monotonic() < end_s:
        for record in pool.orchestrator.nodes():
            if record.name in was:
                wrong += record.status is not NodeState.READY and was[record.name] is NodeState.READY
                was[record.name] = record.status
        time.sleep(10 * LOOK_S)
    return wrong


def far_away(pool: Pool, hosts: Hosts, stack: ExitStack) -> None:
    """Move all machines to where an answer takes 200 ms and one packet of twenty is lost."""
    for host in hosts:
        lease = added.node(pool, host.name).lease
        target = stack.enter_context(host.slow(200))
        moved = pool.run("nodes", "update", host.name, "--ssh", target)
        assert moved.returncode == 0, moved.stderr
        host.lose(5)
        eventually(f"{host.name} is held", lambda: _is_held(pool, host, above=lease), LIMIT_S)  # noqa: B023


def _rounded(found: dict[str, float]) -> list[float]:
    return [round(found[name], 2) for name in sorted(found)]


def measure(*, long_s: float) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="arriero-bench-")))
        hosts = stack.enter_context(Hosts(folder / "hosts"))
        for host in hosts:
            added.prepare(host)
        pool = stack.enter_context(Pool())
        pool.variable("HOME", str(folder))
        pool.variable("SSH_AUTH_SOCK", "")
        pool.start("orchestrator")
        start_s = time.monotonic()
        added.add(pool, hosts)
        found: dict[str, Any] = {"added_s": round(time.monotonic() - start_s, 1)}
        for host in hosts:
            done = pool.run("infer", "--node", host.name, "--max-tokens", "5", "Hello", timeout_s=120)
            assert done.returncode == 0, done.stderr
        workers = {host.name: added.worker_pids(host) for host in hosts}
        cut, drop, heal = Host.cut, Host.drop_packets, Host.heal
        found["cut_5_s"] = faults(pool, hosts, cut, heal, lasts_s=5)
        found["half_open_5_s"] = faults(pool, hosts, drop, heal, lasts_s=5)
        found["sshd_restarted"] = sshd_restarts(pool, hosts)
        found["agent_killed"] = agent_kills(pool, hosts)
        found[f"cut_{long_s:g}_s"] = faults(pool, hosts, cut, heal, lasts_s=long_s)
        far_away(pool, hosts, stack)
        found["slow_missed_wrongly"] = steady(pool, hosts)
        found["slow_cut_5_s"] = faults(pool, hosts, drop, lambda host: host.lose(5), lasts_s=5)
        found["workers_killed"] = sum(workers[host.name] != added.worker_pids(host) for host in hosts)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--long", type=float, default=60.0, metavar="SECONDS", help="The longest cut.")
    options = parser.parse_args()
    why = why_not()
    if why is not None:
        print(f"no machines can be made here: {why}", file=sys.stderr)
        return 1
    print(json.dumps(measure(long_s=options.long)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
