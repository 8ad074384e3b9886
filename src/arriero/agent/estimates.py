"""What does a model need on each device of this machine, and would it fit there now?"""

import asyncio
from collections.abc import Callable

from arriero.agent.catalog import CatalogEntry
from arriero.agent.machine import Machine
from arriero.agent.preflight import Preflight, configured_options, default_context, spec_of
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import DeviceEstimate, DeviceRecord, ModelEstimate
from arriero.domain.preflight import Promises, Resources, check
from arriero.engines.base import EngineKind, EngineSpec
from arriero.runtime.settings import Settings


class Estimates:
    """Asks the engine's dry run, one at a time: each is a process that lives for a second."""

    def __init__(
        self,
        *,
        settings: Settings,
        machine: Machine,
        preflight: Preflight,
        kind_of: Callable[[str], EngineKind],
        promises: Callable[[], Promises],
    ) -> None:
        self._settings = settings
        self._machine = machine
        self._preflight = preflight
        self._kind_of = kind_of
        self._promises = promises
        self._turn = asyncio.Lock()

    async def of(
        self, entry: CatalogEntry, *, context_tokens: int | None = None, slots: int | None = None
    ) -> ModelEstimate:
        """Return what an entry needs with this context of a slot and these slots; by default as spawned.

        A device where it does not fit, or which the engine cannot use, has the error that a spawn
        there would be refused with.  Raises BACKEND_UNAVAILABLE if the engine is not installed.
        """
        kind = self._kind_of(self._settings.engine)
        tokens = context_tokens or default_context(self._settings, entry.record)
        spec = spec_of(
            entry.path,
            slots=slots or self._settings.worker_slots,
            threads=self._settings.engine_threads,
            options=configured_options(self._settings),
        )
        async with self._turn:
            await self._machine.look_aside()
            resources = self._machine.resources()
            rows = [
                await self._on(kind, spec, device, resources, tokens, entry.record.model_ref)
                for device in resources.devices
            ]
        return ModelEstimate(
            model_id=entry.record.model_id,
            model_ref=entry.record.model_ref,
            node=self._machine.node,
            context_tokens=tokens,
            slots=spec.slots,
            devices=rows,
        )

    async def _on(
        self, kind: EngineKind, spec: EngineSpec, device: DeviceRecord, resources: Resources,
        tokens: int, model_ref: str,
    ) -> DeviceEstimate:  # fmt: skip
        if device.backend not in resources.backends:
            return _row(
                device,
                error=ArrieroError(
                    ErrorCode.BACKEND_UNAVAILABLE, f"the installed engine cannot use {device.name}"
                ),
            )
        try:
            _, need = await self._preflight.need(kind, spec, device, tokens=tokens, model_ref=model_ref)
        except ArrieroError as error:
            return _row(device, error=error)
        try:
            check(need, resources, self._promises())
        except ArrieroError as error:
            return _row(device, host_mb=need.host_mb, device_mb=need.device_mb, error=error)
        return _row(device, host_mb=need.host_mb, device_mb=need.device_mb)


def _row(
    device: DeviceRecord, *, host_mb: int = 0, device_mb: int = 0, error: ArrieroError | None = None
) -> DeviceEstimate:
    return DeviceEstimate(
        device=device.id,
        backend=device.backend,
        host_mb=host_mb,
        device_mb=device_mb,
        fits=error is None,
        code=None if error is None else str(error.code),
        why="" if error is None else error.message,
    )
