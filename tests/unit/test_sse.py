"""Server-sent events: what is written is what is read, however the bytes are cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.runtime.sse import EVENT_CHARS_MAX, LINE_BYTES_MAX, SseEvent, SseParser, comment, encode

TEXT = st.text(st.characters(exclude_characters="\x00\r\n", exclude_categories=["Cs"]), max_size=30)


@given(
    events=st.lists(
        st.tuples(TEXT, st.integers(0, 99), st.sampled_from([None, "error", "state"])), max_size=6
    ),
    cuts=st.lists(st.integers(1, 7), min_size=1, max_size=40),
)
def test_events_survive_any_cut(events: list[tuple[str, int, str | None]], cuts: list[int]) -> None:
    stream = b"".join(encode(data.encode(), number, name) for data, number, name in events)
    parser, found, at, turn = SseParser(), [], 0, 0
    while at < len(stream):
        step = cuts[turn % len(cuts)]
        found += parser.feed(stream[at : at + step])
        at, turn = at + step, turn + 1
    assert found == [SseEvent(data, name or "message", str(number)) for data, number, name in events]


def test_line_breaks_of_all_three_kinds_and_split_pairs() -> None:
    parser = SseParser()
    found = parser.feed(b"data: a\r") + parser.feed(b"\ndata: b\rdata: c\n\r") + parser.feed(b"\n")
    assert found == [SseEvent("a\nb\nc")]


def test_comments_are_told_and_carry_no_data() -> None:
    parser = SseParser()
    assert parser.feed(comment("queued\nposition=3") + encode(b"[DONE]")) == [
        SseEvent(comment="queued position=3"),
        SseEvent("[DONE]"),
    ]


def test_data_with_line_breaks_comes_back_whole() -> None:
    assert SseParser().feed(encode(b"one\ntwo", 7)) == [SseEvent("one\ntwo", event_id="7")]


def test_an_unfinished_event_is_no_event() -> None:
    assert SseParser().feed(b"data: half\n") == []


def test_an_endless_event_is_refused() -> None:
    parser = SseParser()
    line = b"data: %s\n" % (b"x" * 1_000_000)
    with pytest.raises(ValueError):
        for _ in range(EVENT_CHARS_MAX // 1_000_000 + 1):
            parser.feed(line)


def test_an_endless_line_is_refused() -> None:
    parser = SseParser()
    with pytest.raises(ValueError, match="longer than"):
        parser.feed(b"data: " + b"x" * LINE_BYTES_MAX)
