"""Does a model fit on this machine now?  (numbers in, an error with numbers out)

Nothing falls back to the CPU by itself: a backend or a device that was asked for and cannot be
used is an error, and so is one that is too small.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from arriero.contracts.errors import ErrorCode, fail
from arriero.contracts.records import DeviceRecord
from arriero.domain.engine_builds import install_command, unused_accelerator

#: Backends in the order in which one is chosen where none is asked for.
PREFERENCE = ("cuda", "metal", "rocm", "vulkan", "sycl", "cpu")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a machine has free now, in MiB."""

    node: str
    #: The smaller of the host's available memory and what the memory cgroup leaves.
    ram_free_mb: int
    disk_free_mb: int
    #: What the installed engine can compute with here.
    backends: tuple[str, ...]
    devices: tuple[DeviceRecord, ...]
    #: Whether `ram_free_mb` comes from a cgroup's limit: the advice differs.
    is_limited_by_cgroup: bool = False


@dataclass(frozen=True, slots=True)
class Promise:
    """Memory that was promised to a worker which has not taken it yet, in MiB."""

    host_mb: int
    device_mb: int
    device: str


@dataclass(frozen=True, slots=True)
class Need:
    """What a worker will take, in MiB."""

    model_ref: str
    device: str
    host_mb: int
    device_mb: int
    disk_mb: int = 0


@dataclass(frozen=True, slots=True)
class Wish:
    """What the person asked for; None: choose."""

    backend: str | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class Promises:
    """All promises of a machine."""

    each: tuple[Promise, ...] = field(default=())

    @property
    def host_mb(self) -> int:
        """Host memory promised in all."""
        return sum(promise.host_mb for promise in self.each)

    def device_mb(self, device: str) -> int:
        """Memory of a device promised in all."""
        return sum(promise.device_mb for promise in self.each if promise.device == device)

    def by_device(self) -> dict[str, int]:
        """Return what is promised of each device; the host's memory as that of "cpu"."""
        promised = {promise.device: self.device_mb(promise.device) for promise in self.each}
        promised["cpu"] = self.host_mb
        return {device: memory_mb for device, memory_mb in promised.items() if memory_mb > 0}


def promise(*, estimated_host_mb: int, estimated_device_mb: int, used_mb: int, device: str) -> Promise:
    """Return what a loading worker may still take of its estimate.

    What it uses already is missing from the free memory, so it is not counted twice.  How far the
    device's part is filled is not known: it stays promised until the model is loaded.
    """
    return Promise(max(0, estimated_host_mb - used_mb), estimated_device_mb, device)


def choose_device(wish: Wish, resources: Resources, promises: Promises) -> DeviceRecord:
    """Return the device to use: the one asked for, else the emptiest of the best backend.

    Raises DEVICE_NOT_FOUND and BACKEND_UNAVAILABLE.
    """
    if wish.device is not None:
        found = [device for device in resources.devices if device.id == wish.device]
        if not found:
            known = ", ".join(sorted(device.id for device in resources.devices)) or "none"
            fail(
                ErrorCode.DEVICE_NOT_FOUND,
                f"{resources.node} has no device {wish.device[:64]!r}; it has: {known}",
                node=resources.node,
                device=wish.device[:64],
                devices=sorted(device.id for device in resources.devices),
            )
        if wish.backend not in (None, found[0].backend):
            _no_backend(wish.backend or "", resources, f"{wish.device} belongs to {found[0].backend}")
        if found[0].backend not in resources.backends:
            _no_backend(found[0].backend, resources, f"the installed engine cannot use {found[0].name}")
        return found[0]
    if wish.backend is None:
        _refuse_to_pass_over_an_accelerator(resources)
    backend = wish.backend or next((name for name in PREFERENCE if name in resources.backends), "cpu")
    candidates = [device for device in resources.devices if device.backend == backend]
    if backend not in resources.backends:
        reason = "the installed engine cannot use it" if candidates else "no such device, or no engine for it"
        _no_backend(backend, resources, reason)
    if not candidates:
        _no_backend(backend, resources, "no device of it answers")
    return min(candidates, key=lambda d: (promises.device_mb(d.id) - d.memory_free_mb, d.id))


