"""Which parts are there, which of them are real, and which one is broken?"""

import os
import signal
import socket
import sys

from pytest_bdd import given, parsers, when

from arriero.contracts.requests import SpawnBody
from arriero.runtime.processes import identity, wait_gone
from arriero.testing.pool import eventually
from tests.bdd.world import LOG, World

# --- Real parts ----------------------------------------------------------------------------------


def use_fake(world: World, **options: object) -> None:
    """Have the pool's workers compute with the scripted engine."""
    known = dict(world.kept.get("engine_options", {}))
    world.kept["engine_options"] = {**known, **options}
    world.make_pool(engine="fake", engine_options=world.kept["engine_options"])


@given("a pool")
def given_a_pool(world: World) -> None:
    world.make_pool().start()


@given("an agent")
def given_an_agent(world: World) -> None:
    world.make_pool().start("agent")
    world.is_agent_asked = True


@given("an orchestrator without any node")
def given_a_lonely_orchestrator(world: World) -> None:
    world.make_pool().start("orchestrator")


@given("nothing runs")
def given_nothing_runs(world: World) -> None:
    assert world.pool is None


@given("the agent's registry is asked")
def given_agent_is_asked(world: World) -> None:
    world.is_agent_asked = True


@given(parsers.parse("workers whose tokens take {milliseconds:d} ms"))
def given_slow_tokens(world: World, milliseconds: int) -> None:
    use_fake(world, token_s=milliseconds / 1000)


@given(parsers.parse("workers whose model takes {milliseconds:d} ms to load"))
def given_slow_load(world: World, milliseconds: int) -> None:
    use_fake(world, load_s=milliseconds / 1000)


@given(parsers.parse("workers whose engine stalls after {count:d} tokens"))
def given_stalling_engine(world: World, count: int) -> None:
    use_fake(world, stall_after_tokens=count)


@given(parsers.parse("workers whose engine dies after {count:d} tokens"))
def given_dying_engine(world: World, count: int) -> None:
    use_fake(world, exit_after_tokens=count)


@given("workers whose engine refuses to load")
def given_refusing_engine(world: World) -> None:
    use_fake(world, fail_load="scripted to refuse")


@given(parsers.parse("workers whose engine needs {memory_mb:d} MiB"))
def given_large_engine(world: World, memory_mb: int) -> None:
    use_fake(world, memory_mb=memory_mb)


@given(parsers.parse("a worker program that is {what}"))
def given_worker_program(world: World, what: str) -> None:
    """What the agent starts in place of a worker."""
    script = world.tmp / "worker"
    match what:
        case "missing":
            command = str(world.tmp / "there-is-none")
        case "not executable":
            script.write_text("#!/bin/sh\n")
            script.chmod(0o600)
            command = str(script)
        case "mute":
            command = f"{sys.executable} -c 'import time; time.sleep(600)'"
        case "broken":
            command = f"{sys.executable} -c 'raise SystemExit(3)'"
        case _:
            raise AssertionError(f"no worker program is {what!r}")
    world.make_pool(worker_command=command)


@given(parsers.parse("the setting {name} is {value}"))
def given_setting(world: World, name: str, value: str) -> None:
    world.make_pool(**{name: value})


@given("a worker")
def given_a_worker(world: World) -> None:
    """Start a worker over HTTP and wait until it is idle."""
    given_a_worker_begins(world)
    record = world.worker_in("idle", "failed")
    assert str(record.state) == "idle", record.exit


@given("a worker that has just been started")
def given_a_worker_begins(world: World) -> None:
    pool = world.running_pool
    record = pool.agent.spawn(SpawnBody(model_ref=world.model))
    world.worker_id = record.worker_id
    if not world.is_agent_asked:
        eventually(
            "the orchestrator has heard of the worker",
            lambda: any(known.worker_id == record.worker_id for known in pool.orchestrator.workers()),
        )
    LOG.info("worker %s is started, pid %s", record.worker_id, record.pid)


@given("a worker that loads")
def given_a_worker_loads(world: World) -> None:
    given_a_worker_begins(world)
    world.worker_in("loading")


@given("any worker is meant")
def given_any_worker(world: World) -> None:
    world.worker_id = None


@given(parsers.parse("the worker meant is {worker_id}"))
def given_worker_meant(world: World, worker_id: str) -> None:
    world.worker_id = worker_id


@given("the worker's own address is asked")
def given_worker_address(world: World) -> None:
    world.url = world.worker().url


# --- What happens to them ------------------------------------------------------------------------


@given("the worker has been killed")
@when("the worker is killed")
def when_worker_is_killed(world: World) -> None:
    """End the worker and its engine by SIGKILL, and wait until the process is gone."""
    record = world.worker()
    known = identity(record.pid)
    assert known is not None, "the worker lives"
    os.killpg(record.pid, signal.SIGKILL)
    LOG.info("worker %s, pid %s, is killed", record.worker_id, record.pid)
    assert wait_gone(known, 30)


@given("the worker is frozen")
def given_worker_is_frozen(world: World) -> None:
    """Stop its process; it goes on when the scenario ends."""
    pid = world.worker().pid
    os.kill(pid, signal.SIGSTOP)
    world.at_end(lambda: os.kill(pid, signal.SIGCONT))


@given("the worker will be killed while it streams")
def given_killed_mid_stream(world: World) -> None:
    def kill() -> None:
        world.hears("the first token has come")
        when_worker_is_killed(world)

    world.meanwhile = kill


@given("the worker will be killed while it loads")
def given_killed_while_loading(world: World) -> None:
    def kill() -> None:
        world.hears("loading")
        when_worker_is_killed(world)

    world.meanwhile = kill


# --- Broken parts --------------------------------------------------------------------------------


@given(parsers.parse("a server that plays {mode}"))
def given_broken_server(world: World, mode: str) -> None:
    """A broken part, at the address `the broken server`; it is asked in place of the look-up."""
    server = world.start_server("arriero.testing.broken_server", mode)
    world.addresses["the broken server"] = server.url
    world.url = server.url


@given("a port nobody listens on")
def given_dead_port(world: World) -> None:
    """A port that was free a moment ago, kept from others by being bound and not listened on."""
    holder = world.ends.enter_context(socket.socket())
    holder.bind(("127.0.0.1", 0))
    world.url = f"http://127.0.0.1:{holder.getsockname()[1]}"
    world.addresses["the dead port"] = world.url


@given(parsers.parse("my patience is {seconds:g} s"))
def given_patience(world: World, seconds: float) -> None:
    world.timeout_s = seconds
