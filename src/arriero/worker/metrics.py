"""What has this worker done so far?  Plain integers, turned into text when somebody scrapes."""

import bisect
from typing import Final

from arriero.contracts.errors import ErrorCode
from arriero.domain.speeds import Speed

#: Upper bounds in seconds.
BOUNDS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_OUTCOMES: Final = {
    ErrorCode.REQUEST_CANCELLED: "cancelled",
    ErrorCode.REQUEST_TIMEOUT: "timed_out",
    ErrorCode.STREAM_STALLED: "stalled",
    ErrorCode.QUEUE_FULL: "refused",
    ErrorCode.ALL_SLOTS_BUSY: "refused",
    ErrorCode.REQUEST_ID_IN_USE: "refused",
    ErrorCode.MODEL_LOADING: "refused",
    ErrorCode.NO_READY_WORKERS: "refused",
    ErrorCode.INVALID_REQUEST: "invalid",
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: "invalid",
}


class Histogram:
    """Counts of seconds by bucket."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one value."""
        self._counts[bisect.bisect_left(BOUNDS_S, seconds)] += 1
        self._sum_s += seconds

    def lines(self, name: str) -> list[str]:
        """Return the buckets, the sum and the count."""
        found, running = [], 0
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), self._counts, strict=True):
            running += count
            found.append(f'{name}_bucket{{le="{bound}"}} {running}')
        return [*found, f"{name}_sum {self._sum_s:.6f}", f"{name}_count {running}"]


class Metrics:
    """Counters of one worker."""

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = dict.fromkeys(
            ("done", "cancelled", "timed_out", "stalled", "refused", "invalid", "failed"), 0
        )
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.first_token_s = Histogram()
        self.speed = Speed()

    def ended(self, code: ErrorCode | None) -> None:
        """Count a request's end; None: it was answered whole."""
        self.outcomes["done" if code is None else _OUTCOMES.get(code, "failed")] += 1

    def text(self, *, slots_total: int, slots_busy: int, queued: int, load_s: float, memory_mb: int) -> str:
        """Return everything in Prometheus's text format."""
        lines: list[str] = []

        def add(name: str, kind: str, meaning: str, *samples: str) -> None:
            lines.extend((f"# HELP arriero_worker_{name} {meaning}", f"# TYPE arriero_worker_{name} {kind}"))
            lines.extend(f"arriero_worker_{sample}" for sample in samples)

        outcomes = [f'requests_total{{outcome="{name}"}} {n}' for name, n in self.outcomes.items()]
        add("requests_total", "counter", "Requests by how they ended.", *outcomes)
        add(
            "prompt_tokens_total",
            "counter",
            "Tokens of prompts.",
            f"prompt_tokens_total {self.prompt_tokens}",
        )
        add(
            "completion_tokens_total",
            "counter",
            "Tokens generated.",
            f"completion_tokens_total {self.completion_tokens}",
        )
        add("slots", "gauge", "Slots there are.", f"slots {slots_total}")
        add("slots_busy", "gauge", "Slots that compute.", f"slots_busy {slots_busy}")
        add("queued", "gauge", "Requests that wait.", f"queued {queued}")
        add("load_seconds", "gauge", "Time that loading the model took.", f"load_seconds {load_s:.3f}")
        add(
            "memory_mebibytes",
            "gauge",
            "Resident memory of worker and engine.",
            f"memory_mebibytes {memory_mb}",
        )
        add(
            "first_token_seconds",
            "histogram",
            "Time from a request's arrival to its first token.",
            *self.first_token_s.lines("first_token_seconds"),
        )
        return "\n".join([*lines, ""])
