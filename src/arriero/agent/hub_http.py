"""How is the Hub asked without trusting the length of its answer?

huggingface_hub reads whole answers into memory, however long they are and however slowly they come.
Its one HTTP client is given hooks, so that each answer has a bound, and ends when nobody waits for it.
"""

import contextvars
import threading
from collections.abc import Iterator
from typing import Final

import httpx2  # What huggingface_hub speaks HTTP with.
import huggingface_hub

#: A repository of 100,000 files is described by some 30 MB.
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
#: Set when nobody waits for the call any more.  Goes along into the thread of the call.
GIVEN_UP: Final[contextvars.ContextVar[threading.Event | None]] = contextvars.ContextVar(
    "arriero_hub_given_up", default=None
)


class AnswerRefused(ValueError):
    """An answer is longer than any real one, or compressed though asked not to be."""


class _BoundedStream(httpx2.SyncByteStream):
    def __init__(self, inner: httpx2.SyncByteStream) -> None:
        self._inner = inner

    def __iter__(self) -> Iterator[bytes]:
        total = 0
        given_up = GIVEN_UP.get()
        for chunk in self._inner:
            total += len(chunk)
            if total > ANSWER_BYTES_MAX:
                raise AnswerRefused(f"more than {ANSWER_BYTES_MAX} bytes")
            if given_up is not None and given_up.is_set():
                raise httpx2.ReadTimeout("nobody waits for this answer any more")
            yield chunk

    def close(self) -> None:
        self._inner.close()


def bound_client() -> None:
    """Give huggingface_hub's client our bounds, if it has not got them.  Safe to call at any time."""
    client = huggingface_hub.get_session()
    hooks = client.event_hooks
    if _bound not in hooks["response"]:
        client.event_hooks = {
            "request": [*hooks["request"], _ask_plain],
            "response": [*hooks["response"], _bound],
        }


def close_connections() -> None:
    """Close what huggingface_hub keeps open between calls."""
    huggingface_hub.close_session()


def _ask_plain(request: httpx2.Request) -> None:
    request.headers["Accept-Encoding"] = "identity"


def _bound(response: httpx2.Response) -> None:
    if response.headers.get("Content-Encoding", "identity") not in ("", "identity"):
        raise AnswerRefused("compressed")
    assert isinstance(response.stream, httpx2.SyncByteStream), "the client is a synchronous one"
    response.stream = _BoundedStream(response.stream)
