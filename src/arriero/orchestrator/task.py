"""What is one task, and how are its events read?

They are kept as the frames that were sent, so that any reader may come, go and come back with the
last id it saw: nothing is lost or doubled.
"""

import asyncio
from collections.abc import AsyncGenerator

import msgspec

from arriero.contracts.errors import ErrorCode, ErrorResponse, fail
from arriero.contracts.events import TaskChanged, TaskEvent, TaskFailed
from arriero.contracts.records import TaskRecord
from arriero.contracts.requests import TaskBody
from arriero.contracts.states import TaskState
from arriero.domain.task_states import TASKS
from arriero.orchestrator.feed import Feed
from arriero.runtime import sse
from arriero.runtime.asgi import Message
from arriero.runtime.tasks import Changed


class Task:
    """One accepted inference and its events."""

    def __init__(
        self, record: TaskRecord, body: TaskBody, *, request_id: str, run: int = 1, is_owned: bool, feed: Feed
    ) -> None:
        self.record = record
        self.body = body
        self.request_id = request_id
        self.run = run
        self.is_owned = is_owned
        self.frames: list[bytes] = []
        self.frames_bytes = 0
        self.changed = Changed()
        #: No frame follows any more.
        self.is_told = False
        #: Set when nobody wants its answer any more.
        self.cancelled = asyncio.Event()
        #: What came so far.
        self.texts: list[str] = []
        self._feed = feed

    @property
    def task_id(self) -> str:
        """Its id."""
        return self.record.task_id

    @property
    def is_over(self) -> bool:
        """Whether its state is final."""
        return self.record.state in TASKS.final

    def tell(self, event: TaskEvent) -> None:
        """Add an event for all readers."""
        if isinstance(event, TaskFailed):
            self._add(msgspec.json.encode(ErrorResponse(event.error)), "error")
        else:
            self._add(msgspec.json.encode(event))
        self.changed.notify()

    def tell_end(self, *, is_good: bool) -> None:
        """Let the readers go once they have read everything; a stream that ended well says so."""
        if is_good:
            self._add(sse.DONE)
        self.is_told = True
        self.changed.notify()

    def step(self, state: TaskState) -> None:
        """Go to a state, through the table; staying is no step."""
        if state is self.record.state:
            return
        TASKS.check(self.record.state, state)
        self.change(state=state)
        self._feed.tell(TaskChanged(task=msgspec.structs.replace(self.record, text="")))

    def change(self, **changes: object) -> None:
        """Change fields of its record."""
        self.record = msgspec.structs.replace(self.record, **changes)

    def shown(self) -> TaskRecord:
        """Return its record with the text so far."""
        return msgspec.structs.replace(self.record, text="".join(self.texts))

    async def gone(self) -> Message:
        """Wait until it is cancelled; an ASGI `receive` to those who know only that."""
        await self.cancelled.wait()
        return {"type": "http.disconnect"}

    def _add(self, content: bytes, event: str | None = None) -> None:
        frame = sse.encode(content, event_id=f"{self.run}-{len(self.frames) + 1}", event=event)
        self.frames.append(frame)
        self.frames_bytes += len(frame)


async def frames(task: Task, *, after: int, is_owner: bool) -> AsyncGenerator[bytes, None]:
    """Yield a task's events after number `after` to the end; an owner that leaves cancels the task."""
    at = after
    try:
        while True:
            if at < len(task.frames):
                new = task.frames[at:]
                at += len(new)
                yield new[0] if len(new) == 1 else b"".join(new)
            elif task.is_told:
                return
            else:
                await task.changed.wait()
    finally:
        if is_owner:
            task.cancelled.set()


def events_after(task: Task, last_event_id: str) -> int:
    """Return how many events a reader has seen, by its `Last-Event-ID`.

    Ids are RUN-NUMBER: what was seen of a run before a restart says nothing of this one.
    Raises INVALID_REQUEST if the id is none of ours.
    """
    if not last_event_id:
        return 0
    run, _, number = last_event_id.partition("-")
    if not (run.isascii() and run.isdigit() and number.isascii() and number.isdigit() and len(number) < 10):
        fail(
            ErrorCode.INVALID_REQUEST,
            f"Last-Event-ID {last_event_id[:40]!r} is none of this stream's",
            param="Last-Event-ID",
        )
    return min(int(number), len(task.frames)) if int(run) == task.run else 0
