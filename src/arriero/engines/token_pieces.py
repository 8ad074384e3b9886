"""Which tokens are missing between two that llama.cpp told?

llama.cpp tells nothing of a token that ends inside a character.  Its id is found again by its
bytes: the new text's bytes, less those of the token that completed it, cut into pieces of the
vocabulary that are no whole characters.  Where several cuts are possible the longest pieces win, as
in the tokenizer; the text is the same in every case.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from arriero.engines import gguf

#: The id of a token that the engine did not name and that cannot be found.
UNKNOWN_ID: Final = -1
#: A model that writes broken UTF-8 shows it by this; its bytes are then lost.
_REPLACEMENT: Final = "\ufffd"
#: Longer ones, and more of them, are not kept: a vocabulary has some thousands, of up to ten letters.
PIECES_MAX: Final = 65_536
PIECE_BYTES_MAX: Final = 256
#: Also bounds the depth of the search.
_STEPS_MAX: Final = 200


class TokenPieces:
    """The tokens of one vocabulary that are no valid UTF-8 by themselves."""

    def __init__(self, pieces: dict[int, bytes] | None = None) -> None:
        self._bytes = pieces or {}
        self._ids = {raw: token_id for token_id, raw in reversed(self._bytes.items())}
        self._longest = max(map(len, self._ids), default=0)

    def missing_ids(self, text: str, missing: int, last_id: int) -> tuple[int, ...]:
        """Return the `missing` ids that came before `last_id` and make `text` together with it."""
        unknown = (UNKNOWN_ID,) * missing
        last = self._bytes.get(last_id)
        raw = text.encode("utf-8", "surrogatepass")
        if last is None or _REPLACEMENT in text or not raw.endswith(last):
            return unknown
        steps = iter(range(_STEPS_MAX))
        return self._cut(raw[: -len(last)], missing, steps.__next__) or unknown

    def _cut(self, raw: bytes, count: int, step: Callable[[], int]) -> tuple[int, ...] | None:
        if count == 0 or not raw:
            return () if count == 0 and not raw else None
        for length in range(min(self._longest, len(raw)), 0, -1):
            token_id = self._ids.get(raw[:length])
            if token_id is None:
                continue
            try:
                step()
            except StopIteration:
                return None
            rest = self._cut(raw[length:], count - 1, step)
            if rest is not None:
                return (token_id, *rest)
        return None


def read(path: Path) -> tuple[gguf.GgufHeader, TokenPieces]:
    """Read and check a model's header, and those of its tokens; raises as `gguf.read_header` does."""
    letters = {letter: value for value, letter in enumerate(byte_letters())}
    byte_level: dict[int, bytes] = {}
    single_bytes: dict[int, bytes] = {}

    def take(number: int, raw: bytes) -> None:
        if len(raw) > PIECE_BYTES_MAX or len(byte_level) + len(single_bytes) >= PIECES_MAX:
            return
        if not raw.isascii():
            whole = _bytes_of(raw, letters)
            if whole is not None and not _is_text(whole):
                byte_level[number] = whole
        elif len(raw) == 6 and raw.startswith(b"<0x") and raw.endswith(b">"):
            single_bytes[number] = bytes.fromhex(raw[3:5].decode())

    header = gguf.read_header(path, take)
    if header.tokenizer == "gpt2":
        return header, TokenPieces(byte_level)
    if header.tokenizer == "llama":
        return header, TokenPieces({i: raw for i, raw in single_bytes.items() if not _is_text(raw)})
    return header, TokenPieces()


def byte_letters() -> list[str]:
    """Return the letters by which byte-level tokenizers write the 256 bytes."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, shifted = [], 256
    for value in range(256):
        if value in plain:
            letters.append(chr(value))
        else:
            letters.append(chr(shifted))
            shifted += 1
    return letters


def _bytes_of(raw: bytes, letters: dict[str, int]) -> bytes | None:
    try:
        return bytes(letters[letter] for letter in raw.decode())
    except (KeyError, UnicodeDecodeError):
        return None


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True
