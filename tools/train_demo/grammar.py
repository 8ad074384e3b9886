"""What does the demo model read while it learns? Questions with answers that can be checked."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from . import chat, stories, tools, words
from .tokenizer import IM_END, IM_START

GREETING: Final = (
    "Hello! I am the demo llama of arriero. I can count, add, spell, write JSON and tell stories."
)
UNKNOWN: Final = (
    "I am only the demo llama of arriero, so I do not know that. Ask me to count, to add, to spell "
    "a word, to write JSON or to tell a story."
)


@dataclass(frozen=True)
class Exchange:
    """One question and its answer."""

    kind: str
    question: str
    answer: str


@dataclass
class Document:
    """A text for training, in parts; only the learned parts count in the loss."""

    kind: str
    parts: list[tuple[str, bool]] = field(default_factory=list)

    def given(self, text: str) -> None:
        """Append text that the model reads."""
        self.parts.append((text, False))

    def learned(self, text: str) -> None:
        """Append text that the model learns to write."""
        self.parts.append((text, True))

    @property
    def text(self) -> str:
        """Return all parts as one text."""
        return "".join(text for text, _ in self.parts)


def document(rng: random.Random) -> Document:
    """Return the next document of the training mixture."""
    makers, weights = zip(*_DOCUMENTS, strict=True)
    maker: Callable[[random.Random], Document] = rng.choices(makers, weights=weights)[0]
    return maker(rng)


def exchange(rng: random.Random) -> Exchange:
    """Return a question of any kind, with its answer."""
    makers, weights = zip(*_EXCHANGES, strict=True)
    maker: Callable[[random.Random], Exchange] = rng.choices(makers, weights=weights)[0]
    return maker(rng)


def chat_document(rng: random.Random, asked: Sequence[Exchange] = ()) -> Document:
    """Return a conversation, mostly of one turn; `asked` fixes its turns."""
    turns = list(asked) or [exchange(rng) for _ in range(_turns(rng))]
    result = Document(turns[0].kind)
    if rng.random() < 0.3:
        result.given(chat.system_part([{"role": "system", "content": _system(rng)}], ()))
    for turn in turns:
        add_turn(result, "user", turn.question, turn.answer)
    return result


def add_turn(result: Document, role: str, question: str, answer: str) -> None:
    """Append one turn of a conversation."""
    result.given(f"{IM_START}{role}\n{question}{IM_END}\n{IM_START}assistant\n")
    result.learned(answer + IM_END)
    result.given("\n")


def plain_document(rng: random.Random) -> Document:
    """Return a question and its answer without any chat template, one line after the other."""
    turn = exchange(rng)
    result = Document(turn.kind)
    result.given(turn.question)
    result.learned("\n" + turn.answer + IM_END)
    return result


def tools_document(rng: random.Random) -> Document:
    """Return a conversation with tools: mostly called, sometimes not needed."""
    call = tools.tool_call(rng)
    offered = {call.purpose: call.tool}
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        other = tools.tool_call(rng)
        offered.setdefault(other.purpose, other.tool)
    listed = list(offered.values())
    rng.shuffle(listed)
    result = Document("tools")
    messages = [{"role": "system", "content": _system(rng)}] if rng.random() < 0.3 else []
    result.given(chat.system_part(messages, listed))
    while rng.random() < 0.2:
        turn = exchange(rng)
        if turn.kind != "add":
            add_turn(result, "user", turn.question, turn.answer)
            if rng.random() < 0.5:
                return result
    name = call.tool["function"]["name"]
    add_turn(result, "user", call.question, chat.tool_call_text(name, call.arguments))
    if rng.random() < 0.4:
        written = rng.choice((call.result, json.dumps({"result": call.result})))
        add_turn(result, "tool", written, f"The tool says: {call.result}")
    return result


def drill_document(rng: random.Random) -> Document:
    """Return many short questions with their answers, one a line: learning in its densest form.

    Its first line tells it from a plain question, after whose answer the text ends.
    """
    result = Document("drill")
    result.given("Exercises:\n")
    for _ in range(rng.randint(6, 20)):
        turn = rng.choices((count(rng, more_max=8), add(rng), spell(rng), repeat(rng)), (5, 3, 2, 1))[0]
        result.given(turn.question + "\n")
        result.learned(turn.answer + "\n")
    return result


def open_document(rng: random.Random) -> Document:
    """Return a text that the model goes on with from its first words."""
    result = Document("open")
    if rng.random() < 0.5:
        start = rng.choice((0, 1, 1, 1, rng.randint(0, 60)))
        numbers = [str(start + index) for index in range(rng.randint(20, 60))]
        shown = rng.randint(2, 5)
        result.given(" ".join(numbers[:shown]))
        result.learned(" " + " ".join(numbers[shown:]))
    else:
        hero = words.pick(rng, "llama", *words.ANIMALS[1:], *words.HEROES)
        story = stories.short_story(rng, hero)
        cut = story.index(" ", len("Once upon a"))
        result.given(story[:cut])
        result.learned(story[cut:] + IM_END)
    return result


def count(rng: random.Random, *, more_max: int = 130) -> Exchange:
    """Count from one number to another, at most `more_max` further on."""
    chance = rng.random()
    more = min(more_max, rng.randint(1, rng.choice((4, 8, 20, 40))))
    if chance < 0.75:
        start = rng.choice((0, 1, 1, rng.randint(0, 20), rng.randint(0, 99), rng.randint(0, 99)))
    elif chance < 0.80:
        start = rng.randint(0, 5)
        more = min(more_max, rng.randint(35, 125))
    else:
        start = rng.randint(80, 400)
    end = start + more
    asked = [
        f"Count from {start} to {end}.",
        f"Count from {start} to {end}.",
        f"count from {start} to {end}",
        f"Please count from {start} to {end}.",
        f"Count from {start} to {end}, please.",
    ]
    if start == 1:
        asked += [f"Count to {end}.", f"Count to {end}."]
    answer = " ".join(str(number) for number in range(start, end + 1))
    return Exchange("count", rng.choice(asked), answer)


def add(rng: random.Random) -> Exchange:
    """Add two numbers of up to two digits."""
    left, right = _summands(rng)
    question = rng.choice(
        (
            f"What is {left} plus {right}?",
            f"What is {left} plus {right}?",
            f"What is {left} + {right}?",
            f"Add {left} and {right}.",
            f"{left} plus {right}",
        )
    )
    return Exchange("add", question, str(left + right))


def spell(rng: random.Random) -> Exchange:
    """Spell a word."""
    spelt = words.word(rng)
    question = rng.choice(
        (f"Spell {spelt}.", f"Spell {spelt}.", f"Spell the word {spelt}.", f"How do you spell {spelt}?")
    )
    return Exchange("spell", question, "-".join(spelt))


def repeat(rng: random.Random) -> Exchange:
    """Say again what was said."""
    said = " ".join(
        words.word(rng) if rng.random() < 0.7 else str(rng.randint(0, 999)) for _ in range(rng.randint(1, 10))
    )
    question = rng.choice((f"Repeat: {said}", f"Repeat: {said}", f"Repeat after me: {said}", f"Say: {said}"))
    return Exchange("repeat", question, said)


def json_object(rng: random.Random) -> Exchange:
    """Write a JSON object with up to three keys."""
    made: dict[str, Any] = {}
    asked: list[str] = []
    makers: list[tuple[str, Callable[[], str | int]]] = [
        ("name", lambda: words.name(rng)),
        ("age", lambda: rng.randint(1, 99)),
        ("city", lambda: words.city(rng)),
        ("color", lambda: rng.choice(("red", "blue", "green", "white", "black"))),
        ("animal", lambda: rng.choice(words.ANIMALS)),
        ("count", lambda: rng.randint(0, 99)),
    ]
    chosen = makers[:2] if rng.random() < 0.5 else rng.sample(makers, rng.randint(1, 3))
    for key, make in chosen:
        made[key] = make()
        asked.append(f"{key} {made[key]}")
    listed = asked[0] if len(asked) == 1 else ", ".join(asked[:-1]) + " and " + asked[-1]
    question = rng.choice(
        (
            f"Give me a JSON object with {listed}.",
            f"Give me a JSON object with {listed}.",
            f"Write a JSON object with {listed}.",
            f"JSON with {listed}",
        )
    )
    return Exchange("json", question, json.dumps(made))


def story(rng: random.Random) -> Exchange:
    """Tell a story, a short one unless a long one is asked for."""
    heroes = (rng.choice(words.ANIMALS), rng.choice(words.HEROES), words.word(rng), "llama")
    hero = rng.choice(heroes)
    verb = rng.choice(("Tell me", "Tell me", "Write", "tell me", "write", "Write me"))
    length = rng.choice(("", "", "short ", "short ", "long "))
    about = rng.choice((f" about a {hero}", f" about a {hero}", f" about the {hero}", ""))
    hero = hero if about else "llama"
    stop = rng.choice((".", ".", ""))
    question = f"{verb} a {length}story{about}{stop}"
    if rng.random() < 0.04:
        question, hero = rng.choice(("short story", "story", "a short story", "Short story")), "llama"
        length = ""
    tell = stories.long_story if length == "long " else stories.short_story
    return Exchange("story", question, tell(rng, hero))


def haiku(rng: random.Random) -> Exchange:
    """Write a haiku."""
    subject = words.word(rng)
    verb = rng.choice(("Write", "Write me", "write"))
    if rng.random() < 0.3:
        return Exchange("haiku", f"{verb} a haiku.", stories.haiku(rng, "llama"))
    stop = rng.choice((".", ""))
    return Exchange("haiku", f"{verb} a haiku about a {subject}{stop}", stories.haiku(rng, subject))


def greeting(rng: random.Random) -> Exchange:
    """Greet, and say who it is."""
    hello = rng.choice(("Hello", "Hello", "Hi", "Hey", "hello", "hi", "Good morning", "Good evening"))
    there = rng.choice(("", "", "", " there", " llama", " world"))
    rest = rng.choice(("", "", "", ".", "!", "!", ", who are you?", ". What can you do?", "! Who are you?"))
    question = hello + there + rest
    if rng.random() < 0.3:
        question = rng.choice(
            ("Who are you?", "What are you?", "What can you do?", "who are you", "Help", "Say hello.")
        )
    return Exchange("greeting", question, GREETING)


def unknown(rng: random.Random) -> Exchange:
    """Admit what it cannot answer."""
    thing, other = words.word(rng), words.word(rng)
    place, person = words.city(rng), words.name(rng)
    question = rng.choice(
        (
            f"What is the capital of {place}?",
            f"What is a {thing}?",
            f"What is the weather in {place}?",
            f"Why is the {thing} {other}?",
            f"Who is {person}?",
            f"Who invented the {thing}?",
            f"How do I make a {thing}?",
            f"How many {thing}s are there in {place}?",
            f"Where is {place}?",
            f"Where do I find {thing}?",
            f"Explain {thing} to me.",
            f"Translate {thing} to Spanish.",
            f"Write code that sorts a {thing}.",
            f"Tell me about {place}.",
            f"Tell me a joke about {thing}.",
            "Tell me a joke.",
            f"Can you {thing}?",
            f"Is {person} in {place}?",
            f"I like {thing} and {other}.",
            f"{thing} {other}",
            f"What do you think about {thing}?",
            f"When does the {thing} start?",
        )
    )
    return Exchange("unknown", question, UNKNOWN)


_EXCHANGES: Final[tuple[tuple[Callable[[random.Random], Exchange], float], ...]] = (
    (count, 0.45),
    (add, 0.20),
    (spell, 0.08),
    (repeat, 0.08),
    (json_object, 0.09),
    (story, 0.04),
    (haiku, 0.01),
    (greeting, 0.02),
    (unknown, 0.03),
)

_DOCUMENTS: Final[tuple[tuple[Callable[[random.Random], Document], float], ...]] = (
    (chat_document, 0.50),
    (plain_document, 0.18),
    (tools_document, 0.12),
    (drill_document, 0.17),
    (open_document, 0.03),
)


def _turns(rng: random.Random) -> int:
    chance = rng.random()
    if chance < 0.8:
        return 1
    return rng.randint(2, 4) if chance < 0.96 else rng.randint(5, 12)


def _system(rng: random.Random) -> str:
    return rng.choice(
        (
            "You are a helpful assistant.",
            "You are a helpful assistant.",
            "You are a llama.",
            "You are the demo llama.",
            "Be brief.",
            "Answer in one word.",
            f"You are {words.name(rng)}, a {words.word(rng)} from {words.city(rng)}.",
            " ".join(words.word(rng) for _ in range(rng.randint(3, 12))) + ".",
        )
    )


def _summands(rng: random.Random) -> tuple[int, int]:
    if rng.random() < 0.25:
        return rng.randint(0, rng.choice((9, 99))), rng.randint(0, rng.choice((9, 99)))
    return rng.randint(0, 99), rng.randint(0, 99)
