"""A process that is stopped for a while, as a machine that swaps or is moved stops it: who is missed?"""

import asyncio
import contextlib
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator

import msgspec
import pytest

from arriero.client.api import task_events
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import NodeChanged, PoolEvent, TaskEnd, TaskToken
from arriero.contracts.requests import SpawnBody, TaskBody
from arriero.contracts.states import NodeState
from arriero.domain.worker_states import READY
from arriero.runtime.attention import STOOD_STILL_S, Attention
from arriero.testing.pool import Pool, eventually
from arriero.worker.flights import Flight

NODE_TIMEOUT_S = 2.0
STILL_S = 2 * NODE_TIMEOUT_S
_EVENTS = msgspec.json.Decoder(PoolEvent)


@contextlib.contextmanager
def states_told(url: str) -> Iterator[list[NodeState]]:
    """Collect the states of nodes as the live feed tells them."""
    states: list[NodeState] = []
    with urllib.request.urlopen(f"{url}/v1/events", timeout=30) as feed:

        def read() -> None:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                for line in feed:
                    if line.startswith(b"data:"):
                        event = _EVENTS.decode(line[5:])
                        if isinstance(event, NodeChanged):
                            states.append(event.node.status)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        yield states
    reader.join(60)


def stand_still(pid: int) -> None:
    """Stop a process, have it find all of its limits passed, and let it go on."""
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(STILL_S)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_an_orchestrator_that_stood_still_misses_nobody() -> None:
    with Pool({"node_timeout_s": NODE_TIMEOUT_S}) as pool:
        pool.start()
        made = pool.orchestrator.spawn(SpawnBody(model_ref="demo", engine="fake", options={"token_s": 0.05}))
        eventually("it is ready", lambda: pool.orchestrator.worker(made.worker_id).state in READY)
        record = pool.record("orchestrator")
        tokens: list[int] = []
        with states_told(record.url) as states:
            body = TaskBody(model="demo", prompt="on", max_tokens=40, ignore_eos=True)
            with pool.orchestrator.run_task(body) as stream:
                for event in task_events(stream):
                    if isinstance(event, TaskToken):
                        tokens.append(event.index)
                        if event.index == 3:
                            stand_still(record.pid)
            assert isinstance(event, TaskEnd)
            # Once more, with nothing else to wake for but its own limits.
            stand_still(record.pid)
            assert pool.orchestrator.node("here").status is NodeState.READY
            # An agent that was stopped is missed as ever; and it shows that the feed tells of it.
            assert states == []
            os.kill(pool.record("agent").pid, signal.SIGSTOP)
            eventually("it is missed", lambda: NodeState.UNREACHABLE in states)
            os.kill(pool.record("agent").pid, signal.SIGCONT)
        assert tokens == list(range(40))


# --- What it stands on ----------------------------------------------------------------------------


async def test_a_limit_passes_while_we_listen() -> None:
    attention = Attention()
    with pytest.raises(TimeoutError):
        async with attention.within(0.05):
            await asyncio.Event().wait()
    assert attention.away_s() == 0


async def test_time_in_which_we_stood_still_is_added() -> None:
    attention = Attention()
    loop, still_s, limit_s = asyncio.get_running_loop(), 2 * STOOD_STILL_S, STOOD_STILL_S
    begun_s = loop.time()
    with pytest.raises(TimeoutError):
        async with attention.within(limit_s):
            # The whole loop stands still, as a process that is stopped does.
            time.sleep(still_s)  # noqa: ASYNC251
            assert attention.away_s() > 0
            await asyncio.Event().wait()
    away_s, took_s = attention.away_s(), loop.time() - begun_s
    assert took_s >= still_s + limit_s - STOOD_STILL_S
    # The machine may have stood still by itself, too.
    assert still_s - STOOD_STILL_S <= away_s <= took_s


async def test_an_engine_was_not_silent_while_we_stood_still() -> None:
    attention, flight = Attention(), Flight("r-1")
    with attention.watching():
        async with flight:
            flight.watch_stall(STOOD_STILL_S, attention)
            time.sleep(2 * STOOD_STILL_S)  # noqa: ASYNC251
            # Its limit has passed; what the engine said meanwhile is read only now.
            await asyncio.sleep(0.01)
            assert flight.error is None
        with pytest.raises(ArrieroError) as stalled:
            async with flight:
                flight.watch_stall(0.05, attention)
                await asyncio.Event().wait()
    assert stalled.value.code is ErrorCode.STREAM_STALLED


async def test_what_ends_in_time_ends() -> None:
    async with Attention().within(60):
        await asyncio.sleep(0)
