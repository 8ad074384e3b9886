"""Who hears what changes in the pool?  (`GET /v1/events`)"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Final

import msgspec

from arriero.contracts.events import PoolEvent, PoolSnapshot
from arriero.runtime import sse

#: A listener that is further behind is let go: it comes back and gets a new snapshot.
BEHIND_MAX: Final = 1000


class _Listener:
    def __init__(self) -> None:
        self.frames: deque[bytes] = deque()
        self.woken = asyncio.Event()
        self.is_dropped = False


class Feed:
    """Sends each event to everybody who listens; nobody can hold it up."""

    def __init__(self) -> None:
        self._listeners: set[_Listener] = set()
        self._number = 0

    def tell(self, event: PoolEvent) -> None:
        """Send an event to all listeners."""
        self._number += 1
        if not self._listeners:
            return
        frame = sse.encode(msgspec.json.encode(event), event_id=self._number)
        for listener in self._listeners:
            if len(listener.frames) >= BEHIND_MAX:
                listener.is_dropped = True
            else:
                listener.frames.append(frame)
            listener.woken.set()

    async def listen(self, snapshot: Callable[[], PoolSnapshot]) -> AsyncGenerator[bytes, None]:
        """Yield the frame of a snapshot taken now, then of every change; ends for one too far behind."""
        listener = _Listener()
        self._listeners.add(listener)
        try:
            yield sse.encode(msgspec.json.encode(snapshot()), event_id=self._number)
            while not listener.is_dropped or listener.frames:
                if not listener.frames:
                    listener.woken.clear()
                    await listener.woken.wait()
                frames = b"".join(listener.frames)
                listener.frames.clear()
                if frames:
                    yield frames
        finally:
            self._listeners.discard(listener)
