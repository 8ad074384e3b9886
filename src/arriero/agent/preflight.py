"""Can this model be started here now, on which device, and with how much context?  (`Preflight`)"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from arriero.agent.machine import Machine
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import DeviceRecord, ModelRecord
from arriero.domain.preflight import Need, Promises, Wish, check, choose_device, smaller_contexts
from arriero.engines.base import EngineKind, EngineSpec, Estimate
from arriero.runtime.settings import Settings

#: What a worker takes besides its engine: the interpreter with its libraries (measured: some 70 MiB).
WORKER_OVERHEAD_MB = 100
#: With less context than this a model is refused rather than started.
CONTEXT_LEAST_TOKENS = 512
_TOO_BIG = frozenset({ErrorCode.INSUFFICIENT_RAM, ErrorCode.INSUFFICIENT_VRAM})


@dataclass(frozen=True, slots=True)
class Plan:
    """What passed: the device, the engine's spec with its context, and what it needs."""

    spec: EngineSpec
    need: Need
    estimate: Estimate
    #: The context was reduced so that the model fits.
    is_reduced: bool


class Preflight:
    """Reckons with what a machine has free, promises to loading workers counted."""

    def __init__(self, machine: Machine, *, log_bytes_max: int) -> None:
        self._machine = machine
        # A log and the older one that rotation keeps.
        self._disk_mb = 2 * log_bytes_max // (1024 * 1024) + 1

    async def plan(
        self, kind: EngineKind, spec: EngineSpec, wish: Wish, *, model_ref: str, context: tuple[int, bool],
        promises: Promises,
    ) -> Plan:  # fmt: skip
        """Choose the device and estimate; `context` is the tokens of a slot, and whether they are fixed.

        A context that nobody asked for is halved until the model fits.  Raises BACKEND_UNAVAILABLE,
        DEVICE_NOT_FOUND, INSUFFICIENT_RAM, INSUFFICIENT_VRAM, INSUFFICIENT_DISK, and what the
        engine says of the file.  What is too small is told with what the whole context needs, and as
        least_mb what the least one does.
        """
        await self._machine.look_aside()
        device = choose_device(wish, self._machine.resources(), promises)
        tokens, is_fixed = context
        first_error: ArrieroError | None = None
        for tried in [tokens] if is_fixed else smaller_contexts(tokens, least=CONTEXT_LEAST_TOKENS):
            tried_spec = self._on(spec, device, tried)
            estimate, need = await self.need(kind, spec, device, tokens=tried, model_ref=model_ref)
            try:
                check(need, self._machine.resources(), promises)
            except ArrieroError as error:
                first_error = first_error or error
                if error.code not in _TOO_BIG:
                    raise
                if error.code is first_error.code:
                    # Of the same memory: with less, the host's may be what lacks.
                    first_error.details["least_mb"] = error.details["required_mb"]
                continue
            return Plan(tried_spec, need, estimate, is_reduced=tried < tokens)
        assert first_error is not None, "at least one context is tried"
        raise first_error

    async def need(
        self, kind: EngineKind, spec: EngineSpec, device: DeviceRecord, *, tokens: int, model_ref: str
    ) -> tuple[Estimate, Need]:
        """Return what the engine's dry run says, and what a worker on `device` takes in all.

        Raises what the engine says of the file.
        """
        estimate = await kind.estimate(self._on(spec, device, tokens))
        need = Need(
            model_ref=model_ref,
            device=device.id,
            host_mb=estimate.host_mb + WORKER_OVERHEAD_MB,
            device_mb=estimate.device_mb,
            disk_mb=self._disk_mb,
        )
        return estimate, need

    def _on(self, spec: EngineSpec, device: DeviceRecord, tokens: int) -> EngineSpec:
        folder = self._machine.engine_folder(device.backend)
        return replace(
            spec, backend=device.backend, device=device.id, context_tokens=tokens, engine_folder=folder
        )

    def recheck(self, plan: Plan, promises: Promises) -> None:
        """Check once more, right before the spawn, with fresh numbers and without waiting.

        Raises INSUFFICIENT_RAM, INSUFFICIENT_VRAM or INSUFFICIENT_DISK.
        """
        if plan.need.device_mb > 0:
            self._machine.look()
        check(plan.need, self._machine.resources(), promises)


def default_context(settings: Settings, record: ModelRecord) -> int:
    """Return the tokens of a slot where nobody asks for a number: the model's own, up to the limit."""
    limit = settings.context_tokens_max
    return min(limit, record.context_length or limit)


def configured_options(settings: Settings) -> dict[str, Any]:
    """Return the options of the settings' engine.  Raises INVALID_SETTINGS if they are no JSON object."""
    try:
        return msgspec.json.decode(settings.engine_options, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ArrieroError(
            ErrorCode.INVALID_SETTINGS, f"engine_options is no JSON object: {error}"
        ) from error


def spec_of(model_path: Path, *, slots: int, threads: int, options: dict[str, object]) -> EngineSpec:
    """Return an engine's spec before a device and a context are chosen."""
    return EngineSpec(model_path=model_path, slots=slots, threads=threads, options=options)
