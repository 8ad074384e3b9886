"""Is every byte asked for once, by one connection, and none forgotten, whatever order they come in?"""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.domain.attempts import Progress
from arriero.domain.parts import OPEN_END, Missing, Parts, Run, connections_for, range_bytes

PART_BYTES = st.integers(1, 40)
SIZES = st.integers(0, 400)


def _filled(part_bytes: int, size: int, seed: int) -> Parts:
    """Return parts as a cut leaves them: each filled from its beginning, some to the end."""
    chance, parts = random.Random(seed), Parts(part_bytes, size)
    for offset in range(0, size, part_bytes):
        length = min(part_bytes, size - offset)
        count = chance.choice([0, length, chance.randint(0, length)])
        if count:
            parts.add(offset, count)
    return parts


@given(PART_BYTES, SIZES, st.integers())
def test_what_is_there_and_what_is_missing_are_the_whole(part_bytes: int, size: int, seed: int) -> None:
    parts = _filled(part_bytes, size, seed)
    there = {part * part_bytes + byte for part, count in parts for byte in range(count)}
    missing = [byte for run in parts.missing() for byte in range(*run)]
    assert sorted([*there, *missing]) == list(range(size))
    assert parts.done_bytes == len(there) and parts.is_whole == (not missing)
    assert parts.prefix_bytes == next(byte for byte in itertools.count() if byte not in there)
    for before, after in itertools.pairwise(parts.missing()):
        assert before.end < after.start and before.end % part_bytes == 0


@given(PART_BYTES, SIZES, st.integers(), st.integers(1, 100), st.integers(1, 6))
def test_every_byte_is_brought_once_whatever_is_cut(
    part_bytes: int, size: int, seed: int, range_max: int, connections: int
) -> None:
    """Connections take runs, bring some of each, and give the rest back; no part is filled by two."""
    chance, parts = random.Random(seed), _filled(part_bytes, size, seed)
    missing = Missing(parts.missing(), part_bytes)
    under_way: list[Run] = []
    for _ in range(10_000):
        while len(under_way) < connections:
            run = missing.take(range_bytes(missing.bytes, connections, part_bytes, range_max))
            if run is None:
                break
            assert run.end == size or run.end % part_bytes == 0
            under_way.append(run)
        if not under_way:
            break
        touched = [run.start // part_bytes for run in under_way]
        assert len(set(touched)) == len(touched), "two fill one part"
        run = under_way.pop(chance.randrange(len(under_way)))
        at = chance.choice([run.end, chance.randint(run.start, run.end)])
        for start, count in _pieces(run.start, at, part_bytes):
            parts.add(start, count)
        missing.give_back(Run(at, run.end))
    assert parts.is_whole and parts.prefix_bytes == size


def _pieces(start: int, end: int, part_bytes: int) -> list[tuple[int, int]]:
    found = []
    while start < end:
        count = min(end, (start // part_bytes + 1) * part_bytes) - start
        found.append((start, count))
        start += count
    return found


def test_a_part_goes_on_where_it_stopped_and_nowhere_else() -> None:
    parts = Parts(10, 25)
    parts.add(10, 4)
    assert parts.missing() == [Run(0, 10), Run(14, 25)]
    for offset, count in ((10, 1), (15, 1), (14, 7), (20, 6)):
        with pytest.raises(AssertionError):
            parts.add(offset, count)
    parts.add(20, 5)
    assert parts.is_full(2) and not parts.is_full(1)


def test_without_a_length_nothing_is_whole() -> None:
    parts = Parts(10)
    assert parts.missing() == [Run(0, OPEN_END)]
    parts.add(0, 10)
    parts.add(10, 3)
    assert parts.missing() == [Run(13, OPEN_END)] and not parts.is_whole


def test_the_end_is_learned() -> None:
    missing = Missing([Run(0, OPEN_END)], 10)
    assert missing.take(25) == Run(0, 20)
    missing.end_at(33)
    assert missing.bytes == 13
    assert [missing.take(20), missing.take(20), missing.take(20)] == [Run(20, 33), None, None]


@given(SIZES, st.integers(1, 16), PART_BYTES)
def test_a_small_file_takes_one_connection(missing_bytes: int, connections: int, part_bytes: int) -> None:
    count = connections_for(missing_bytes, connections, part_bytes)
    assert 1 <= count <= connections
    assert count == 1 or missing_bytes >= 2 * count * part_bytes


@given(st.integers(0, 10**13), st.integers(2, 16))
def test_requests_are_few(missing_bytes: int, connections: int) -> None:
    """A terabyte takes tens of thousands of requests, a gibibyte tens, and the last ones are small."""
    part, most, requests = 4 << 20, 32 << 20, 0
    left = missing_bytes % (4 << 30)
    limit = left // most + 2 * connections * 12 + 1
    while left > 0:
        left -= min(left, range_bytes(left, connections, part, most))
        requests += 1
    assert requests <= limit
    assert range_bytes(missing_bytes, 1, part, most) == missing_bytes


def test_progress_is_a_step_beyond_what_was_there() -> None:
    progress = Progress(100, 10, anew_max=2)
    assert [progress.look(done) for done in (100, 109, 110, 115, 120)] == [False, False, True, False, True]
    assert [progress.look(done) for done in (0, 9, 10)] == [False, False, True]


@given(st.lists(st.integers(0, 100), max_size=200), st.integers(0, 5))
def test_a_source_that_changes_all_the_time_is_given_up(dones: list[int], anew_max: int) -> None:
    progress = Progress(0, 10, anew_max=anew_max)
    assert sum(progress.look(done) for done in dones) <= (anew_max + 1) * 10
