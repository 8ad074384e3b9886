"""What time is it?  Monotonic for durations; wall time only for what people read."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Time, handed in through constructors."""

    def monotonic_s(self) -> float:
        """Return seconds that never go back."""
        ...

    def wall_s(self) -> float:
        """Return seconds since 1970."""
        ...

    async def sleep_s(self, seconds: float) -> None:
        """Wait so long."""
        ...


class SystemClock:
    """The machine's clock."""

    def monotonic_s(self) -> float:
        """Return seconds that never go back."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Return seconds since 1970."""
        return time.time()

    async def sleep_s(self, seconds: float) -> None:
        """Wait so long."""
        await asyncio.sleep(seconds)