def check(need: Need, resources: Resources, promises: Promises) -> None:
    """Return if everything needed is free, promises to others counted.

    Raises INSUFFICIENT_RAM, INSUFFICIENT_VRAM or INSUFFICIENT_DISK with required_mb, available_mb,
    node and suggested_action.
    """
    if need.device_mb > 0:
        device = next(device for device in resources.devices if device.id == need.device)
        free_mb = device.memory_free_mb - promises.device_mb(device.id)
        if need.device_mb > free_mb:
            _refuse(
                ErrorCode.INSUFFICIENT_VRAM,
                f"needs {need.device_mb} MB, {device.id} has {max(0, free_mb)} MB free",
                required_mb=need.device_mb,
                available_mb=max(0, free_mb),
                need=need,
                resources=resources,
                promised_mb=promises.device_mb(device.id),
                advice="use a smaller quantisation or context, stop a worker, or --backend cpu",
            )
    free_mb = resources.ram_free_mb - promises.host_mb
    if need.host_mb > free_mb:
        limit = " within its memory limit" if resources.is_limited_by_cgroup else ""
        raise_limit = ", or raise the memory limit" if resources.is_limited_by_cgroup else ""
        _refuse(
            ErrorCode.INSUFFICIENT_RAM,
            f"needs {need.host_mb} MB, {resources.node} has {max(0, free_mb)} MB free{limit}",
            required_mb=need.host_mb,
            available_mb=max(0, free_mb),
            need=need,
            resources=resources,
            promised_mb=promises.host_mb,
            advice=f"use a smaller quantisation or context, stop a worker{raise_limit}",
        )
    if need.disk_mb > resources.disk_free_mb:
        _refuse(
            ErrorCode.INSUFFICIENT_DISK,
            f"a worker's log needs {need.disk_mb} MB, the disk of {resources.node} has "
            f"{resources.disk_free_mb} MB free",
            required_mb=need.disk_mb,
            available_mb=resources.disk_free_mb,
            need=need,
            resources=resources,
            promised_mb=0,
            advice="remove models (`arriero models list`), or move ARRIERO_HOME to a larger disk",
        )


def smaller_contexts(context_tokens: int, *, least: int = 512) -> Iterable[int]:
    """Yield the contexts to try, largest first: halved until `least`."""
    while context_tokens > least:
        yield context_tokens
        context_tokens = max(context_tokens // 2, least)
    yield context_tokens


def offered_backends(engine_backends: Sequence[str], devices: Sequence[DeviceRecord]) -> tuple[str, ...]:
    """Return what can be computed with here: what the engine's build supports and a device exists for."""
    present = {device.backend for device in devices}
    return tuple(name for name in PREFERENCE if name in engine_backends and name in present)


def _refuse_to_pass_over_an_accelerator(resources: Resources) -> None:
    idle = unused_accelerator(resources.backends, resources.devices)
    if idle is not None:
        _no_backend(
            idle.backend, resources, f"no installed build of the engine computes on {idle.name}, "
            "and nothing is left to the CPU that does not ask for it",
        )  # fmt: skip


def _no_backend(backend: str, resources: Resources, why: str) -> None:
    offered = ", ".join(resources.backends) or "none"
    details: dict[str, str] = {}
    if any(device.backend == backend for device in resources.devices):
        command = install_command(resources.node)
        details["suggested_action"] = f"`{command}` gets the build that fits, or ask for `--backend cpu`."
    fail(
        ErrorCode.BACKEND_UNAVAILABLE,
        f"{resources.node} cannot use the backend {backend[:64]!r}: {why}; it offers: {offered}",
        node=resources.node,
        backend=backend[:64],
        backends=list(resources.backends),
        **details,
    )


def _refuse(
    code: ErrorCode,
    message: str,
    *,
    required_mb: int,
    available_mb: int,
    need: Need,
    resources: Resources,
    promised_mb: int,
    advice: str,
) -> None:
    fail(
        code,
        message,
        required_mb=required_mb,
        available_mb=available_mb,
        node=resources.node,
        device=need.device,
        model_ref=need.model_ref,
        promised_mb=promised_mb,
        suggested_action=advice,
    )
