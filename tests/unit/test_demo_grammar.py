"""Does the grammar that trains the demo model give right answers, in the form the model file declares?"""

import json
import random
import re
from pathlib import Path
from typing import Any, Final

import pytest
from tools.train_demo import grammar
from tools.train_demo.chat import render
from tools.train_demo.tokenizer import pre_tokenize, train_tokenizer

_REFERENCE: Final[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "reference" / "demo_tokens.json").read_text(encoding="utf-8")
)
_SEEDS: Final = range(200)


@pytest.mark.parametrize("case", [case for case in _REFERENCE["cases"] if "messages" in case])
def test_rendering_gives_the_reference_prompts(case: dict[str, Any]) -> None:
    assert render(case["messages"], case.get("tools", ())) == case["prompt"]


def test_counting_names_every_number_once() -> None:
    for seed in _SEEDS:
        asked = grammar.count(random.Random(seed))
        ends = [int(number) for number in re.findall(r"\d+", asked.question)]
        start, end = (1, *ends) if len(ends) == 1 else ends
        assert [int(number) for number in asked.answer.split(" ")] == list(range(start, end + 1))


def test_sums_are_right() -> None:
    for seed in _SEEDS:
        asked = grammar.add(random.Random(seed))
        assert sum(int(number) for number in re.findall(r"\d+", asked.question)) == int(asked.answer)


def test_spelling_gives_the_word_back() -> None:
    for seed in _SEEDS:
        asked = grammar.spell(random.Random(seed))
        assert asked.answer.replace("-", "") in asked.question


def test_json_answers_hold_what_was_asked_for() -> None:
    for seed in _SEEDS:
        asked = grammar.json_object(random.Random(seed))
        for key, value in json.loads(asked.answer).items():
            assert f"{key} {value}" in asked.question


def test_tool_calls_name_an_offered_tool_and_its_parameters() -> None:
    called = 0
    for seed in _SEEDS:
        text = grammar.tools_document(random.Random(seed)).text
        offered = {
            tool["function"]["name"]: tool["function"]["parameters"]["properties"]
            for tool in map(json.loads, re.findall(r'^\{"type": "function".*$', text, re.MULTILINE))
        }
        for written in re.findall(r"<tool_call>\n(.*)\n</tool_call>", text):
            call = json.loads(written)
            assert set(call["arguments"]) == set(offered[call["name"]])
            called += 1
    assert called > len(_SEEDS) / 2


def test_pieces_of_a_text_are_the_text() -> None:
    text = " It's 12 o'clock,  naïve\n\n\tÑandú\u00a0½ 🦙🏔 \u3000x  "
    assert "".join(pre_tokenize(text)) == text
    assert pre_tokenize("I'll go  now 12a") == ["I", "'ll", " go", " ", " now", " 12", "a"]


def test_encoding_can_be_undone_and_keeps_digits_apart() -> None:
    texts = [grammar.document(random.Random(seed)).text for seed in range(50)]
    tokenizer = train_tokenizer(texts, vocabulary_size=300)
    for text in ("Count from 5 to 125.", "🦙 Ñandú 12\n", *texts):
        plain = re.sub(r"<\|\w+\|>", "", text)
        assert tokenizer.decode(tokenizer.encode(text)) == plain
    assert len(tokenizer.encode(" 125")) == 3
