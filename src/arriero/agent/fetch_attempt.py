"""How do several connections bring what is missing of one file, and when has the attempt failed?

The first connection finds out what the server can do; others join it if that is worth their while.
A connection that fails beside working ones has its run taken over; the attempt fails with the last
one that works, so several that fail at the same moment are one failure.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Final

import aiohttp

from arriero.agent.budget import Budget, Reservation
from arriero.agent.fetch_http import Answer, Origin, Refused
from arriero.agent.fetch_types import FetchLimits
from arriero.agent.fetch_writer import Writer
from arriero.agent.partial import Mark, Partial
from arriero.agent.retries import AttemptFailed
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.domain import backoff
from arriero.domain.parts import OPEN_END, Missing, Run, connections_for, range_bytes
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy

GGUF_MAGIC: Final = b"GGUF"
#: A connection that brings nothing so many times in a row is not made again.
_FRUITLESS_MAX: Final = 3


class StartOver(AttemptFailed):
    """The bytes that are there are not of the file that the server has now."""


class _AskWhole(Exception):
    """Ranges are of no use here: the file is to be asked for in one piece, at once."""


@dataclass(slots=True)
class _Flow:
    """What one request is to bring."""

    run: Run
    at: int
    #: Where the answer's body ends; the run's end unless the server gives less.
    body_end: int
    is_accepted: bool = False


class Attempt:
    """One go at the bytes that are missing.  Used once: `await Attempt(…).run()`."""

    def __init__(
        self,
        origin: Origin,
        partial: Partial,
        writer: Writer,
        *,
        budget: Budget,
        reservation: Reservation,
        limits: FetchLimits,
        clock: Clock,
        entropy: Entropy,
    ) -> None:
        self._origin = origin
        self._partial = partial
        self._writer = writer
        self._budget = budget
        self._reservation = reservation
        self._limits = limits
        self._clock = clock
        self._entropy = entropy
        #: As the bytes on disk are marked, or will be as soon as the writer comes to it.
        self._mark = partial.mark
        self._missing = Missing(partial.parts.missing(), partial.parts.part_bytes)
        self._done_bytes = partial.parts.done_bytes
        self._connections = 1
        self._is_first = True
        #: Connections whose answer was accepted and that bring bytes.
        self._working: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Bring all that is missing; what came is written when this returns or raises.

        Raises AttemptFailed where another attempt may help, and what is final at once.
        """
        await self._reservation.measure()
        try:
            async with asyncio.TaskGroup() as self._group:
                writing = self._group.create_task(self._writer.write_along(), name="fetch-write")
                hashing = self._group.create_task(self._writer.hash_along(), name="fetch-hash")
                self._start(0)
                while self._tasks:
                    await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
                self._writer.end()
                await asyncio.wait({writing})
                hashing.cancel()
        except BaseExceptionGroup as errors:
            failure = _most_telling(errors)
            await self._settle(failure)
            raise failure from errors
        except asyncio.CancelledError:
            with contextlib.suppress(ArrieroError):
                await self._writer.flush()
            raise

    async def _settle(self, failure: AttemptFailed | ArrieroError) -> None:
        """Leave on disk what the next attempt can go on with."""
        task = asyncio.current_task()
        assert task is not None
        if task.cancelling():
            raise asyncio.CancelledError  # It came in the moment of the failure, which hid it.
        if isinstance(failure, StartOver):
            self._writer.begin(Mark())
        if not (isinstance(failure, ArrieroError) and failure.code is ErrorCode.INSUFFICIENT_DISK):
            await self._writer.flush()

    # --- One connection -----------------------------------------------------------------------

    def _start(self, number: int) -> None:
        assert self._group is not None
        task = self._group.create_task(self._connection(number), name=f"fetch-{number}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, number: int) -> None:
        """Bring one run after the other until none is left, or this connection is not wanted."""
        fruitless = 0
        while (run := self._take()) is not None:
            flow = _Flow(run, run.start, run.end)
            try:
                await self._bring(number, flow)
                fruitless = 0
            except _AskWhole:
                continue
            except (AttemptFailed, ArrieroError) as failure:
                self._working.discard(number)
                is_final = isinstance(failure, StartOver | ArrieroError) and flow.is_accepted
                if is_final or isinstance(failure, StartOver) or not self._working:
                    raise
                fruitless = 0 if flow.at > run.start else fruitless + 1
                is_refused = isinstance(failure, Refused | ArrieroError)
                if is_refused or fruitless >= _FRUITLESS_MAX:
                    # The server does not want so many: we go on with those it bears.
                    self._origin.connections = max(1, min(self._origin.connections - 1, len(self._working)))
                    return
            finally:
                self._working.discard(number)
                self._missing.give_back(Run(flow.at, flow.run.end))
            if fruitless or flow.at < flow.body_end:
                await self._clock.sleep_s(self._pause_s(fruitless + 1))

    def _pause_s(self, attempt: int) -> float:
        limits = self._limits.retry
        return backoff.delay_s(attempt, self._entropy.chance(), limits.base_s, limits.cap_s)

    def _take(self) -> Run | None:
        """Take the next run to ask for."""
        part_bytes = self._partial.parts.part_bytes
        if not self._is_first:
            bytes_max = range_bytes(
                self._missing.bytes, self._connections, part_bytes, self._limits.range_bytes
            )
            return self._missing.take(bytes_max)
        size = self._mark.size_bytes if self._mark.size_bytes is not None else self._origin.remote.size_bytes
        if not self._origin.is_ranged or (self._done_bytes and not self._mark.is_proof):
            # Nothing could prove that the rest is of the same file.
            self._missing = Missing([], part_bytes)
            return Run(0, OPEN_END if size is None else size)
        if size is not None:
            self._missing.end_at(size)
            self._connections = connections_for(self._missing.bytes, self._origin.connections, part_bytes)
            return self._missing.take(
                range_bytes(self._missing.bytes, self._connections, part_bytes, self._limits.range_bytes)
            )
        # The answer to a first range tells the size, and whether the server knows ranges.
        return self._missing.take(OPEN_END if self._done_bytes else self._limits.range_bytes)

    async def _bring(self, number: int, flow: _Flow) -> None:
        run = flow.run
        size = self._mark.size_bytes if self._mark.size_bytes is not None else self._origin.remote.size_bytes
        is_tail = run.end == (OPEN_END if size is None else size)
        answer = await self._origin.ask(
            run,
            is_whole=run.start == 0 and is_tail,
            is_tail=is_tail,
            etag=self._mark.etag if self._done_bytes or not self._is_first else "",
        )
        try:
            # Nothing is waited for between head and body: a cut would cost what was read already.
            if self._is_first:
                self._accept_first(answer, flow)
            else:
                self._accept_other(answer, flow)
            flow.is_accepted = True
            self._working.add(number)
            await self._receive(answer.response, flow)
        finally:
            answer.close()

    async def _receive(self, response: aiohttp.ClientResponse, flow: _Flow) -> None:
        try:
            while flow.at < flow.body_end:
                block = await response.content.readany()
                if not block:
                    break
                if flow.at + len(block) > flow.body_end:
                    raise StartOver(f"the server sends more than the {flow.body_end} bytes it said")
                if flow.at == 0:
                    self._check_first_bytes(block)
                self._writer.put(flow.at, block)
                flow.at += len(block)
                await self._budget.spend(len(block))
                await self._writer.room()
        except (aiohttp.ClientError, OSError) as error:
            raise self._origin.failure(error) from error
        if flow.body_end == OPEN_END:
            self._writer.learn_size(flow.at)
            flow.run = Run(flow.run.start, flow.at)
        elif flow.at < flow.body_end:
            raise self._origin.failure(ConnectionResetError())

    def _check_first_bytes(self, block: bytes) -> None:
        """With no checksum to tell, the first bytes do: an error page is not fetched to its end."""
        is_gguf = self._origin.remote.name.lower().endswith(".gguf")
        if is_gguf and self._mark.sha256 is None and not GGUF_MAGIC.startswith(block[:4]):
            raise ArrieroError(
                ErrorCode.MODEL_CORRUPTED,
                f"the file begins with {block[:4]!r}, a GGUF file with {GGUF_MAGIC!r}",
            )

    # --- Answers ------------------------------------------------------------------------------

    def _mark_of(self, answer: Answer, total: int | None) -> Mark:
        remote = self._origin.remote
        return Mark(
            url=remote.url,
            etag=answer.etag,
            size_bytes=total,
            sha256=remote.sha256 or answer.sha256,
        )

    def _accept_first(self, answer: Answer, flow: _Flow) -> None:
        """Make everything ready for the bytes, by what the server turned out to have and to do."""
        if answer.status == 416:
            self._accept_end(answer, flow)
            return
        body, total = answer.body()
        mark = self._mark_of(answer, total)
        if answer.status == 200:
            self._begin(mark)
            self._missing = Missing([], self._partial.parts.part_bytes)
            flow.run, flow.at = body, 0
        elif not self._done_bytes:
            if not mark.is_proof and (total is None or body.end < total):
                self._origin.is_ranged = False
                raise _AskWhole
            self._begin(mark)
        else:
            if not self._mark.is_same_file(mark):
                raise StartOver("the file changed at its source: from the start")
            if self._mark.size_bytes is None and total is not None:
                self._mark = mark
                self._writer.learn_size(total)
        flow.body_end = body.end
        if total is not None:
            self._missing.end_at(total)
            flow.run = Run(flow.run.start, min(flow.run.end, total))
            left_bytes = self._missing.bytes + flow.run.end - flow.at
            self._reservation.note(left_bytes)
            self._reservation.check()
            self._connections = connections_for(
                left_bytes, self._origin.connections, self._partial.parts.part_bytes
            )
        self._is_first = False
        if self._missing.bytes and self._mark.is_proof:
            for number in range(1, self._connections):
                self._start(number)

    def _begin(self, mark: Mark) -> None:
        self._mark = mark
        self._done_bytes = 0
        self._writer.begin(mark)

    def _accept_end(self, answer: Answer, flow: _Flow) -> None:
        """The server has nothing after what we have: it is whole, or it is of another file."""
        _, total = answer.told_range()
        if flow.run.start == 0:
            self._origin.is_ranged = False
            raise AttemptFailed("the server knows no ranges of the file: all of it is asked for")
        if total != flow.run.start or self._mark.size_bytes not in (None, total):
            raise StartOver(f"the server has no byte {flow.run.start} of the file any more: from the start")
        self._missing = Missing([], self._partial.parts.part_bytes)
        self._writer.learn_size(total)
        flow.run, flow.body_end = Run(total, total), total
        self._is_first = False

    def _accept_other(self, answer: Answer, flow: _Flow) -> None:
        """Take an answer only if it is of the same file as the first one."""
        if answer.status == 416:
            raise StartOver(f"the server has no byte {flow.run.start} of the file any more: from the start")
        body, total = answer.body()
        mark = self._mark_of(answer, total)
        if total != self._mark.size_bytes or not self._mark.is_same_file(mark):
            raise StartOver("the file changed at its source: from the start")
        if answer.status == 200:
            raise Refused("the server knows no ranges of the file")
        flow.body_end = body.end


def _most_telling(errors: BaseExceptionGroup[BaseException]) -> AttemptFailed | ArrieroError:
    """Return the one error of several that says most; raises the group if one is a fault of ours."""
    leaves = _leaves(errors)
    for kind in (ArrieroError, StartOver, AttemptFailed):
        for leaf in leaves:
            if not isinstance(leaf, ArrieroError | AttemptFailed):
                raise errors
            if isinstance(leaf, kind):
                return leaf
    raise errors


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
