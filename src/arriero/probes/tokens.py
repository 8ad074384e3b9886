"""Does a worker stream tokens, every one of them and each once?"""

from collections.abc import Callable
from typing import Any, Final, NoReturn

from arriero.client.api import inference_frames
from arriero.client.stream import TOKEN_CODES, EventStream
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.events import DoneFrame, QueuedFrame, StartedFrame, TokenFrame
from arriero.contracts.requests import InferenceBody
from arriero.domain.worker_states import READY
from arriero.probes.result import SHOWN_MAX, ProbeResult, ask, in_terms_of
from arriero.probes.where import Where, find_worker

NAME: Final = "tokens"
TIMEOUT_S: Final = 30.0


def tokens(
    where: Where,
    *,
    prompt: str,
    expect_tokens: int | None = None,
    max_tokens: int | None = None,
    timeout_s: float = TIMEOUT_S,
    tell: Callable[[str], None] | None = None,
) -> ProbeResult:
    """Ask a worker for tokens and check that the stream is whole, for `timeout_s` at most.

    Whole: begun, indexes from 0 without a gap, the `done` frame's count the number of tokens that
    came, `[DONE]` last, at least one token unless none are expected.  `tell` hears of the first token.
    """

    def question(seen: dict[str, Any]) -> None:
        seen.update(events=0, tokens=[], token_ids=[], text="", total_tokens=None, finish_reason=None)
        body = InferenceBody(prompt=prompt, max_tokens=max_tokens, temperature=0.0)
        also = (ErrorCode.NO_WORKERS, ErrorCode.TOKEN_COUNT_MISMATCH)
        try:
            worker, record = find_worker(where, TOKEN_CODES, prefer=READY, timeout_s=timeout_s)
            seen["worker_id"] = record.worker_id if record else None
            with worker.infer_stream(
                body, connect_s=min(timeout_s, 10.0), silence_s=timeout_s, total_s=timeout_s
            ) as stream:
                count = _read(stream, seen, tell)
        except ArrieroError as error:
            raise in_terms_of(TOKEN_CODES, error, also=also) from error
        _check(count, expect_tokens)

    return ask(NAME, question)


def _read(stream: EventStream, seen: dict[str, Any], tell: Callable[[str], None] | None) -> int:
    count = 0
    done: DoneFrame | None = None
    for frame in inference_frames(stream):
        seen["events"] += 1
        if done is not None:
            _fail("a frame came after the `done` frame")
        if seen["events"] == 1 and not isinstance(frame, StartedFrame):
            _fail("the first frame is not `started`")
        match frame:
            case StartedFrame():
                seen["request_id"] = frame.request_id
            case QueuedFrame():
                seen.setdefault("queue_positions", []).append(frame.position)
            case TokenFrame():
                if frame.index != count:
                    _fail(
                        f"token {frame.index} came where {count} was due",
                        expected_index=count,
                        actual_index=frame.index,
                    )
                count += 1
                if count == 1 and tell is not None:
                    tell("[probe] the first token has come")
                if count <= SHOWN_MAX:
                    seen["tokens"].append(frame.token)
                    seen["token_ids"].append(frame.id)
                    seen["text"] += frame.token
            case DoneFrame():
                done = frame
    if done is None:
        _fail(f"the stream ended after {count} tokens without its `done` frame")
    seen.update(total_tokens=done.total_tokens, finish_reason=done.finish_reason, received=count)
    if done.total_tokens != count:
        _mismatch(done.total_tokens, count, f"the stream says {done.total_tokens} tokens and brought {count}")
    return count


def _check(count: int, expected: int | None) -> None:
    if expected is not None and count != expected:
        _mismatch(expected, count, f"{expected} tokens were expected, {count} came")
    if expected is None and count == 0:
        _fail("the stream ended well and brought no token")


def _mismatch(expected: int, actual: int, message: str) -> NoReturn:
    raise ArrieroError(ErrorCode.TOKEN_COUNT_MISMATCH, message, expected=expected, actual=actual)


def _fail(message: str, **details: Any) -> NoReturn:
    raise ArrieroError(ErrorCode.TOKEN_STREAM_ERROR, message, **details)
