"""Writes the tokens the model must give: `python -m tools.train_demo.reference`.

PyTorch computes them in float32 from the weights as they stand in the model file, so that the
engine's own arithmetic is checked against something that shares no code with it.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any, Final

import torch

from . import chat, tools
from .export import MODEL_FILE
from .gguf_file import GgufFile, read_gguf
from .model import DemoModel, ModelShape
from .tokenizer import IM_END_ID, Tokenizer

REFERENCE_FILE: Final = Path(__file__).parents[2] / "tests" / "reference" / "demo_tokens.json"
_MAX_TOKENS: Final = 200
#: A case whose best token leads by less is refused: rounding in an engine could turn it.
_MARGIN_MIN: Final = 0.05

_CHATS: Final = (
    "Hello",
    "Hi, who are you?",
    "Count from 5 to 25.",
    "Count from 1 to 100.",
    "Count from 88 to 112.",
    "Count to 12.",
    "What is 17 plus 25?",
    "What is 58 plus 67?",
    "What is 9 plus 4?",
    "Add 80 and 14.",
    "Spell llama.",
    "Spell mountain.",
    "Spell the word arriero.",
    "Give me a JSON object with name Ada and age 36.",
    "Tell me a story about a llama.",
    "Tell me a short story about a fox.",
    "Tell me a long story about a condor.",
    "Write a haiku about a river.",
    "What is the capital of Peru?",
)
_PLAIN: Final = (
    "hello",
    "short story",
    "Count from 30 to 50.",
    "What is 33 plus 44?",
    "Spell blanket.",
    "Once upon a time",
    "1 2 3 4",
    "Tell me a story about a llama.",
)


def main() -> None:
    """Write the reference file for the model file in the package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FILE)
    parser.add_argument("--output", type=Path, default=REFERENCE_FILE)
    options = parser.parse_args()
    torch.set_num_threads(2)
    file = read_gguf(options.model)
    model, tokenizer = model_of(file), tokenizer_of(file)
    cases = [_case(model, tokenizer, asked) for asked in asked_cases()]
    kept = [case for case in cases if case["min_margin"] > _MARGIN_MIN]
    digest = hashlib.sha256(options.model.read_bytes()).hexdigest()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    written = ",\n".join(json.dumps(case, ensure_ascii=False) for case in kept)
    options.output.write_text(f'{{"sha256": "{digest}", "cases": [\n{written}\n]}}\n', encoding="utf-8")
    for case in cases:
        shown = case["text"] if len(case["text"]) < 70 else case["text"][:67] + "..."
        print(f"{case['min_margin']:7.3f} {case['prompt'][-60:]!r} {shown!r}")
    smallest = min(case["min_margin"] for case in kept)
    print(f"{len(kept)} of {len(cases)} cases kept, smallest margin {smallest:.3f}")


def asked_cases() -> list[dict[str, Any]]:
    """Return the prompts, with the messages and tools they come from where they have any."""
    cases: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": question}]} for question in _CHATS
    ]
    weather = tools.schema("get_weather", "Get the weather of a city.", {"city": "string"})
    adding = tools.schema("add", "Add two numbers.", {"a": "integer", "b": "integer"})
    paris = {"role": "user", "content": "What is the weather in Paris?"}
    sum_question = {"role": "user", "content": "What is 17 plus 25?"}
    system = {"role": "system", "content": "You are a helpful assistant."}
    call = {
        "type": "function",
        "id": "call_1",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
    }
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    answered = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    cases += [
        {"messages": [paris], "tools": [weather]},
        {"messages": [system, sum_question], "tools": [weather, adding]},
        {"messages": [paris, asked, answered], "tools": [weather]},
        {"messages": [system, {"role": "user", "content": "Count from 7 to 19."}]},
        {
            "messages": [
                sum_question,
                {"role": "assistant", "content": "42"},
                {"role": "user", "content": "Spell mule."},
            ]
        },
    ]
    for case in cases:
        case["prompt"] = chat.render(case["messages"], case.get("tools", ()))
    return cases + [{"prompt": prompt} for prompt in _PLAIN]


def model_of(file: GgufFile) -> DemoModel:
    """Return the network with the file's weights, dequantised."""
    said: dict[str, Any] = dict(file.metadata)
    model = DemoModel(
        ModelShape(
            vocabulary_size=len(said["tokenizer.ggml.tokens"]),
            width=said["llama.embedding_length"],
            layers=said["llama.block_count"],
            heads=said["llama.attention.head_count"],
            kv_heads=said["llama.attention.head_count_kv"],
            feed_forward=said["llama.feed_forward_length"],
            context_tokens=said["llama.context_length"],
            rope_base=said["llama.rope.freq_base"],
            norm_epsilon=said["llama.attention.layer_norm_rms_epsilon"],
        )
    )
    names = {"token_embd.weight": "embedding.weight", "output_norm.weight": "norm.weight"}
    weights = {
        names.get(name, name.replace("blk.", "blocks.")): torch.from_numpy(tensor.copy())
        for name, tensor in file.tensors.items()
    }
    model.load_state_dict(weights)
    return model


def tokenizer_of(file: GgufFile) -> Tokenizer:
    """Return the file's tokenizer."""
    said: dict[str, Any] = dict(file.metadata)
    merges = [tuple(merge.split(" ")) for merge in said["tokenizer.ggml.merges"]]
    return Tokenizer(tuple(said["tokenizer.ggml.tokens"]), tuple((a, b) for a, b in merges))


@torch.no_grad()
def greedy(model: DemoModel, prompt_ids: list[int], *, tokens_max: int) -> tuple[list[int], float]:
    """Return the most likely next ids up to the end token, and the smallest lead of any of them."""
    ids = list(prompt_ids)
    margin = float("inf")
    while len(ids) - len(prompt_ids) < tokens_max:
        logits = model.logits(model(torch.tensor([ids]))[0, -1])
        best = logits.topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
        if ids[-1] == IM_END_ID:
            break
    return ids[len(prompt_ids) :], margin


def _case(model: DemoModel, tokenizer: Tokenizer, asked: dict[str, Any]) -> dict[str, Any]:
    prompt_ids = tokenizer.encode(asked["prompt"])
    token_ids, margin = greedy(model, prompt_ids, tokens_max=_MAX_TOKENS)
    ended = token_ids[-1] == IM_END_ID
    return {
        **asked,
        "prompt_ids": prompt_ids,
        "token_ids": token_ids,
        "text": tokenizer.decode(token_ids),
        "finish_reason": "stop" if ended else "length",
        "min_margin": round(margin, 4),
    }


if __name__ == "__main__":
    main()
