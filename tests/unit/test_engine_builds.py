"""Which build of the engine suits which machine, and what is a person told of it?"""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.test_devices import mac, seen

from arriero.agent.engine_builds import FoundBuild, refuse_unusable
from arriero.cli.diagnosis import judge_builds
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import DeviceRecord, EngineBuild
from arriero.domain.engine_builds import (
    CUDA_BUILDS,
    BuildView,
    Platform,
    WantedBuild,
    advice,
    backend_of,
    backends_of,
    build_for,
    driver_branch,
    needed_libraries,
    unused_accelerator,
    wanted_build,
)
from arriero.engines.llamacpp_backends import EngineAnswer, EngineDevice

LINUX = Platform(os="linux", arch="x86_64", python=(3, 12), glibc=(2, 39))
CPU = DeviceRecord(id="cpu", backend="cpu", name="A processor", memory_mb=1000, memory_free_mb=500)
OWN = BuildView("cpu", ("cpu",), is_own=True)


def card(driver: str, name: str = "A card") -> DeviceRecord:
    return DeviceRecord(
        id="cuda:0", backend="cuda", name=name, memory_mb=9000, memory_free_mb=8000, driver=driver
    )


@pytest.mark.parametrize(
    ("recording", "build", "least"),
    [
        ("nvidia-h200-new-driver", "cu132", 595),
        ("nvidia-two-cards", "cu128", 570),
        ("nvidia-pascal-last-driver", "cu128", 570),
        ("nvidia-old-driver", "cpu", 570),
        ("nvidia-no-driver", "cpu", 0),
    ],
)
def test_the_build_suits_the_driver(recording: str, build: str, least: int) -> None:
    wanted = wanted_build(LINUX, (CPU, *seen(recording).devices))
    assert (wanted.name, wanted.driver_least) == (build, least)
    assert bool(wanted.obstacle) == (recording == "nvidia-old-driver")


def test_a_mac_gets_metal_where_it_has_it() -> None:
    arm = Platform(os="darwin", arch="arm64", python=(3, 12))
    assert wanted_build(arm, (CPU, *mac("mac-m2-max-64").devices)).name == "metal"
    assert wanted_build(arm, (CPU, *mac("mac-intel").devices)).name == "cpu"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"glibc": (2, 31)}, "need glibc 2.35, the system has 2.31"),
        ({"arch": "riscv64"}, "no CUDA build of the engine for linux riscv64"),
        ({"os": "freebsd"}, "no CUDA build of the engine for freebsd x86_64"),
    ],
)
def test_a_system_that_no_cuda_build_is_made_for_is_told(changes: dict[str, object], why: str) -> None:
    there = dataclasses.replace(LINUX, **changes)  # type: ignore[arg-type]  # Fields by name, for a short table.
    wanted = wanted_build(there, [CPU, card("595.58.03")])
    assert wanted.name == "cpu" and why in wanted.obstacle and why in wanted.why


@given(st.text(max_size=20))
def test_whatever_a_driver_calls_itself_a_build_is_named(driver: str) -> None:
    wanted = wanted_build(LINUX, [CPU, card(driver)])
    branch = driver_branch(driver)
    assert (wanted.name == "cpu") == (branch is None or branch < 570)


@given(st.integers(0, 2000), st.integers(0, 2000))
def test_a_newer_driver_never_gets_an_older_build(first: int, second: int) -> None:
    names = ["cpu", *reversed([name for name, _, _ in CUDA_BUILDS])]
    low, high = sorted((first, second))
    ranks = [names.index(wanted_build(LINUX, [card(f"{branch}.1")]).name) for branch in (low, high)]
    assert ranks == sorted(ranks)


def test_the_name_of_a_build_tells_its_backend() -> None:
    named = {
        name: backend_of(name) for name in ("cpu", "metal", "cu128", "cu132", "rocm-7.2.4", "vulkan", "x")
    }
    assert list(named.values()) == ["cpu", "metal", "cuda", "cuda", "rocm", "vulkan", ""]
    assert needed_libraries("cu128") == ("libcudart.so.12", "libcublas.so.12")
    assert needed_libraries("cu132") == ("libcudart.so.13", "libcublas.so.13")
    assert [name for name in named if needed_libraries(name)] == ["cu128", "cu132"]


