"""What a lock asks for elsewhere, which wheels fit, and when a keeper starts its program again."""

import io
import plistlib
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.domain.keeping import DELAY_MAX_S, WELL_S, Keeping
from arriero.orchestrator.machines import agent_child, environment_child, lock, there_child, wheel
from arriero.orchestrator.machines.there import Look, Python

MARKERS = {
    "implementation_name": "cpython",
    "implementation_version": "3.12.3",
    "os_name": "posix",
    "platform_machine": "aarch64",
    "platform_python_implementation": "CPython",
    "platform_release": "6.1",
    "platform_system": "Linux",
    "platform_version": "1",
    "python_full_version": "3.12.3",
    "python_version": "3.12",
    "sys_platform": "linux",
}
PI = lock.Target("Linux", "aarch64", "glibc 2.31", "6.1", (3, 12, 3))
ALPINE = lock.Target("Linux", "x86_64", "musl 1.2.4", "6.1", (3, 12, 3))
MAC = lock.Target("Darwin", "arm64", "", "14.5", (3, 13, 0))


@pytest.mark.parametrize(
    "said",
    [
        ("Linux", "x86_64", "glibc 2.999999999", "6.1"),
        ("Linux", "aarch64", "musl 1.99999999999", "6.1"),
        ("Darwin", "arm64", "", "99999999.1"),
        ("Darwin", "x86_64", "", ""),
    ],
)
def test_whatever_a_machine_says_of_its_version_a_list_stays_short(said: tuple[str, str, str, str]) -> None:
    assert len(lock.Target(*said, (3, 12, 3)).platforms()) < 2000


def test_where_others_can_exchange_what_is_run_nothing_is_installed(tmp_path: Path) -> None:
    there = tmp_path / "shared" / "of-us"
    there.mkdir(parents=True)
    assert there_child.exposed_at(there) == "" == there_child.path_problem(there / "arr")
    there.parent.chmod(0o777)
    assert there_child.exposed_at(there) == str(there.parent)
    assert str(there.parent) in there_child.path_problem(there / "arr")
    # As /tmp: others may write, and change nothing of ours.
    there.parent.chmod(0o1777)
    assert there_child.exposed_at(there) == ""
    there.parent.chmod(0o777)
    link = tmp_path / "link"
    link.symlink_to(there)
    assert there_child.exposed_at(link) == str(there.parent)


# --- The lock ------------------------------------------------------------------------------------


def test_the_own_lock_is_understood_whole() -> None:
    text = wheel.lock_text()
    packages = lock.parse(text)
    assert len(packages) == text.count("==") - text.count(" == ") and len(packages) > 40
    assert all(package.hashes for package in packages)


def test_conditions_are_those_of_the_other_machine() -> None:
    names = {package.name for package in lock.needed(lock.parse(wheel.lock_text()), MARKERS)}
    assert {"hf-xet", "xllamacpp", "uvloop"} <= names
    assert not {"colorama", "tzdata", "httpx2-jsfetch"} & names
    windows = MARKERS | {"sys_platform": "win32"}
    assert "colorama" in {each.name for each in lock.needed(lock.parse(wheel.lock_text()), windows)}


@pytest.mark.parametrize(
    "line", ["sniffio==1.3.1", "sniffio>=1 --hash=sha256:" + "0" * 64, "-r other.txt", "./x"]
)
def test_a_line_that_pins_nothing_is_refused(line: str) -> None:
    with pytest.raises(ArrieroError) as refused:
        lock.parse(line + "\n")
    assert refused.value.code is ErrorCode.INSTALL_FAILED


def test_a_line_of_a_lock_comes_back() -> None:
    for package in lock.parse(wheel.lock_text()):
        (again,) = lock.parse(package.line())
        assert again.name == package.name and again.hashes == package.hashes and not again.marker


# --- Wheels that fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "of_file", "is_fitting"),
    [
        (PI, "py3-none-any", True),
        (PI, "cp312-cp312-manylinux_2_17_aarch64.manylinux2014_aarch64", True),
        (PI, "cp39-abi3-manylinux_2_31_aarch64", True),
        (PI, "cp39-abi3-manylinux_2_34_aarch64", False),
        (PI, "cp312-cp312-manylinux2014_x86_64", False),
        (PI, "cp312-cp312-musllinux_1_2_aarch64", False),
        (PI, "cp313-cp313-manylinux2014_aarch64", False),
        (PI, "cp313-abi3-manylinux2014_aarch64", False),
        (ALPINE, "cp312-cp312-musllinux_1_1_x86_64", True),
        (ALPINE, "cp312-cp312-manylinux2014_x86_64", False),
        (MAC, "cp313-cp313-macosx_11_0_arm64", True),
        (MAC, "cp39-abi3-macosx_10_12_universal2", True),
        (MAC, "cp313-cp313-macosx_15_0_arm64", False),
        (MAC, "cp313-cp313-macosx_11_0_x86_64", False),
    ],
)  # fmt: skip
def test_which_wheels_fit(target: lock.Target, of_file: str, is_fitting: bool) -> None:
    package = lock.Pinned("some-thing", "1.2.0", "", frozenset())
    assert lock.fits(f"some_thing-1.2.0-{of_file}.whl", package, target.tags()) is is_fitting
    assert not lock.fits(f"some_thing-1.2.1-{of_file}.whl", package, target.tags())
    assert not lock.fits(f"other-1.2.0-{of_file}.whl", package, target.tags())


@given(st.text(max_size=60))
def test_any_name_of_a_file_fits_or_does_not(name: str) -> None:
    lock.fits(name + ".whl", lock.Pinned("a", "1", "", frozenset()), PI.tags())


