"""Trains the demo model and writes a checkpoint: `python -m tools.train_demo.train --help`."""

import argparse
import dataclasses
import math
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional

from . import grammar
from .batches import batches
from .exam import quick_report
from .model import DemoModel, ModelShape
from .optimizer import Optimizer
from .tokenizer import Tokenizer, train_tokenizer

SEED: Final = 20261122
#: Documents from which the vocabulary is learned.
_TOKENIZER_DOCUMENTS: Final = 6000
_EXAM_EVERY_STEPS: Final = 250


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so long")
    parser.add_argument("--batch-tokens", type=int, default=3072, help="tokens in a batch")
    parser.add_argument("--matrix-rate", type=float, default=0.006, help="Muon's learning rate")
    parser.add_argument("--other-rate", type=float, default=0.0015, help="Adam's learning rate")
    parser.add_argument("--decay-part", type=float, default=0.8, help="part of the run that cools")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--start", type=Path, help="checkpoint whose weights to start from")
    parser.add_argument("--output", type=Path, default=Path("build/demo/checkpoint.pt"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    device = _device(options.device)
    if options.start:
        model, tokenizer = load_checkpoint(options.start)
    else:
        shape = ModelShape()
        tokenizer = _tokenizer(shape.vocabulary_size)
        model = DemoModel(shape)
    model.to(device)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count} parameters, {options.steps} steps on {device}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    _train(model, tokenizer, options, device)
    save_checkpoint(options.output, model, tokenizer)
    print(quick_report(model, tokenizer))


def save_checkpoint(path: Path, model: DemoModel, tokenizer: Tokenizer) -> None:
    """Write weights, shape and tokenizer to `path`."""
    state = {
        "shape": dataclasses.asdict(model.shape),
        "tokens": list(tokenizer.tokens),
        "merges": [list(merge) for merge in tokenizer.merges],
        "weights": {name: tensor.cpu() for name, tensor in model.state_dict().items()},
    }
    torch.save(state, path)


def load_checkpoint(path: Path) -> tuple[DemoModel, Tokenizer]:
    """Return what `save_checkpoint` wrote."""
    state: Mapping[str, Any] = torch.load(path, weights_only=True)
    model = DemoModel(ModelShape(**state["shape"]))
    model.load_state_dict(state["weights"])
    merges = tuple((first, second) for first, second in state["merges"])
    return model, Tokenizer(tuple(state["tokens"]), merges)


def _train(model: DemoModel, tokenizer: Tokenizer, options: argparse.Namespace, device: torch.device) -> None:
    optimizer = Optimizer(
        model,
        matrix_rate=options.matrix_rate,
        other_rate=options.other_rate,
        decay_part=options.decay_part,
    )
    feed = batches(
        tokenizer,
        random.Random(SEED + options.steps),
        batch_tokens=options.batch_tokens,
        context_tokens=model.shape.context_tokens,
    )
    began = time.monotonic()
    smooth = 0.0
    for step in range(options.steps):
        elapsed_s = time.monotonic() - began
        done = max(step / options.steps, elapsed_s / (60 * options.minutes))
        if done >= 1:
            break
        batch = next(feed)
        hidden = model(batch.ids.to(device)).flatten(0, 1)[batch.places.to(device)]
        loss = functional.cross_entropy(model.logits(hidden), batch.targets.to(device))
        loss.backward()
        optimizer.step(step, done)
        smooth = 0.97 * smooth + 0.03 * loss.item()
        if step % 25 == 24:
            shown = smooth / (1 - 0.97 ** (step + 1))
            print(f"step {step + 1} loss {shown:.4f} {time.monotonic() - began:.0f} s", flush=True)
        if (step + 1) % _EXAM_EVERY_STEPS == 0:
            print("  " + quick_report(model, tokenizer), flush=True)
            save_checkpoint(options.output, model, tokenizer)


def _tokenizer(vocabulary_size: int) -> Tokenizer:
    rng = random.Random(SEED)
    texts = [grammar.document(rng).text for _ in range(_TOKENIZER_DOCUMENTS)]
    return train_tokenizer(texts, vocabulary_size=vocabulary_size)


def _device(asked: str) -> torch.device:
    if asked != "auto":
        return torch.device(asked)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


if __name__ == "__main__":
    main()
