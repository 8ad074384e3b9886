"""How do documents become batches of ids and of places that count?"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import grammar
from .tokenizer import PAD_ID, Tokenizer

#: Documents drawn at a time; those of like length then share a batch, so that little is padding.
_POOL_DOCUMENTS = 1024


@dataclass(frozen=True)
class Batch:
    """Padded ids (batch, time), and what is learned from them."""

    ids: Tensor
    #: Where, in the flattened (batch, time), the next token is learned.
    places: Tensor
    #: The tokens to learn there.
    targets: Tensor
    #: The row of each place.
    rows: Tensor


def batches(
    tokenizer: Tokenizer, rng: random.Random, *, batch_tokens: int, context_tokens: int
) -> Iterator[Batch]:
    """Yield batches of at most `batch_tokens` tokens, padding included, without end."""
    while True:
        pool = [encode(tokenizer, grammar.document(rng)) for _ in range(_POOL_DOCUMENTS)]
        pool = [encoded for encoded in pool if len(encoded[0]) <= context_tokens]
        pool.sort(key=lambda encoded: len(encoded[0]))
        ready: list[Batch] = []
        rows: list[tuple[list[int], list[bool]]] = []
        for encoded in pool:
            if (len(rows) + 1) * len(encoded[0]) > batch_tokens and rows:
                ready.append(collate(rows))
                rows = []
            rows.append(encoded)
        rng.shuffle(ready)
        yield from ready


def encode(tokenizer: Tokenizer, document: grammar.Document) -> tuple[list[int], list[bool]]:
    """Return a document's ids, and which of them are learned."""
    ids: list[int] = []
    learned: list[bool] = []
    for text, is_learned in document.parts:
        part = tokenizer.encode(text)
        ids += part
        learned += [is_learned] * len(part)
    return ids, learned


def collate(rows: Sequence[tuple[list[int], list[bool]]]) -> Batch:
    """Pad rows of ids to one length."""
    width = max(len(ids) for ids, _ in rows)
    padded = torch.full((len(rows), width), PAD_ID)
    counted = torch.zeros((len(rows), width), dtype=torch.bool)
    for row, (ids, learned) in enumerate(rows):
        padded[row, : len(ids)] = torch.tensor(ids)
        counted[row, : len(ids)] = torch.tensor(learned)
    counted[:, 0] = False
    places = counted[:, 1:].nonzero()
    flat = places[:, 0] * width + places[:, 1]
    return Batch(padded, flat, padded.view(-1)[flat + 1], places[:, 0])
