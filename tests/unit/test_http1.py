"""One HTTP answer, however its bytes are cut, and every way it can be wrong."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.client.http1 import HEAD_BYTES_MAX, Answer, CutOff, NoAnswer, NotHttp, request_bytes


def receiving(content: bytes, steps: list[int]) -> Callable[[int], bytes]:
    rest, turn = content, 0

    def receive(size: int) -> bytes:
        nonlocal rest, turn
        step = min(steps[turn % len(steps)], size)
        piece, rest, turn = rest[:step], rest[step:], turn + 1
        return piece

    return receive


def whole(content: bytes, steps: list[int] | None = None) -> tuple[Answer, bytes]:
    answer = Answer(receiving(content, steps or [65536]))
    answer.read_head()
    pieces = []
    while piece := answer.read_some():
        pieces.append(piece)
    assert answer.read_some() == b""
    return answer, b"".join(pieces)


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    steps=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    framing=st.sampled_from(["chunked", "length", "close"]),
)
def test_a_body_comes_whole_however_it_is_framed_and_cut(
    chunks: list[bytes], steps: list[int], framing: str
) -> None:
    body = b"".join(chunks)
    head = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nX-A: 1\r\n"
    if framing == "chunked":
        sent = b"".join(b"%x;e=1\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\nT: 1\r\n\r\n"
        head += b"Transfer-Encoding: chunked\r\n"
    else:
        sent = body
        head += b"Content-Length: %d\r\n" % len(body) if framing == "length" else b""
    answer, read = whole(head + b"\r\n" + sent, steps)
    assert (answer.status, answer.headers["x-a"], read) == (200, "1", body)


def test_no_content_has_no_body_whatever_follows() -> None:
    assert whole(b"HTTP/1.1 204 No Content\r\n\r\nrest")[1] == b""


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", NoAnswer),
        (b"HTTP/1.1 200 OK\r\nX: ", CutOff),
        (b"SSH-2.0-x\r\n\r\n", NotHttp),
        (b"HTTP/2 200\r\n\r\n", NotHttp),
        (b"HTTP/1.1 20 OK\r\n\r\n", NotHttp),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", NotHttp),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", NotHttp),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", CutOff),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nabcde", NotHttp),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1_0\r\nabcde", NotHttp),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", CutOff),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n", CutOff),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1" * 5000, NotHttp),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * (HEAD_BYTES_MAX + 65536), NotHttp),
    ],
)
def test_what_is_wrong_is_told_apart(content: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        whole(content)


def test_a_request_says_how_long_its_body_is() -> None:
    assert request_bytes("GET", "/a?b=c", {"Host": "h"}, b"") == b"GET /a?b=c HTTP/1.1\r\nHost: h\r\n\r\n"
    assert request_bytes("POST", "/", {}, b"").endswith(b"Content-Length: 0\r\n\r\n")
    assert request_bytes("POST", "/", {}, b"{}").endswith(b"Content-Length: 2\r\n\r\n{}")


@pytest.mark.parametrize("target", ["", "/a b", "/a\r\nX: 1", "/é"])
def test_a_path_that_could_break_its_line_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match="path"):
        request_bytes("GET", target, {}, b"")


@pytest.mark.parametrize(("name", "value"), [("X", "a\r\nY: b"), ("X\r\nY", "a"), ("", "a"), ("X y", "a")])
def test_a_header_that_could_break_its_line_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match="header"):
        request_bytes("GET", "/", {name: value}, b"")
