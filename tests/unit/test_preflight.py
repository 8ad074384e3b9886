"""Preflight: which device, and does it fit?"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import DeviceRecord
from arriero.domain.preflight import (
    Need,
    Promise,
    Promises,
    Resources,
    Wish,
    check,
    choose_device,
    offered_backends,
    promise,
    smaller_contexts,
)


def device(name: str, memory_mb: int = 24_000, free_mb: int = 20_000) -> DeviceRecord:
    backend = name.partition(":")[0]
    return DeviceRecord(
        id=name, backend=backend, name=name.upper(), memory_mb=memory_mb, memory_free_mb=free_mb
    )


CPU = device("cpu", 64_000, 48_000)
BOX = Resources(
    node="workstation",
    ram_free_mb=48_000,
    disk_free_mb=100_000,
    backends=("cuda", "cpu"),
    devices=(CPU, device("cuda:0", free_mb=8_000), device("cuda:1", free_mb=20_000)),
)
NONE = Promises()


def need(host_mb: int = 1_000, device_mb: int = 0, on: str = "cpu", disk_mb: int = 20) -> Need:
    return Need(model_ref="demo", device=on, host_mb=host_mb, device_mb=device_mb, disk_mb=disk_mb)


def test_the_accelerator_is_chosen_and_of_its_cards_the_emptiest() -> None:
    assert choose_device(Wish(), BOX, NONE).id == "cuda:1"


def test_promises_count_when_a_card_is_chosen() -> None:
    promised = Promises((Promise(0, 15_000, "cuda:1"),))
    assert choose_device(Wish(), BOX, promised).id == "cuda:0"


def test_the_choice_does_not_depend_on_the_order() -> None:
    twins = (device("cuda:1", free_mb=5), device("cuda:0", free_mb=5))
    for devices in (twins, twins[::-1]):
        assert choose_device(Wish(), changed(BOX, devices=devices), NONE).id == "cuda:0"


def changed(resources: Resources, **changes: object) -> Resources:
    import dataclasses

    return dataclasses.replace(resources, **changes)  # type: ignore[arg-type]  # Fields by name, for short tests.


@pytest.mark.parametrize(
    ("wish", "code"),
    [
        (Wish(backend="metal"), ErrorCode.BACKEND_UNAVAILABLE),
        (Wish(backend="cuda", device="cpu"), ErrorCode.BACKEND_UNAVAILABLE),
        (Wish(device="cuda:2"), ErrorCode.DEVICE_NOT_FOUND),
        (Wish(device=""), ErrorCode.DEVICE_NOT_FOUND),
    ],
)
def test_what_is_not_there_is_refused(wish: Wish, code: ErrorCode) -> None:
    with pytest.raises(ArrieroError) as refused:
        choose_device(wish, BOX, NONE)
    assert refused.value.code is code
    assert refused.value.details["node"] == "workstation"


def test_a_card_without_an_engine_for_it_is_shown_and_refused() -> None:
    devices = (CPU, device("cuda:0"))
    offered = offered_backends(["cpu"], devices)
    box = changed(BOX, devices=devices, backends=offered)
    assert offered == ("cpu",)
    for wish in (Wish(), Wish(backend="cuda"), Wish(device="cuda:0")):
        with pytest.raises(ArrieroError) as refused:
            choose_device(wish, box, NONE)
        assert refused.value.code is ErrorCode.BACKEND_UNAVAILABLE
        assert "`arriero engines install --node workstation`" in refused.value.details["suggested_action"]
    for wish in (Wish(backend="cpu"), Wish(device="cpu")):
        assert choose_device(wish, box, NONE).id == "cpu", "somebody asked for the CPU"


def test_a_card_that_is_passed_over_for_another_one_is_no_obstacle() -> None:
    devices = (CPU, device("cuda:0"), device("vulkan:0"))
    box = changed(BOX, devices=devices, backends=("vulkan", "cpu"))
    assert choose_device(Wish(), box, NONE).id == "vulkan:0"


def test_an_engine_for_a_card_that_is_not_there_offers_nothing() -> None:
    assert offered_backends(["cuda", "cpu"], [CPU]) == ("cpu",)


@pytest.mark.parametrize(
    ("wanted", "code", "required", "available"),
    [
        (need(host_mb=48_001), ErrorCode.INSUFFICIENT_RAM, 48_001, 48_000),
        (need(device_mb=8_001, on="cuda:0"), ErrorCode.INSUFFICIENT_VRAM, 8_001, 8_000),
        (need(disk_mb=100_001), ErrorCode.INSUFFICIENT_DISK, 100_001, 100_000),
    ],
)
def test_too_little_is_refused_with_the_numbers(
    wanted: Need, code: ErrorCode, required: int, available: int
) -> None:
    with pytest.raises(ArrieroError) as refused:
        check(wanted, BOX, NONE)
    details = refused.value.details
    assert refused.value.code is code
    assert (details["required_mb"], details["available_mb"]) == (required, available)
    assert details["node"] == "workstation"
    assert details["suggested_action"]
    assert str(required) in refused.value.message


def test_what_fits_exactly_passes() -> None:
    check(need(host_mb=48_000, disk_mb=100_000), BOX, NONE)
    check(need(device_mb=8_000, on="cuda:0"), BOX, NONE)


def test_a_memory_limit_is_named_in_the_advice() -> None:
    limited = changed(BOX, is_limited_by_cgroup=True)
    with pytest.raises(ArrieroError) as refused:
        check(need(host_mb=50_000), limited, NONE)
    assert "raise the memory limit" in refused.value.details["suggested_action"]


def test_memory_promised_to_loading_workers_is_not_free() -> None:
    promised = Promises((Promise(30_000, 0, "cpu"), Promise(10_000, 0, "cpu")))
    check(need(host_mb=8_000), BOX, promised)
    with pytest.raises(ArrieroError) as refused:
        check(need(host_mb=8_001), BOX, promised)
    assert refused.value.details["available_mb"] == 8_000
    assert refused.value.details["promised_mb"] == 40_000


@given(estimated=st.integers(0, 10**6), used=st.integers(0, 10**6), card=st.integers(0, 10**6))
def test_a_promise_shrinks_with_what_is_taken_and_is_never_negative(
    estimated: int, used: int, card: int
) -> None:
    made = promise(estimated_host_mb=estimated, estimated_device_mb=card, used_mb=used, device="cuda:0")
    assert made.host_mb == max(0, estimated - used)
    assert Promises((made,)).device_mb("cuda:0") == card
    assert Promises((made,)).device_mb("cuda:1") == 0


@given(tokens=st.integers(64, 1_048_576), least=st.integers(64, 4096))
def test_contexts_fall_by_halves_to_the_least_and_begin_with_the_asked(tokens: int, least: int) -> None:
    tried = list(smaller_contexts(tokens, least=least))
    assert tried[0] == tokens
    assert tried == sorted(set(tried), reverse=True)
    assert tried[-1] == min(tokens, least)
