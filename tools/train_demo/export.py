"""Writes the model file into the package: `python -m tools.train_demo.export --help`."""

import argparse
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from . import chat
from .gguf_file import Floats, Value, write_gguf
from .model import DemoModel, ModelShape
from .tokenizer import IM_END_ID, PAD_ID, SPECIALS, Tokenizer
from .train import load_checkpoint

PACKAGE: Final = Path(__file__).parents[2] / "src" / "arriero" / "demo_model"
MODEL_FILE: Final = PACKAGE / "demo.gguf"

_FILE_TYPE_MOSTLY_Q8_0: Final = 7
_TOKEN_NORMAL, _TOKEN_CONTROL = 1, 3


def main() -> None:
    """Export the checkpoint that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("build/demo/checkpoint.pt"))
    parser.add_argument("--output", type=Path, default=MODEL_FILE)
    options = parser.parse_args()
    model, tokenizer = load_checkpoint(options.checkpoint)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(options.output, metadata_of(model.shape, tokenizer), tensors_of(model))
    if options.output == MODEL_FILE:
        _record(MODEL_FILE.read_bytes())
    print(f"{options.output}: {options.output.stat().st_size} bytes")


def metadata_of(shape: ModelShape, tokenizer: Tokenizer) -> Mapping[str, Value]:
    """Return the metadata llama.cpp needs to run the model."""
    kinds = [_TOKEN_CONTROL if token in SPECIALS else _TOKEN_NORMAL for token in tokenizer.tokens]
    return {
        "general.architecture": "llama",
        "general.name": "arriero demo",
        "general.license": "apache-2.0",
        "general.file_type": _FILE_TYPE_MOSTLY_Q8_0,
        "general.quantization_version": 2,
        "llama.vocab_size": shape.vocabulary_size,
        "llama.context_length": shape.context_tokens,
        "llama.embedding_length": shape.width,
        "llama.block_count": shape.layers,
        "llama.feed_forward_length": shape.feed_forward,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": shape.norm_epsilon,
        "llama.rope.dimension_count": shape.head_width,
        "llama.rope.freq_base": shape.rope_base,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokenizer.tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [f"{first} {second}" for first, second in tokenizer.merges],
        "tokenizer.ggml.bos_token_id": PAD_ID,
        "tokenizer.ggml.eos_token_id": IM_END_ID,
        "tokenizer.ggml.padding_token_id": PAD_ID,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": chat.CHAT_TEMPLATE,
    }


def tensors_of(model: DemoModel) -> Mapping[str, Floats]:
    """Return the weights under llama.cpp's names; the output shares the embedding."""
    tensors: dict[str, Floats] = {}
    for name, weight in model.state_dict().items():
        renamed = name.replace("blocks.", "blk.")
        renamed = {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}.get(
            renamed, renamed
        )
        tensors[renamed] = weight.float().numpy()
    return tensors


def _record(content: bytes) -> None:
    """Write hash and size of the model file into the package's module."""
    module = PACKAGE / "__init__.py"
    source = module.read_text(encoding="utf-8")
    digest = hashlib.sha256(content).hexdigest()
    source = re.sub(r'(SHA256: Final\[str\] = )"\w*"', rf'\g<1>"{digest}"', source)
    source = re.sub(r"(SIZE_BYTES: Final\[int\] = )[\d_]+", rf"\g<1>{len(content):_}", source)
    module.write_text(source, encoding="utf-8")


if __name__ == "__main__":
    main()
