"""What keeps arriero from a machine has its own error, and leaves what was there before."""

import asyncio
import dataclasses
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.support.engine_wheels import pack, sha256
from tests.support.machines import Told, reached, small_package

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import NodeStep
from arriero.fabrics.base import Connection
from arriero.orchestrator.machines import running
from arriero.orchestrator.machines.environment import Installation
from arriero.orchestrator.machines.machines import Machines
from arriero.runtime.clock import SystemClock
from arriero.runtime.log_files import rotate
from arriero.testing.sshd import SshServer, sshd_path

pytestmark = pytest.mark.skipif(sshd_path() is None, reason="sshd is not installed (openssh-server)")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk needs root")


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    with SshServer(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps what was fetched for all tests."""
    return tmp_path_factory.mktemp("dist")


@pytest_asyncio.fixture
async def connection(server: SshServer) -> AsyncIterator[Connection]:
    with tempfile.TemporaryDirectory(prefix="arr-") as folder:
        async with reached(server, Path(folder)) as one:
            yield one


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def is_there(path: Path) -> bool:
    return path.exists()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "made" / "there"


class Shifted(SystemClock):
    """Our clock, if it were two minutes late."""

    def wall_s(self) -> float:
        return super().wall_s() - 120


def machines_of(dist: Path, package: Path) -> Machines:
    return Machines(dist, SystemClock(), uses_services=False, package=package)


async def installed(connection: Connection, machines: Machines, there: Path, told: Told) -> Installation:
    found = await machines.survey(connection, str(there), told)
    return await machines.install(connection, found, told, carry=True)


async def refused(connection: Connection, machines: Machines, there: Path, told: Told) -> ArrieroError:
    with pytest.raises(ArrieroError) as caught:
        await installed(connection, machines, there, told)
    return caught.value


# --- The machine ---------------------------------------------------------------------------------


async def _looked_at(folder: Path, scripts: dict[str, str], dist: Path) -> ArrieroError:
    """Return why a machine is refused that has a shell's usual programs, and these."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("sh", "base64", "head", "echo", "true", "uname"):
        real = shutil.which(name)
        assert real is not None
        (programs / name).symlink_to(real)
    for name, text in scripts.items():
        (programs / name).unlink(missing_ok=True)
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    machines = Machines(dist, SystemClock(), places=())
    with SshServer(folder / "sshd", env={"PATH": str(programs)}) as bare:
        with tempfile.TemporaryDirectory(prefix="arr-") as sockets:
            async with reached(bare, Path(sockets)) as connection:
                return await refused(connection, machines, folder / "there", Told())


async def test_a_machine_without_python(tmp_path: Path, dist: Path) -> None:
    error = await _looked_at(tmp_path, {}, dist)
    assert error.code is ErrorCode.PYTHON_NOT_FOUND and "3.11" in error.message


async def test_a_machine_with_an_old_python(tmp_path: Path, dist: Path) -> None:
    error = await _looked_at(tmp_path, {"python3": "echo 3 8 10 1 1 cpython"}, dist)
    assert error.code is ErrorCode.PYTHON_TOO_OLD
    assert "3.8.10" in error.message and "3.11" in error.message


@pytest.mark.parametrize(("option", "said"), [("-s", "FreeBSD"), ("-m", "riscv64")])
async def test_a_machine_of_another_kind(tmp_path: Path, dist: Path, option: str, said: str) -> None:
    real = shutil.which("uname")
    script = f'[ "$1" = {option} ] && echo {said} || {real} "$1"'
    error = await _looked_at(tmp_path, {"uname": script}, dist)
    assert error.code is ErrorCode.PLATFORM_UNSUPPORTED and said in error.message


async def test_a_clock_that_is_wrong_is_told(
    connection: Connection, there: Path, dist: Path, told: Told
) -> None:
    found = await Machines(dist, Shifted()).survey(connection, str(there), told)
    assert 119 < found.clock_skew_s < 125 and told.of("clock").startswith("warning: its clock is 12")
    steps = [step.step for step in told.steps]
    assert steps == ["command", "system", "python", "disk", "gpu", "clock", "latency"]
    assert not there.parent.exists()


# --- The folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["file", "foreign"])
async def test_a_place_that_is_taken(
    connection: Connection, there: Path, dist: Path, told: Told, fault: str
) -> None:
    _take(there, fault)
    error = await refused(connection, Machines(dist, SystemClock()), there, told)
    assert error.code is ErrorCode.INSTALL_PATH_UNUSABLE
    # And what is not ours is not removed either.
    with pytest.raises(ArrieroError) as kept:
        await Machines(dist, SystemClock()).remove(connection, str(there), told, purge=True)
    assert kept.value.code is ErrorCode.INSTALL_PATH_UNUSABLE and is_there(there)


def _take(there: Path, fault: str) -> None:
    if fault == "file":
        there.parent.mkdir()
        there.write_text("mine")
    else:
        (there / "envs").mkdir(parents=True)


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(folder)]
    if subprocess.run(argv, capture_output=True, check=False).returncode:
        pytest.skip("may not mount here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("disk", ["ro", "noexec"], indirect=True)
async def test_a_home_that_cannot_be_used(connection: Connection, disk: Path, dist: Path, told: Told) -> None:
    error = await refused(connection, Machines(dist, SystemClock()), disk / "a" / "b", told)
    assert error.code is ErrorCode.INSTALL_PATH_UNUSABLE and str(disk) in error.message


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("disk", ["size=20m"], indirect=True)
async def test_a_disk_that_is_too_small(connection: Connection, disk: Path, dist: Path, told: Told) -> None:
    error = await refused(connection, Machines(dist, SystemClock()), disk / "there", told)
    assert error.code is ErrorCode.INSUFFICIENT_DISK
    assert error.details["available_mb"] <= 20 < error.details["required_mb"]


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("disk", ["size=500m"], indirect=True)
@pytest.mark.parametrize("room_mb", [4, 10])
async def test_a_disk_that_becomes_full(
    connection: Connection, disk: Path, dist: Path, tmp_path: Path, told: Told, room_mb: int
) -> None:
    # Too little for the files, and for the environment.
    machines = machines_of(dist, small_package(tmp_path))
    found = await machines.survey(connection, str(disk / "there"), told)
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (found.disk_free_mb - room_mb) * 2**20)
    with pytest.raises(ArrieroError) as full:
        await machines.install(connection, found, told, carry=True)
    assert full.value.code is ErrorCode.INSUFFICIENT_DISK
    assert names(disk) == ["ballast"]
    assert "nothing is left" in told.of("rollback")


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("disk", ["size=500m"], indirect=True)
async def test_a_full_disk_keeps_nobody_from_what_is_installed_there(
    connection: Connection, disk: Path, dist: Path, tmp_path: Path, told: Told
) -> None:
    machines = machines_of(dist, small_package(tmp_path))
    await installed(connection, machines, disk / "there", told)
    left_mb = shutil.disk_usage(disk).free // 2**20 - 20
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, left_mb * 2**20)
    assert not (await installed(connection, machines, disk / "there", told)).is_new
    findings = {each.name: each for each in await machines.doctor(connection, str(disk / "there"))}
    assert findings["disk"].code is ErrorCode.INSUFFICIENT_DISK and not findings["disk"].is_ok
    assert findings["environment"].is_ok and findings["agent"].code is ErrorCode.NOT_RUNNING
    newer = machines_of(dist, small_package(tmp_path / "newer", version="0.0.2"))
    assert (await refused(connection, newer, disk / "there", told)).code is ErrorCode.INSUFFICIENT_DISK
    assert (disk / "there" / "current").exists()


