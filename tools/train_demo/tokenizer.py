"""How does text become token ids? A byte-level BPE that llama.cpp reads as `gpt2` / `gpt-2`."""

import functools
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

END_OF_TEXT: Final = "<|endoftext|>"
IM_START: Final = "<|im_start|>"
IM_END: Final = "<|im_end|>"
#: Their ids are their places in this tuple: 0, 1 and 2.
SPECIALS: Final = (END_OF_TEXT, IM_START, IM_END)
PAD_ID: Final = 0
IM_END_ID: Final = 2

_SPECIAL_PATTERN: Final = re.compile("(" + "|".join(re.escape(special) for special in SPECIALS) + ")")
#: GPT-2's pattern, for ASCII text only: there it equals the scanner below and is much faster.
_ASCII_PATTERN: Final = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
)
_ASCII_ODD_SPACES: Final = re.compile("[\x1c-\x1f]")
_CONTRACTIONS: Final = ("'re", "'ve", "'ll", "'s", "'t", "'m", "'d")
#: The characters that Unicode calls White_Space.
_SPACES: Final = frozenset(
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009"
    "\u200a\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and its merges, in the order in which they apply."""

    tokens: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    @functools.cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {merge: rank for rank, merge in enumerate(self.merges)}

    @functools.cached_property
    def _cache(self) -> dict[str, tuple[int, ...]]:
        return {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; the special tokens are recognised in it."""
        ids: list[int] = []
        for part in _SPECIAL_PATTERN.split(text):
            if part in SPECIALS:
                ids.append(SPECIALS.index(part))
                continue
            for piece in pre_tokenize(part):
                ids.extend(self._encode_piece(piece))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; special tokens are left out, broken UTF-8 is replaced."""
        letters = "".join(self.tokens[index] for index in ids if index >= len(SPECIALS))
        return bytes(_BYTE_OF_LETTER[letter] for letter in letters).decode("utf-8", "replace")

    def _encode_piece(self, piece: str) -> tuple[int, ...]:
        known = self._cache.get(piece)
        if known is None:
            parts = [_LETTER_OF_BYTE[byte] for byte in piece.encode("utf-8")]
            while len(parts) > 1:
                pairs = list(itertools.pairwise(parts))
                best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
                if best not in self._ranks:
                    break
                parts = _merge(parts, best)
            known = tuple(self._ids[part] for part in parts)
            self._cache[piece] = known
        return known


def train_tokenizer(texts: Iterable[str], *, vocabulary_size: int) -> Tokenizer:
    """Learn a tokenizer of `vocabulary_size` tokens from `texts`.

    Digits are never merged with each other, so that numbers are read digit by digit; a space and
    the digit after it are one token.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        for part in _SPECIAL_PATTERN.split(text):
            if part not in SPECIALS:
                counts.update(pre_tokenize(part))
    space = _LETTER_OF_BYTE[0x20]
    merges = [(space, digit) for digit in "0123456789"]
    words = {
        word: [_LETTER_OF_BYTE[byte] for byte in word.encode("utf-8")]
        for word in sorted(counts)
        if not any(letter.isdigit() for letter in word)
    }
    while len(SPECIALS) + 256 + len(merges) < vocabulary_size:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            raise ValueError(f"the texts give only {len(merges)} merges")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {word: _merge(parts, best) for word, parts in words.items()}
    letters = tuple(_LETTER_OF_BYTE[byte] for byte in range(256))
    return Tokenizer(SPECIALS + letters + tuple(a + b for a, b in merges), tuple(merges))


def pre_tokenize(text: str) -> list[str]:
    """Cut `text` where GPT-2 does; joined, the pieces are `text` again."""
    if text.isascii() and not _ASCII_ODD_SPACES.search(text):
        return _ASCII_PATTERN.findall(text)
    pieces: list[str] = []
    start = 0
    while start < len(text):
        end = _piece_end(text, start)
        pieces.append(text[start:end])
        start = end
    return pieces


def _piece_end(text: str, start: int) -> int:
    for contraction in _CONTRACTIONS:
        if text.startswith(contraction, start):
            return start + len(contraction)
    first = start + 1 if text[start] == " " and start + 1 < len(text) else start
    kind = _kind(text[first])
    if kind != "space":
        return _run_end(text, first, kind)
    end = _run_end(text, start, "space")
    # White space before a word leaves its last character to the word, unless it is all there is.
    return end - 1 if end < len(text) and end - start > 1 else end


def _run_end(text: str, start: int, kind: str) -> int:
    end = start
    while end < len(text) and _kind(text[end]) == kind:
        end += 1
    return end


def _kind(letter: str) -> str:
    if letter in _SPACES:
        return "space"
    return {"L": "letter", "N": "number"}.get(unicodedata.category(letter)[0], "other")


def _merge(parts: Sequence[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    index = 0
    while index < len(parts):
        if index + 1 < len(parts) and (parts[index], parts[index + 1]) == pair:
            merged.append(parts[index] + parts[index + 1])
            index += 2
        else:
            merged.append(parts[index])
            index += 1
    return merged


def _byte_letters() -> list[str]:
    """Give each byte a printable character, as GPT-2 did."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters: list[str] = []
    spare = 0x100
    for byte in range(256):
        if byte in printable:
            letters.append(chr(byte))
        else:
            letters.append(chr(spare))
            spare += 1
    return letters


_LETTER_OF_BYTE: Final = _byte_letters()
_BYTE_OF_LETTER: Final = {letter: byte for byte, letter in enumerate(_LETTER_OF_BYTE)}
