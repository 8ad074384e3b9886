"""What does the fake engine answer, and into which tokens does it cut text?

Both are pure and without memory: the next words follow from the text so far alone, so that another
fake engine continues a broken answer exactly as this one would have.

A token is up to three bytes of one word (a word takes the space before it), its id is
`length << 24 | bytes`: reversible without a vocabulary, and characters do get split, as real
tokenizers split them.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

TOKEN_BYTES: Final = 3
EMBEDDING_LENGTH: Final = 32
BEGIN_ID: Final = 1
END_ID: Final = 2
_SPECIALS: Final = {BEGIN_ID: "", END_ID: ""}
_PIECE: Final = re.compile(rb"\s?\S+|\s")
_COUNT: Final = re.compile(rb"Count from (\d{1,6}) to (\d{1,6})(?:, please)?\.")
_ROLE: Final = "<|{}|>"
_ASSISTANT: Final = _ROLE.format("assistant")


def tokenize(text: str) -> list[int]:
    """Return the ids of `text`."""
    return tokenize_bytes(text.encode("utf-8", "surrogatepass"))


def tokenize_bytes(raw: bytes) -> list[int]:
    """Return the ids of a text's bytes."""
    ids: list[int] = []
    for piece in _PIECE.findall(raw):
        for start in range(0, len(piece), TOKEN_BYTES):
            part = piece[start : start + TOKEN_BYTES]
            ids.append(len(part) << 24 | int.from_bytes(part, "big"))
    return ids


def token_bytes(token_id: int) -> bytes:
    """Return the bytes of one token; special ones have none.  Raises ValueError for no token's id."""
    if token_id in _SPECIALS:
        return b""
    length = token_id >> 24
    if not 1 <= length <= TOKEN_BYTES or token_id & 0xFFFFFF >= 1 << 8 * length:
        raise ValueError(f"no token has the id {token_id}")
    return (token_id & 0xFFFFFF).to_bytes(length, "big")


def detokenize(token_ids: Sequence[int]) -> str:
    """Return the text of `token_ids`.  Raises ValueError for no token's id."""
    return b"".join(token_bytes(token_id) for token_id in token_ids).decode("utf-8", "replace")


def template(messages: Sequence[dict[str, Any]]) -> str:
    """Return the prompt that the fake chat template makes."""
    lines = [f"{_ROLE.format(message.get('role', 'user'))}{_content(message)}\n" for message in messages]
    return "".join(lines) + _ASSISTANT


def answer_ids(prompt_ids: Sequence[int]) -> Iterator[int]:
    """Return the ids of what follows a prompt; endless unless it asks to count.

    "Count from 3 to 6." is answered "3 4 5 6"; other words are said again, from the first.
    """
    for piece in _answer(b"".join(token_bytes(token_id) for token_id in prompt_ids)):
        yield from tokenize_bytes(piece)


def vector(token_ids: Sequence[int]) -> list[float]:
    """Return a vector of length 1 that depends on the tokens alone."""
    digest = hashlib.sha256(repr(list(token_ids)).encode()).digest()
    numbers = [byte - 127.5 for byte in digest[:EMBEDDING_LENGTH]]
    length = math.sqrt(sum(number * number for number in numbers))
    return [number / length for number in numbers]


def _answer(prompt: bytes) -> Iterator[bytes]:
    asked, mark, begun = prompt.rpartition(_ASSISTANT.encode())
    if not mark:
        asked, begun = prompt, b""
    counts = list(_COUNT.finditer(asked))
    if counts:
        last = counts[-1]
        if not mark:
            begun = asked[last.end() :].lstrip()
        first, to = int(last[1]), int(last[2])
        step = 1 if to >= first else -1
        whole = b" ".join(b"%d" % number for number in range(first, to + step, step))
        if whole.startswith(begun):
            return iter([whole[len(begun) :]])
    if mark:
        return _cycle(asked.rpartition(_ROLE.format("user").encode())[2].split(), begun)
    return _cycle(None, asked)


def _cycle(asked: list[bytes] | None, said: bytes) -> Iterator[bytes]:
    """Say the words asked (None: those said) in turn, going on where `said` ends, also inside a word."""
    spoken = said.split()
    is_open = bool(spoken) and not said[-1:].isspace()
    words, after = _turns(spoken[:-1] if asked is None else asked)
    if is_open and spoken[-1] not in after:
        # The last word may be cut: it then begins the word whose turn it was.
        due = after.get(spoken[-2], words[0]) if len(spoken) > 1 else words[0]
        if due.startswith(spoken[-1]):
            yield due[len(spoken[-1]) :]
            spoken[-1] = due
    if asked is None:
        words, after = _turns(spoken)
    word = after.get(spoken[-1], words[0]) if spoken else words[0]
    separator = b" " if is_open else b""
    while True:
        yield separator + word
        separator, word = b" ", after[word]


def _turns(words: list[bytes]) -> tuple[list[bytes], dict[bytes, bytes]]:
    """Return each word once, and which word comes after each."""
    once = list(dict.fromkeys(words)) or [b"nothing"]
    return once, dict(zip(once, once[1:] + once[:1], strict=True))


def _content(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