async def test_of_a_log_the_end_is_shown(connection: Connection, there: Path) -> None:
    with pytest.raises(ArrieroError) as missing:
        await running.logs(connection, str(there), 10)
    assert missing.value.code is ErrorCode.NOT_FOUND
    lines = [b"%d %s" % (number, b"x" * 50) for number in range(1500)]
    folder = there / "home" / "logs"
    folder.mkdir(parents=True)
    (folder / "agent.log").write_bytes(b"".join(b"%s\n" % line for line in lines))
    assert rotate(folder / "agent.log", 1)
    with (folder / "agent.log").open("ab") as log:
        log.write(b"the newest\n")
    whole = await running.logs(connection, str(there), 700)
    assert (whole.content.splitlines(), whole.is_cut) == ([*lines[-699:], b"the newest"], False)
    cut = await running.logs(connection, str(there), 700, bytes_max=10_000)
    shown = cut.content.splitlines()
    assert cut.is_cut and 9_000 < len(cut.content) <= 10_000
    assert shown == [*lines[-(len(shown) - 1) :], b"the newest"], "whole lines, none missing between"


# --- The installation ----------------------------------------------------------------------------


async def test_what_fails_its_check_is_rolled_back(
    connection: Connection, there: Path, dist: Path, tmp_path: Path, told: Told
) -> None:
    broken = machines_of(dist, small_package(tmp_path / "broken", version="0.0.2", told_version="0.0.9"))
    error = await refused(connection, broken, there, told)
    assert error.code is ErrorCode.INSTALL_FAILED and "0.0.9" in error.message
    assert not there.parent.exists() and "nothing is left" in told.of("rollback")

    good = machines_of(dist, small_package(tmp_path / "good"))
    first = await installed(connection, good, there, told)
    told = Told()
    assert (await refused(connection, broken, there, told)).code is ErrorCode.INSTALL_FAILED
    assert names(there / "envs") == [first.tag]
    assert (there / "current").resolve().name == first.tag and "before is there still" in told.of("rollback")

    findings = {each.name: each for each in await good.doctor(connection, str(there))}
    assert findings["environment"].is_ok and findings["agent"].code is ErrorCode.NOT_RUNNING
    changed = next((there / "current" / "lib").glob("python*/site-packages/arriero/__main__.py"))
    changed.write_text("changed")
    findings = {each.name: each for each in await good.doctor(connection, str(there))}
    assert findings["environment"].code is ErrorCode.INSTALL_FAILED
    assert "__main__.py" in findings["environment"].message


