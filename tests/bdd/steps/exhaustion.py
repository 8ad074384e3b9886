"""What happens when memory or disk run out for real?"""

import shlex
import shutil
import subprocess
import sys

from pytest_bdd import given, parsers, then, when

from arriero.contracts.records import WorkerHealth
from arriero.runtime.processes import identity
from arriero.testing.memory_limit import MemoryLimit, memory_limit, offer
from arriero.testing.pool import eventually
from tests.bdd.steps.deadlines import metric, worker_client
from tests.bdd.steps.downloads import serve_model
from tests.bdd.steps.pools import use_fake
from tests.bdd.world import LOG, World

FIRST_TOKENS = "arriero_worker_first_token_seconds_count"


# --- Memory --------------------------------------------------------------------------------------


@given("workers in a memory cgroup of their own")
def given_memory_cgroup(world: World) -> None:
    """Every worker puts itself into a cgroup before it becomes one; there is no limit yet."""
    world.make_pool()
    limit = world.ends.enter_context(memory_limit("bdd"))
    world.kept["limit"] = limit
    command = [*limit.join_command, sys.executable, "-m", "arriero", "worker"]
    world.make_pool(worker_command=shlex.join(command))


@given(parsers.parse("workers whose engine is a process of its own and takes {milliseconds:d} ms a token"))
def given_engine_process(world: World, milliseconds: int) -> None:
    use_fake(world, child=True, token_s=milliseconds / 1000)


@given(parsers.parse("the kernel will choose the {part}"))
def given_kernel_chooses(world: World, part: str) -> None:
    """Make the worker, or its engine, the first one to go when memory is short."""
    health = health_of(world)
    assert health.engine_pid is not None
    assert part in ("worker", "engine")
    offer(world.worker().pid if part == "worker" else health.engine_pid)


@given(parsers.parse("{room_mib:d} MiB of memory more than are used"))
def given_room(world: World, room_mib: int) -> None:
    world.kept["room_mib"] = room_mib


@when("memory runs out while it answers")
def when_ram_exhausted(world: World) -> None:
    """Lower the worker's memory limit while `arriero infer` streams, and fill what is left.

    0 where there is room enough; 137 OUT_OF_MEMORY where the kernel kills.
    """
    limit = _limit(world)
    world.kept["oom_kills"] = limit.oom_kills

    def exhaust() -> None:
        eventually("the first token has come", lambda: metric(world, FIRST_TOKENS) > 0)
        _exhaust(world, limit)

    world.meanwhile = exhaust
    most = ["--max-tokens", str(world.max_tokens or 200)]
    answer = world.cli("infer", "--model", world.model, *most, world.prompt)
    world.tokens = [answer["text"]] if answer.get("text") else []
    LOG.info("oom_kill went from %s to %s", world.kept["oom_kills"], limit.oom_kills)


@when("memory runs out while nobody asks")
def when_ram_exhausted_idle(world: World) -> None:
    limit = _limit(world)
    world.kept["oom_kills"] = limit.oom_kills
    _exhaust(world, limit)


def _exhaust(world: World, limit: MemoryLimit) -> None:
    room_mib = world.kept.get("room_mib", 4)
    used_mib = limit.used_mib
    limit.set_mib(used_mib + room_mib)
    # What the kernel can reclaim (a file's pages) goes first, so that more than the room must be taken.
    most_mib = used_mib + 2 * room_mib if room_mib < 100 else room_mib // 4
    taken_mib = world.ends.enter_context(limit.filled(most_mib))
    LOG.info("%s MiB were used, the limit is %s more, %s were taken", used_mib, room_mib, taken_mib)


@then("the worker's end is told")
def then_worker_detects_oom(world: World) -> None:
    """Read from the agent how the worker ended; for memory only if the kernel's count rose.

    137 OUT_OF_MEMORY; 1 with another code where it died of something else; 0 where it lives.
    """
    limit: MemoryLimit | None = world.kept.get("limit")
    has_risen = limit is not None and limit.oom_kills > world.kept.get("oom_kills", 0)
    if not has_risen and identity(world.worker().pid) is not None:
        world.took(0, None)
        return
    record = world.worker_in("failed", "stopped")
    assert record.exit is not None, "a worker that ended has an exit"
    LOG.info("worker %s ended: %s", record.worker_id, record.exit)
    is_memory = record.exit.code == "OUT_OF_MEMORY"
    assert is_memory == has_risen, f"oom_kill {'rose' if has_risen else 'did not rise'}, told: {record.exit}"
    code = record.exit.exit_code if is_memory else 1
    advice = "look at the worker's log"
    world.took(
        code or 1, record.exit.code, record.exit.message, suggested_action=advice, signal=record.exit.signal
    )


@then("the kernel has killed for memory")
def then_kernel_killed(world: World) -> None:
    assert _limit(world).oom_kills > world.kept["oom_kills"]


@then("the kernel has not killed for memory")
def then_kernel_did_not_kill(world: World) -> None:
    assert _limit(world).oom_kills == world.kept["oom_kills"]


def _limit(world: World) -> MemoryLimit:
    limit = world.kept["limit"]
    assert isinstance(limit, MemoryLimit)
    return limit


def health_of(world: World) -> WorkerHealth:
    """Return what the worker says of itself."""
    return worker_client(world).health()


# --- Disk ----------------------------------------------------------------------------------------


@given(parsers.parse("a models disk of {size_mib:d} MiB"))
def given_small_disk(world: World, size_mib: int) -> None:
    """Mount a file system of its own where the agent puts models."""
    models = world.make_pool().state.models
    models.mkdir(mode=0o700, parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mib}m,mode=0700", "arriero-bdd", str(models)]
    subprocess.run(mount, check=True)
    world.ends.callback(subprocess.run, ["umount", "-l", str(models)], check=True)


@given("an origin that serves a model and does not say how large it is")
def given_origin_without_length(world: World) -> None:
    serve_model(world, {"has_length": False})


@given(parsers.parse("{room_kib:d} KiB are free on it"))
def given_disk_room(world: World, room_kib: int) -> None:
    world.kept["room_kib"] = room_kib


@when("the disk runs full")
def when_disk_exhausted(world: World) -> None:
    """Fill the models' disk but for a rest, then have the agent fetch a model.

    By `arriero probe download-start` and `download-progress`: 0 where the rest is enough;
    1 INSUFFICIENT_DISK.
    """
    models = world.running_pool.state.models
    rest = world.kept.get("room_kib", 64) * 1024
    free = shutil.disk_usage(models).free
    (models / "filler").write_bytes(b"\0" * max(0, free - rest))
    LOG.info("%s bytes are free on the models' disk", shutil.disk_usage(models).free)
    seen = world.probe("download-start", "--model", world.model, has_worker=False)
    if world.last_exit_code == 0:
        seen = world.probe("download-progress", seen["progress_url"], look_up=False)
    world.events = seen.get("frames", [])


@then("the catalog does not have the model")
def then_catalog_has_not(world: World) -> None:
    assert world.model not in [record.model_ref for record in world.running_pool.agent.models()]


@then("room is made and the download goes on to its end")
def then_download_succeeds(world: World) -> None:
    (world.running_pool.state.models / "filler").unlink()
    seen = world.probe("download-start", "--model", world.model, has_worker=False)
    if world.last_exit_code == 0:
        seen = world.probe("download-progress", seen["progress_url"], look_up=False)
    world.events = seen.get("frames", [])
    eventually(
        "the catalog has the model",
        lambda: world.model in [record.model_ref for record in world.running_pool.agent.models()],
    )
