"""Until when may a request take, and who says that it took too long?"""

import asyncio

import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.domain import deadlines
from arriero.orchestrator.exchange import Exchange
from arriero.runtime.asgi import Message

LIMIT_MS = 10.0


async def nobody_leaves() -> Message:
    never: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    return await never


def said_later() -> tuple[asyncio.Future[None], ArrieroError]:
    """Return an answer of the next hop that comes when the deadline has passed, and what it says."""
    loop = asyncio.get_running_loop()
    word: asyncio.Future[None] = loop.create_future()
    error = ArrieroError(ErrorCode.REQUEST_TIMEOUT, "too late", layer="worker")
    loop.call_later(3 * LIMIT_MS / 1000, word.set_exception, error)
    return word, error


async def test_the_word_of_the_next_hop_is_waited_for_beyond_the_deadline() -> None:
    exchange = Exchange(nobody_leaves, LIMIT_MS)

    async def work() -> None:
        assert exchange.next_hop_ms() == 1.0
        await word

    word, late = said_later()
    with pytest.raises(ArrieroError) as told:
        await exchange.run(work)
    assert told.value is late


async def test_what_no_hop_was_given_ends_with_the_deadline() -> None:
    exchange = Exchange(nobody_leaves, LIMIT_MS)

    async def work() -> None:
        await word

    word, late = said_later()
    with pytest.raises(ArrieroError) as told:
        await exchange.run(work)
    assert told.value is not late and told.value.details["limit_ms"] == LIMIT_MS
    assert word.cancelled()


async def test_a_hop_that_says_nothing_is_given_up_for() -> None:
    began_s = asyncio.get_running_loop().time()
    exchange = Exchange(nobody_leaves, LIMIT_MS)

    async def work() -> None:
        exchange.next_hop_ms()
        await nobody_leaves()

    with pytest.raises(ArrieroError) as told:
        await exchange.run(work)
    assert told.value.details["limit_ms"] == LIMIT_MS
    assert asyncio.get_running_loop().time() - began_s >= deadlines.WORD_MS / 1000


@pytest.mark.parametrize("is_gone", [True, False])
async def test_what_is_being_ended_waits_for_no_word(is_gone: bool) -> None:
    leaves = asyncio.Event()
    aborted = ArrieroError(ErrorCode.REQUEST_CANCELLED)

    async def client() -> Message:
        await leaves.wait()
        return {"type": "http.disconnect"}

    exchange = Exchange(client, 60_000.0)

    async def work() -> None:
        if is_gone:
            leaves.set()
            # Its watch has its turn before us.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert exchange.is_gone
        else:
            exchange.abort(aborted)
        exchange.next_hop_ms()
        await nobody_leaves()

    async with asyncio.timeout(60):
        if is_gone:
            await exchange.run(work)
        else:
            with pytest.raises(ArrieroError) as told:
                await exchange.run(work)
            assert told.value is aborted