async def test_an_upgrade_goes_beside_and_back(
    connection: Connection, there: Path, dist: Path, tmp_path: Path, told: Told
) -> None:
    tags: list[str] = []
    for number in (1, 2, 3):
        package = small_package(tmp_path / str(number), version=f"0.0.{number}")
        latest = await installed(connection, machines_of(dist, package), there, told)
        assert latest.previous == (tags[-1] if tags else None) and latest.version == f"0.0.{number}"
        tags.append(latest.tag)
    assert names(there / "envs") == sorted(tags[1:])

    await machines_of(dist, package).switch_back(connection, latest, told)
    assert (there / "current").resolve().name == tags[1]
    assert names(there / "envs") == [tags[1]]

    # What others put there stays.
    (there / "mine").write_text("mine")
    await machines_of(dist, package).remove(connection, str(there), told, purge=True)
    assert names(there) == ["mine"]
    assert "not arriero's was left" in told.of("clean")


async def test_one_that_is_interrupted_leaves_nothing(
    connection: Connection, there: Path, dist: Path, tmp_path: Path, told: Told
) -> None:
    machines = machines_of(dist, small_package(tmp_path))
    found = await machines.survey(connection, str(there), told)
    begun = asyncio.Event()

    def tell(step: NodeStep) -> None:
        told(step)
        if "making the environment" in step.message:
            begun.set()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(machines.install(connection, found, tell, carry=True))
        await begun.wait()
        task.cancel()
    assert "nothing is left" in told.of("rollback") and not there.parent.exists()


