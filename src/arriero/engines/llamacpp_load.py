"""How far is llama.cpp with loading, and why did it not become ready?

llama.cpp tells its state on stdout in a protocol of its own, so it is read leniently: a line that
is not understood is passed over, and where none comes, `/health` says when it is ready.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any, Final, NoReturn

import msgspec

from arriero.contracts.errors import ErrorCode, fail
from arriero.engines import unix_http
from arriero.engines.base import EngineExit, LoadProgress
from arriero.engines.child import EngineChild
from arriero.engines.llamacpp_child import EXIT_NO_DEVICE
from arriero.runtime.clock import Clock
from arriero.runtime.tasks import Changed

STATE_PREFIX: Final = b"cmd_child_to_router:state:"
#: More steps than llama.cpp tells (one for each percent).
UNTOLD_MAX: Final = 1024
_POLL_S: Final = 0.2
_HEALTH_TIMEOUT_S: Final = 2.0
#: Memory that grows is progress too, where nothing else is told.
_GROWTH_MB: Final = 4
LOG_LINES_TOLD: Final = 20

_SAYS_CORRUPTED: Final = (
    "corrupted or incomplete",
    "is not within the file bounds",
    "missing tensor",
    "check_tensor_dims",
    "wrong shape",
    "wrong number of tensors",
    "failed to read tensor",
    "invalid magic",
)
_SAYS_NO_MEMORY: Final = ("unable to allocate", "failed to allocate", "out of memory", "bad_alloc")


class LoadState:
    """What the child's stdout has told so far."""

    def __init__(self) -> None:
        self.fraction = 0.0
        #: Rising fractions that nobody was told yet: several lines may come at once.
        self.untold: deque[float] = deque([0.0], maxlen=UNTOLD_MAX)
        self.is_told = False
        self.is_ready = False
        self.changed = Changed()

    def take(self, line: bytes) -> None:
        """Take one line of the child's stdout; anything that is not a state is passed over."""
        if not line.startswith(STATE_PREFIX):
            return
        try:
            told = msgspec.json.decode(line[len(STATE_PREFIX) :])
        except msgspec.DecodeError:
            return
        if not isinstance(told, dict):
            return
        if told.get("state") == "ready":
            self.is_ready = True
        elif told.get("state") == "loading":
            self._advance(told.get("payload"))
        self.changed.notify()

    def _advance(self, payload: Any) -> None:
        """Make one fraction of the stages (a model may have several: text, vision, draft)."""
        if not isinstance(payload, dict):
            return
        value, stages = payload.get("value"), payload.get("stages")
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        done, count = 0, 1
        if isinstance(stages, list) and stages:
            count = len(stages)
            done = stages.index(payload["current"]) if payload.get("current") in stages else 0
        self.is_told = True
        fraction = min(1.0, (done + min(1.0, max(0.0, value))) / count)
        if fraction > self.fraction:
            self.fraction = fraction
            self.untold.append(fraction)


async def progress(
    child: EngineChild, state: LoadState, socket_path: str, *, blocks: int, stall_s: float, clock: Clock
) -> AsyncGenerator[LoadProgress, None]:
    """Tell each step until the engine answers; fractions rise.

    Raises what `fail_for_exit` raises when the child ends, LOADING_TIMEOUT after `stall_s` seconds
    without progress.
    """
    told, memory_mb = 0.0, 0
    advanced_s = clock.monotonic_s()
    while state.untold or not state.is_ready:
        if state.untold:
            told, memory_mb, advanced_s = state.untold.popleft(), child.memory_mb(), clock.monotonic_s()
            yield LoadProgress(told, int(told * blocks), blocks, memory_mb)
            continue
        if await child.wait_ended(0.0):
            return
        # A step told between the check and this wait costs one poll, no more.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S):
                await state.changed.wait()
        if not state.is_told and await is_healthy(socket_path):
            return
        if child.memory_mb() >= memory_mb + _GROWTH_MB:
            memory_mb, advanced_s = child.memory_mb(), clock.monotonic_s()
        if clock.monotonic_s() - advanced_s > stall_s:
            fail(
                ErrorCode.LOADING_TIMEOUT,
                f"no progress for {stall_s:g} s, at {told:.0%}",
                fraction=told,
                log_tail=list(child.log_tail(LOG_LINES_TOLD)),
            )
    if state.fraction < 1.0:
        yield LoadProgress(1.0, blocks, blocks, child.memory_mb())


async def is_healthy(socket_path: str) -> bool:
    """Return whether the engine answers, and that its model is loaded; waits 2 s at most."""
    try:
        answer = await unix_http.call(socket_path, "GET", "/health", timeout_s=_HEALTH_TIMEOUT_S)
    except (unix_http.ConnectionLost, TimeoutError):
        return False
    return answer.status == 200


def fail_for_exit(end: EngineExit, *, backend: str) -> NoReturn:
    """Raise why a load failed whose process ended by itself.

    OUT_OF_MEMORY if the kernel killed it for memory, BACKEND_UNAVAILABLE if it sees no accelerator,
    MODEL_CORRUPTED, INSUFFICIENT_RAM or INSUFFICIENT_VRAM if its log says so, else
    WORKER_START_FAILED; the details carry the log's last lines.
    """
    tail = list(end.log_tail[-LOG_LINES_TOLD:])
    details: dict[str, Any] = {"exit_code": end.exit_code, "signal": end.signal, "log_tail": tail}
    if end.is_out_of_memory:
        fail(ErrorCode.OUT_OF_MEMORY, "the kernel killed the engine for memory while it loaded", **details)
    if end.exit_code == EXIT_NO_DEVICE:
        fail(
            ErrorCode.BACKEND_UNAVAILABLE,
            f"the installed engine has no device for the backend {backend}",
            backend=backend,
            **details,
        )
    text = "\n".join(tail).lower()
    if any(words in text for words in _SAYS_CORRUPTED):
        fail(ErrorCode.MODEL_CORRUPTED, f"the engine refuses the model: {_reason(tail)}", **details)
    if any(words in text for words in _SAYS_NO_MEMORY):
        code = ErrorCode.INSUFFICIENT_RAM if backend == "cpu" else ErrorCode.INSUFFICIENT_VRAM
        fail(code, f"the engine found too little memory: {_reason(tail)}", **details)
    how = f"signal {end.signal}" if end.signal is not None else f"exit code {end.exit_code}"
    fail(
        ErrorCode.WORKER_START_FAILED,
        f"the engine ended while loading ({how}): {_reason(tail)}",
        **details,
    )


def _reason(tail: list[str]) -> str:
    """Return the log line that says why: a failed assertion, else the first of level error."""
    for line in tail:
        if "GGML_ASSERT" in line:
            return line[line.index("GGML_ASSERT") :][:300]
    for line in tail:
        words = line.split(maxsplit=2)
        if len(words) == 3 and words[1] == "E":
            return words[2].removeprefix("llama_model_load: error loading model: ")[:300]
    return tail[-1][:300] if tail else "it said nothing"
