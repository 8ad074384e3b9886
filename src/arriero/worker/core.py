"""What do all routes of a worker share?"""

import asyncio
from dataclasses import dataclass

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import WorkerHealth
from arriero.contracts.requests import WorkerSpec
from arriero.contracts.states import WorkerState
from arriero.contracts.version import __version__
from arriero.engines.base import EngineRequest
from arriero.runtime.attention import Attention
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy
from arriero.worker.ending import Ending
from arriero.worker.engine_host import EngineHost
from arriero.worker.fencing import Fencing, superseded
from arriero.worker.flights import Flights
from arriero.worker.lease import Lease
from arriero.worker.metrics import Metrics
from arriero.worker.slots import Slots
from arriero.worker.state import Lifecycle

#: A prompt of at most so many bytes is never tokenised beforehand while a slot is free: the engine
#: refuses it quickly enough before its first event.
_SMALL_BYTES = 65_536
#: Tokens that a tokeniser may add by itself.
_SPECIAL_TOKENS = 8
#: What a chat template may add around the messages.
_TEMPLATE_BYTES = 4_096
#: No vocabulary known has a longer token, so a prompt with more bytes a token than this cannot fit.
_TOKEN_BYTES_MAX = 1_024


@dataclass(frozen=True, slots=True)
class Core:
    """The parts of one worker."""

    spec: WorkerSpec
    url: str
    clock: Clock
    entropy: Entropy
    lifecycle: Lifecycle
    slots: Slots
    flights: Flights
    attention: Attention
    host: EngineHost
    lease: Lease
    fencing: Fencing
    ending: Ending
    metrics: Metrics

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: what computed, as far as it can matter to an answer."""
        return f"fp_arriero_{__version__}_{self.spec.engine}"

    def health(self) -> WorkerHealth:
        """Return how the worker is now."""
        life = self.lifecycle
        return WorkerHealth(
            status="failed" if life.failure is not None else "alive",
            worker_id=self.spec.worker_id,
            model_ref=self.spec.model_ref,
            state=life.state,
            slots_total=self.slots.total,
            slots_busy=self.slots.busy,
            queued=self.slots.queued,
            context_tokens=life.context_tokens,
            memory_mb=self.host.memory_mb(),
            load_fraction=life.loading.fraction,
            idle_s=life.idle_s(),
            tokens_per_s=round(self.metrics.speed.tokens_per_s, 2),
            is_embedding=self.spec.is_embedding,
            engine_pid=self.host.pid,
            exit=life.exit,
        )

    def end(self, reason: str, *, grace_s: float | None) -> None:
        """Take no new request from now on, and end when the others have, or after `grace_s`."""
        if self.lifecycle.state is not WorkerState.DRAINING and not self.lifecycle.is_final:
            self.lifecycle.go(WorkerState.DRAINING, reason=reason)
        self.ending.drain(reason, grace_s=grace_s)

    def fence(self, number: int) -> None:
        """Know that the node was taken over: what came under smaller numbers has nobody who waits for it."""
        if not self.fencing.rise(number):
            return
        for flight in self.flights:
            if flight.fence is not None and flight.fence < number:
                flight.interrupt(superseded(flight.fence, number))

    def now_s(self) -> float:
        """Return the time of the loop's clock, which the timers of requests go by."""
        return asyncio.get_running_loop().time()

    async def check_fits(self, request: EngineRequest) -> None:
        """Raise CONTEXT_LENGTH_EXCEEDED if the prompt does not fit into a slot's context.

        Counts tokens only where the size alone does not settle it and the engine will not settle it
        at once itself.  One token's room is left for the answer.
        """
        limit = self.lifecycle.context_tokens
        if request.prompt_ids is not None:
            self._check_count(len(request.prompt_ids), limit)
            return
        if request.prompt is not None:
            size = len(request.prompt.encode("utf-8", "surrogatepass")) + _SPECIAL_TOKENS
        else:
            said = msgspec.json.encode((request.messages, request.chat_options))
            size = len(said) + _TEMPLATE_BYTES
        if size < limit or (size <= _SMALL_BYTES and not self.slots.is_full):
            return
        if size - _TEMPLATE_BYTES > limit * _TOKEN_BYTES_MAX:
            self._check_count((size - _TEMPLATE_BYTES) // _TOKEN_BYTES_MAX, limit)
        prompt = request.prompt
        if prompt is None:
            prompt = await self.host.engine.apply_template(request.messages or (), request.chat_options)
        self._check_count(await self.host.engine.count_tokens(prompt), limit)

    @staticmethod
    def _check_count(count: int, limit: int) -> None:
        if count >= limit:
            raise ArrieroError(
                ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                f"the prompt has {count} tokens or more, the context of a slot holds {limit}",
                n_prompt_tokens=count,
                n_ctx=limit,
            )
