"""How many answers are right? `python -m tools.train_demo.exam` asks the model file everything.

An answer counts when every token of it is the most likely one after the right tokens before it;
that is so exactly when greedy generation gives the whole answer.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import torch

from . import grammar, words
from .batches import collate, encode
from .grammar import Document, Exchange
from .model import DemoModel
from .tokenizer import Tokenizer

_BATCH_TOKENS: Final = 8192
_SEED: Final = 1
_RANDOM_QUESTIONS: Final = 200


def main() -> None:
    """Ask the model file, and print what share of each kind is right, with the first mistakes."""
    from .export import MODEL_FILE
    from .gguf_file import read_gguf
    from .reference import model_of, tokenizer_of

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FILE)
    options = parser.parse_args()
    torch.set_num_threads(2)
    file = read_gguf(options.model)
    model, tokenizer = model_of(file), tokenizer_of(file)
    for kind, documents in {**_exhaustive(), **_random_documents(_SEED)}.items():
        wrong = wrong_documents(model, tokenizer, documents)
        share = 1 - len(wrong) / len(documents)
        print(f"{kind}: {share:.4f} of {len(documents)} right", flush=True)
        for document in wrong[:4]:
            print(f"    wrong: {document.text[-90:]!r}")


def quick_report(model: DemoModel, tokenizer: Tokenizer) -> str:
    """Return, for each kind of question, what share of a few random ones is answered right."""
    shares = []
    for kind, documents in _random_documents(_SEED).items():
        share = 1 - len(wrong_documents(model, tokenizer, documents)) / len(documents)
        shares.append(f"{kind} {share:.3f}")
    return " ".join(shares)


@torch.no_grad()
def wrong_documents(model: DemoModel, tokenizer: Tokenizer, documents: Sequence[Document]) -> list[Document]:
    """Return the documents of which the model misses a learned token."""
    device = model.embedding.weight.device
    wrong: list[Document] = []
    for chunk in _chunks(tokenizer, documents):
        batch = collate([encoded for _, encoded in chunk])
        hidden = model(batch.ids.to(device)).flatten(0, 1)[batch.places.to(device)]
        missed = model.logits(hidden).argmax(-1).cpu() != batch.targets
        wrong += [chunk[row][0] for row in sorted(set(batch.rows[missed].tolist()))]
    return wrong


def _chunks(
    tokenizer: Tokenizer, documents: Sequence[Document]
) -> Iterator[list[tuple[Document, tuple[list[int], list[bool]]]]]:
    encoded = [(document, encode(tokenizer, document)) for document in documents]
    encoded.sort(key=lambda pair: len(pair[1][0]))
    chunk: list[tuple[Document, tuple[list[int], list[bool]]]] = []
    for pair in encoded:
        if chunk and (len(chunk) + 1) * len(pair[1][0]) > _BATCH_TOKENS:
            yield chunk
            chunk = []
        chunk.append(pair)
    if chunk:
        yield chunk


def _exhaustive() -> dict[str, list[Document]]:
    """Return every question of the kinds that have an end."""
    spelt = dict.fromkeys((*words.ANIMALS, *words.HEROES, *words.WORDS))
    return {
        "add 0..99 to 0..99": [
            _asked(f"What is {left} plus {right}?", str(left + right))
            for left in range(100)
            for right in range(100)
        ],
        "count from 0..99, up to 40 on": [
            _counted(start, start + more) for start in range(100) for more in range(1, 41, 3)
        ],
        "count from 1 to 2..130": [_counted(1, end) for end in range(2, 131)],
        "count from 1 to 131..200": [_counted(1, end) for end in range(131, 201, 3)],
        "count from 100..400, up to 30 on": [
            _counted(start, start + more) for start in range(100, 401, 7) for more in range(1, 31, 4)
        ],
        "spell a listed word": [_asked(f"Spell {word}.", "-".join(word)) for word in spelt],
        "json with name and age": [
            _asked(
                f"Give me a JSON object with name {name} and age {age}.",
                f'{{"name": "{name}", "age": {age}}}',
            )
            for name in words.NAMES
            for age in range(1, 100, 7)
        ],
    }


def _random_documents(seed: int) -> dict[str, list[Document]]:
    makers: dict[str, Callable[[random.Random], Exchange]] = {
        "count": grammar.count,
        "add": grammar.add,
        "spell": grammar.spell,
        "json": grammar.json_object,
        "repeat": grammar.repeat,
        "greeting": grammar.greeting,
        "unknown": grammar.unknown,
    }
    documents: dict[str, list[Document]] = {}
    for kind, make in makers.items():
        rng = random.Random(seed)
        documents[kind] = [grammar.chat_document(rng, [make(rng)]) for _ in range(_RANDOM_QUESTIONS)]
    rng = random.Random(seed)
    documents["tools"] = [grammar.tools_document(rng) for _ in range(_RANDOM_QUESTIONS)]
    return documents


def _counted(start: int, end: int) -> Document:
    answer = " ".join(str(number) for number in range(start, end + 1))
    return _asked(f"Count from {start} to {end}.", answer)


def _asked(question: str, answer: str) -> Document:
    document = Document("asked")
    grammar.add_turn(document, "user", question, answer)
    return document


if __name__ == "__main__":
    main()