async def test_a_whole_installation_can_be_undone(
    connection: Connection, there: Path, dist: Path, tmp_path: Path, told: Told
) -> None:
    machines = machines_of(dist, small_package(tmp_path))
    first = await installed(connection, machines, there, told)
    await machines.remove(connection, str(there), told, purge=False)
    assert not (await installed(connection, machines, there, told)).is_new
    await machines.roll_back(connection, first, told)
    assert not there.parent.exists() and "nothing is left" in told.of("rollback")


async def test_two_at_once_on_one_machine(
    connection: Connection, there: Path, dist: Path, tmp_path: Path, told: Told
) -> None:
    machines = machines_of(dist, small_package(tmp_path))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(installed(connection, machines, there, told)) for _ in range(2)]
    first, second = (task.result() for task in tasks)
    assert first.tag == second.tag and [first.is_new, second.is_new].count(True) == 1
    assert first.previous is None and second.previous is None
    assert names(there / "envs") == [first.tag]


async def test_a_package_that_cannot_be_had_is_named(
    connection: Connection, there: Path, tmp_path: Path, told: Told
) -> None:
    machines = machines_of(tmp_path / "dist", small_package(tmp_path, needs="xllamacpp"))
    found = await machines.survey(connection, str(there), told)
    alpine = dataclasses.replace(found, libc="musl 1.2.4")
    with pytest.raises(ArrieroError) as missing:
        await machines.install(connection, alpine, told, carry=True)
    assert missing.value.code is ErrorCode.PACKAGE_UNAVAILABLE
    details = missing.value.details
    assert details["package"] == "xllamacpp" and "musl" in details["platform"] and details["python"]
    assert not there.parent.exists()


async def test_a_package_that_the_machines_own_index_lacks_is_named(
    there: Path, tmp_path: Path, told: Told
) -> None:
    listing = tmp_path / "simple" / "sniffio"
    listing.mkdir(parents=True)
    has = pack(
        listing, name="sniffio", version="1.3.1", tag="py3-none-any", content={"sniffio/__init__.py": b""}
    )
    (listing / "index.html").write_text(f'<a href="{has.name}">{has.name}</a>')
    package = small_package(tmp_path)
    (package / "orchestrator/machines/runtime.txt").write_text(
        f"sniffio==1.3.1 --hash=sha256:{sha256(has)}\nxllamacpp==1.2 --hash=sha256:{'0' * 64}\n"
    )
    env = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": (tmp_path / "simple").as_uri()}
    machines = machines_of(tmp_path / "dist", package)
    with SshServer(tmp_path / "sshd", env=env) as own, tempfile.TemporaryDirectory(prefix="arr-") as sockets:
        async with reached(own, Path(sockets)) as connection:
            found = await machines.survey(connection, str(there), told)
            with pytest.raises(ArrieroError) as missing:
                await machines.install(connection, found, told)
    assert missing.value.code is ErrorCode.PACKAGE_UNAVAILABLE, missing.value
    details = missing.value.details
    assert (details["package"], details["python"]) == (
        "xllamacpp",
        ".".join(map(str, found.python_version[:2])),
    )
    assert any("No matching distribution" in line for line in details["last_lines"]), details
    assert "its own package index has the packages" in told.of("package")
    assert not there.parent.exists() and "nothing is left" in told.of("rollback")


async def test_a_wheel_with_other_content_is_not_carried(
    connection: Connection, there: Path, tmp_path: Path, dist: Path, told: Told
) -> None:
    machines = machines_of(tmp_path / "dist", small_package(tmp_path))
    wheels = tmp_path / "dist" / "wheels"
    wheels.mkdir(parents=True)
    (wheels / "sniffio-1.3.1-py3-none-any.whl").write_bytes(b"something else")
    await installed(connection, machines, there, told)
    assert "fetching 1 packages" in told.of("package")