# --- The wheel -----------------------------------------------------------------------------------


def test_the_wheel_is_the_package_that_runs_and_the_same_each_time(tmp_path: Path) -> None:
    first, second = wheel.pack(tmp_path / "a"), wheel.pack(tmp_path / "b")
    assert first.sha256 == second.sha256 and first.tag.startswith(first.version + "-")
    with zipfile.ZipFile(io.BytesIO(first.path.read_bytes())) as archive:
        names = archive.namelist()
        assert archive.read("arriero/orchestrator/machines/runtime.txt").decode() == wheel.lock_text()
        assert archive.read("arriero/__main__.py") == (wheel.PACKAGE / "__main__.py").read_bytes()
        recorded = archive.read(f"arriero-{first.version}.dist-info/RECORD").decode()
        assert all(f"{name}," in recorded for name in names)
        metadata = archive.read(f"arriero-{first.version}.dist-info/METADATA").decode()
    assert f"\nVersion: {first.version}\n" in metadata and "Requires-Dist: asyncssh" in metadata
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    assert not [name for name in names if name.startswith("/") or ".." in name]


def test_an_older_wheel_goes(tmp_path: Path) -> None:
    (tmp_path / "arriero-0.0.0-py3-none-any.whl").write_bytes(b"old")
    packed = wheel.pack(tmp_path)
    assert [path.name for path in tmp_path.glob("*.whl")] == [packed.path.name]


@pytest.mark.parametrize(
    ("line", "package"),
    [
        ("Collecting rich-click==1.9.9 (from -r /a/runtime.txt (line 1158))", "rich-click"),
        ("Processing /a/wheels/xllamacpp-2026.10-cp310-abi3-linux_x86_64.whl (from -r /a/b)", "xllamacpp"),
        ("Processing ./typing_extensions-4.16.0-py3-none-any.whl", "typing_extensions"),
        ("  Downloading rich-15.0.0.whl (300 kB)", ""),
        ("Collecting", ""),
        ("", ""),
    ],
)
def test_pip_begins_with_a_package(line: str, package: str) -> None:
    assert environment_child.package_begun(line) == package


# --- Which Python --------------------------------------------------------------------------------


def python(version: str, *, has_venv: bool = True, is_fitting: bool = True) -> Python:
    major, minor, patch = map(int, version.split("."))
    return Python(f"/usr/bin/python{major}.{minor}", (major, minor, patch), has_venv, is_fitting)


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ([python("3.11.2")], "3.11.2"),
        ([python("3.9.1"), python("3.12.1"), python("3.11.0")], "3.12.1"),
        ([python("3.15.0"), python("3.13.1")], "3.13.1"),
        ([python("3.15.0")], "3.15.0"),
        ([python("3.13.0", is_fitting=False), python("3.12.0", has_venv=False), python("3.11.0")], "3.11.0"),
    ],
)
def test_the_first_python_that_will_do_is_taken(pythons: list[Python], chosen: str) -> None:
    assert str(Look("Linux", "x86_64", tuple(pythons)).best()) == chosen


@pytest.mark.parametrize(
    ("pythons", "code"),
    [
        ([], ErrorCode.PYTHON_NOT_FOUND),
        ([python("3.8.10"), python("3.10.1")], ErrorCode.PYTHON_TOO_OLD),
        ([python("3.8.10"), python("3.12.1", has_venv=False)], ErrorCode.PYTHON_NOT_FOUND),
    ],
)
def test_why_no_python_will_do(pythons: list[Python], code: ErrorCode) -> None:
    with pytest.raises(ArrieroError) as refused:
        Look("Linux", "x86_64", tuple(pythons)).best()
    assert refused.value.code is code and "3.11" in refused.value.message + str(refused.value.details)


# --- What keeps an agent -------------------------------------------------------------------------


def test_a_unit_of_systemd() -> None:
    env = {"ARRIERO_HOME": "/home/a/x/home", "ARRIERO_AGENT_PORT": "0"}
    lines = agent_child.unit_text("/home/a/x/envs/t/bin/python", env, "/home/a/x/log").splitlines()
    assert "ExecStart=/home/a/x/envs/t/bin/python -m arriero agent" in lines
    assert "Environment=ARRIERO_HOME=/home/a/x/home" in lines
    assert "Restart=on-failure" in lines and "KillMode=process" in lines
    assert "WantedBy=default.target" in lines, "what was ended in order comes up at the next boot"


def test_a_property_list_of_launchd() -> None:
    told = plistlib.loads(
        agent_child.plist("arriero-agent-1", "/p/python", {"ARRIERO_HOME": "/p/home"}, "/p/log")
    )
    assert told["ProgramArguments"] == ["/p/python", "-m", "arriero", "agent"]
    assert told["KeepAlive"] == {"SuccessfulExit": False} and told["RunAtLoad"] is True
    assert told["EnvironmentVariables"] == {"ARRIERO_HOME": "/p/home"}


def test_a_program_that_ran_well_is_started_again_at_once() -> None:
    keeping = Keeping()
    for _ in range(20):
        keeping = keeping.ended(WELL_S)
        assert keeping.delay_s == 0


@given(st.lists(st.floats(0, WELL_S, exclude_max=True), min_size=2, max_size=2000))
def test_one_that_ends_early_is_started_later_and_later_and_never_not_at_all(lives: list[float]) -> None:
    keeping = Keeping()
    delays = []
    for lived_s in lives:
        keeping = keeping.ended(lived_s)
        delays.append(keeping.delay_s)
    assert delays == sorted(delays) and delays[0] == 0 and 0 < delays[-1] <= DELAY_MAX_S
    assert keeping.ended(WELL_S).delay_s == 0
