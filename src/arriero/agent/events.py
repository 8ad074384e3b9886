"""Who hears of what changes on this machine?  (`GET /v1/events`)

Every reader has a bounded queue; one that reads too slowly loses the queue and gets a snapshot
instead, so that it is never wrong for long and never costs memory.
"""

from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Final

from arriero.contracts.events import AgentEvent, AgentSnapshot
from arriero.runtime.tasks import Changed

QUEUE_MAX: Final = 1024


class _Reader:
    def __init__(self) -> None:
        self.queue: deque[AgentEvent] = deque()
        self.needs_snapshot = True
        self.changed = Changed()


class Feed:
    """Sends events to all readers."""

    def __init__(self, snapshot: Callable[[], AgentSnapshot]) -> None:
        self._snapshot = snapshot
        self._readers: set[_Reader] = set()

    @property
    def readers(self) -> int:
        """How many read now."""
        return len(self._readers)

    def publish(self, event: AgentEvent) -> None:
        """Give `event` to every reader; never waits."""
        for reader in self._readers:
            if len(reader.queue) >= QUEUE_MAX:
                reader.queue.clear()
                reader.needs_snapshot = True
            elif not reader.needs_snapshot:
                reader.queue.append(event)
            reader.changed.notify()

    def renew(self) -> None:
        """Give every reader a snapshot next: more has changed than an event tells."""
        for reader in self._readers:
            reader.queue.clear()
            reader.needs_snapshot = True
            reader.changed.notify()

    def wake(self) -> None:
        """Let every reader look whether it may still read."""
        for reader in self._readers:
            reader.changed.notify()

    async def read(self, check: Callable[[], None] | None = None) -> AsyncGenerator[AgentEvent, None]:
        """Yield a snapshot, then every change; ends by being closed, or with what `check` raises."""
        reader = _Reader()
        self._readers.add(reader)
        try:
            while True:
                if check is not None:
                    check()
                if reader.needs_snapshot:
                    # Taken without an await in between: what follows in the queue is newer.
                    reader.needs_snapshot = False
                    yield self._snapshot()
                elif reader.queue:
                    yield reader.queue.popleft()
                else:
                    await reader.changed.wait()
        finally:
            self._readers.discard(reader)