BUILDS = st.lists(
    st.builds(
        BuildView,
        name=st.sampled_from(["cpu", "cu128", "cu132", "vulkan"]),
        backends=st.lists(st.sampled_from(["cpu", "cuda", "vulkan"]), unique=True).map(tuple),
        is_own=st.booleans(),
        problem=st.sampled_from(["", "broken"]),
    ),
    max_size=5,
)


@given(BUILDS, st.sampled_from(["cpu", "cuda", "vulkan", "metal"]), st.sampled_from(["cu128", "cu132"]))
def test_a_build_that_works_for_the_backend_is_used_and_no_other(
    builds: list[BuildView], backend: str, wanted: str
) -> None:
    chosen = build_for(backend, builds, wanted)
    assert (chosen is None) == (backend not in backends_of(builds))
    if chosen is not None:
        assert not chosen.problem and backend in chosen.backends
        able = [build for build in builds if not build.problem and backend in build.backends]
        if backend == "cpu":
            assert chosen.is_own == any(build.is_own for build in able)
        else:
            assert (chosen.name == wanted) == any(build.name == wanted for build in able)


CU128 = BuildView("cu128", ("cuda", "cpu"))


@pytest.mark.parametrize(
    ("builds", "driver", "told"),
    [
        ([OWN], "570.1", "A card is not used: no build of the engine for it is installed"),
        ([OWN], "570.1", "`arriero engines install --node box` installs cu128"),
        ([OWN], "535.1", "no build of the engine works with a driver older than 570: install a newer driver"),
        (
            [OWN, dataclasses.replace(CU128, problem="is of version 1")],
            "570.1",
            "build cu128 is of version 1; `arr",
        ),
        ([OWN], "570.1", "until then only work that asks for `--backend cpu` runs here"),
    ],
)
def test_a_card_that_is_not_used_is_told_with_what_to_do(
    builds: list[BuildView], driver: str, told: str
) -> None:
    devices = [CPU, card(driver)]
    [sentence] = advice(builds, wanted_build(LINUX, devices), devices, node="box")
    assert told in sentence


def test_nothing_is_told_where_all_is_well() -> None:
    devices = [CPU, card("570.1")]
    assert advice([OWN, CU128], wanted_build(LINUX, devices), devices) == []
    assert advice([OWN], wanted_build(LINUX, [CPU]), [CPU]) == []
    assert unused_accelerator(["cpu"], devices) == devices[1]
    assert unused_accelerator(["cuda", "cpu"], devices) is None
    assert unused_accelerator(["cpu"], [CPU]) is None


def found(view: BuildView) -> FoundBuild:
    record = EngineBuild(
        name=view.name, version="1", is_own=view.is_own, backends=list(view.backends), problem=view.problem
    )
    return FoundBuild(record, ())


def test_the_doctor_says_it_too() -> None:
    devices = [CPU, card("570.1")]
    [missing] = judge_builds([found(OWN)], LINUX, devices)
    assert missing.level == "fail" and "A card is not used" in missing.message
    assert "`arriero engines install`" in missing.advice
    [well] = judge_builds([found(OWN), found(CU128)], LINUX, devices)
    assert well.level == "ok" and "cu128 suits" in well.message
    old = found(dataclasses.replace(CU128, problem="is of version 0"))
    levels = [finding.level for finding in judge_builds([found(OWN), old], LINUX, [CPU])]
    assert levels == ["warn", "ok"]
    [driver] = judge_builds([found(OWN)], LINUX, [CPU, card("535.1")])
    assert "install a newer driver" in driver.advice


def test_a_build_that_loads_and_does_not_see_its_card_is_refused() -> None:
    blind = EngineAnswer((EngineDevice("cpu", 0, "A processor", 1, 1),))
    record = EngineBuild(name="cu128", version="1")
    with pytest.raises(ArrieroError) as refused:
        refuse_unusable(record, blind, [CPU, card("570.1")])
    assert refused.value.code is ErrorCode.BACKEND_UNAVAILABLE
    assert "does not see A card with driver 570.1" in refused.value.message
    refuse_unusable(record, blind, [CPU])
    seeing = EngineAnswer((*blind.devices, EngineDevice("cuda", 0, "A card", 1, 1)))
    refuse_unusable(record, seeing, [CPU, card("570.1")])


def test_the_suitable_build_of_a_machine_without_any_accelerator_is_its_own() -> None:
    assert wanted_build(LINUX, [CPU]) == WantedBuild(
        "cpu", "the machine has no accelerator that a build is chosen for by itself"
    )
