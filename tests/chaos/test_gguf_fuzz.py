"""Does the check of headers hold against broken ones, and the engine's owner against those that pass?

A fixed seed, so that a failure is made again by `python -m tests.fuzz.gguf --seed 7 --first NUMBER
--count 1`.  ARRIERO_FUZZ_HEADERS tries more of them.  A second of CPU for one header is no measure of
speed: they take a thousandth of it.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fuzz import engine, gguf

SEED = 7
SHARD = 1_000
HEADERS = int(os.environ.get("ARRIERO_FUZZ_HEADERS", "20000"))
ENGINE_SHARD = 20
ENGINES = 200


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="arriero-fuzz-", dir=gguf.scratch_folder()) as folder:
        yield Path(folder)


@pytest.mark.parametrize("first", range(0, HEADERS, SHARD))
def test_every_header_is_believed_or_refused_in_words(scratch: Path, first: int) -> None:
    outcome = gguf.run(seed=SEED, first=first, count=SHARD, folder=scratch)
    assert outcome.failures == []
    # Both happen, so both were tried.
    assert len(outcome.passed) > SHARD // 10
    assert outcome.refused.total() > SHARD // 10


@pytest.mark.parametrize("first", range(0, ENGINES * 4, ENGINE_SHARD * 4))
async def test_what_passes_ends_no_one_but_the_engine(scratch: Path, first: int) -> None:
    tally = await engine.run(seed=SEED, first=first, count=ENGINE_SHARD, folder=scratch)
    assert tally.failures == []
    assert tally.how["works"] > 0
    # The one abort that the check leaves to the engine, see engines/gguf_aborts.py.
    assert [death for death in tally.deaths if "id_to_token.size() == token_to_id" not in death.why] == []
