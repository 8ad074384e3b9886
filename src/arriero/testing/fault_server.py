"""What does a file server do wrong?  A real one on loopback that does it on purpose.

Each request takes the next `Answer` of the script; when the script is over, the last one is
repeated.  Runs in a test, or by itself (it prints its address and serves until stdin ends):

    python -m arriero.testing.fault_server --file m.gguf --answers '[{"cut_after": 1000}, {}]'
"""

import argparse
import asyncio
import gzip
import re
import sys
from dataclasses import dataclass, field
from email.message import Message
from email.parser import Parser
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

_RANGE: Final = re.compile(r"bytes=(\d+)-(\d*)")
_REASONS: Final = {200: "OK", 206: "Partial Content", 302: "Found", 416: "Range Not Satisfiable"}


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one request is answered; without anything set: correctly, with ranges."""

    status: int | None = None
    #: So many bytes of the body are sent, then the connection is reset.
    cut_after: int | None = None
    #: So many bytes of the body are sent, then nothing more comes.
    stall_after: int | None = None
    #: So many bytes of the body are sent, the rest when `server.go_on` is set.
    hold_after: int | None = None
    #: Nothing is sent at all, not even a head.
    is_mute: bool = False
    #: The head comes a byte at a time, and never to its end.
    is_trickling: bool = False
    ignores_range: bool = False
    #: A part is sent although the file is another one by now.
    ignores_if_range: bool = False
    #: What the head says of the length, whatever is sent.
    claimed_length: int | None = None
    has_length: bool = True
    http_version: str = "1.1"
    is_gzipped: bool = False
    #: Sent in place of the file.
    content: bytes | None = None
    etag: str = '"one"'
    #: Sent in place of the right Content-Range.
    content_range: str | None = None
    headers: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class SeenRequest:
    """A request that came."""

    method: str
    target: str
    headers: Message = field(repr=False)

    @property
    def range(self) -> str | None:
        """The Range header."""
        return self.headers.get("Range")


class FaultServer:
    """Serves `content` under every path.  Used as `async with FaultServer(content, [...]) as server`."""

    def __init__(
        self, content: bytes, answers: list[Answer] | None = None, *, answering_max: int | None = None
    ) -> None:
        self.content = content
        self.answers = list(answers or [Answer()])
        self.requests: list[SeenRequest] = []
        #: Set by a test to let held answers go on.
        self.go_on = asyncio.Event()
        #: More requests than this at a time are answered 503, beside the script.
        self.answering_max = answering_max
        self.refused = 0
        self._answering = 0
        self._request_came = asyncio.Event()
        #: Set whenever a stalled or mute answer has sent all that it will send.
        self.is_stalling = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._handlers: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The address, without a path."""
        assert self._server is not None, "used outside of its `async with`"
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for handler in self._handlers:
            handler.cancel()
        if self._handlers:
            await asyncio.wait(self._handlers)
        await self._server.wait_closed()

    async def asked(self, count: int) -> None:
        """Return once so many requests have come."""
        while len(self.requests) < count:
            self._request_came.clear()
            await self._request_came.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            line, _, rest = head.partition("\r\n")
            method, target, _ = line.split(" ", 2)
            request = SeenRequest(method, target, Parser().parsestr(rest))
            self.requests.append(request)
            self._request_came.set()
            if self.answering_max is not None and self._answering >= self.answering_max:
                self.refused += 1
                await self._answer(Answer(status=503), request, reader, writer)
                return
            index = min(len(self.requests) - self.refused, len(self.answers)) - 1
            self._answering += 1
            try:
                await self._answer(self.answers[index], request, reader, writer)
            finally:
                self._answering -= 1
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            pass  # The server ends; so does every connection, quietly.
        finally:
            self._handlers.discard(task)
            writer.transport.abort() if writer.is_closing() else writer.close()

    async def _answer(
        self, answer: Answer, request: SeenRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if answer.is_mute:
            await self._stall(reader)
            return
        if answer.is_trickling:
            await self._trickle(writer)
            return
        status, headers, body = self._compose(answer, request)
        lines = [f"HTTP/{answer.http_version} {status} {_REASONS.get(status, 'Whatever')}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        limit = answer.cut_after if answer.cut_after is not None else answer.stall_after
        body = body[:limit]
        if answer.hold_after is not None:
            writer.write(body[: answer.hold_after])
            await self.go_on.wait()
            body = body[answer.hold_after :]
        writer.write(body)
        await writer.drain()
        if answer.stall_after is not None:
            await self._stall(reader)

    async def _trickle(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)

    async def _stall(self, reader: asyncio.StreamReader) -> None:
        self.is_stalling.set()
        await reader.read()

    def _compose(self, answer: Answer, request: SeenRequest) -> tuple[int, dict[str, str], bytes]:
        content = self.content if answer.content is None else answer.content
        headers = {"Connection": "close", "Accept-Ranges": "bytes"}
        if answer.etag:
            headers["ETag"] = answer.etag
        status, body = 200, content
        asked = self._asked_range(answer, request)
        if asked is not None and asked[0] >= len(content):
            status, body = 416, b""
            headers["Content-Range"] = f"bytes */{len(content)}"
        elif asked is not None:
            start, end = asked[0], min(asked[1], len(content))
            status, body = 206, content[start:end]
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        if answer.status is not None:
            status, body = answer.status, b"" if answer.status >= 300 else body
        if answer.content_range is not None:
            headers["Content-Range"] = answer.content_range
        if answer.is_gzipped:
            body = gzip.compress(body)
            headers["Content-Encoding"] = "gzip"
        if answer.has_length:
            headers["Content-Length"] = str(
                len(body) if answer.claimed_length is None else answer.claimed_length
            )
        return status, {**headers, **answer.headers}, body

    def _asked_range(self, answer: Answer, request: SeenRequest) -> tuple[int, int] | None:
        match = _RANGE.fullmatch(request.range or "")
        if match is None or answer.ignores_range:
            return None
        if not answer.ignores_if_range and request.headers.get("If-Range") not in (None, answer.etag):
            return None
        return int(match[1]), int(match[2]) + 1 if match[2] else sys.maxsize


async def _main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description="A file server with faults.")
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--answers", default="[{}]", help="JSON list of Answer")
    options = parser.parse_args(arguments)
    answers = msgspec.json.decode(options.answers, type=list[Answer])
    content = await asyncio.to_thread(options.file.read_bytes)
    async with FaultServer(content, answers) as server:
        print(server.url, flush=True)  # noqa: T201  The ready line.
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1:]))
