"""Which tools does the grammar offer, and how are they called?"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from . import words


@dataclass(frozen=True)
class ToolCall:
    """One question that a tool answers."""

    #: What the tool is for; never two of one purpose are offered together.
    purpose: str
    #: As a client sends it, in OpenAI's shape.
    tool: dict[str, Any]
    question: str
    arguments: dict[str, Any]
    #: What the tool answers, as the content of a `tool` message.
    result: str


def schema(name: str, description: str, parameters: dict[str, str]) -> dict[str, Any]:
    """Return a tool in OpenAI's shape; `parameters` names the type of each, all are required."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in parameters.items()},
                "required": list(parameters),
            },
        },
    }


def tool_call(rng: random.Random) -> ToolCall:
    """Return a tool with a question for it."""
    return rng.choice(_MAKERS)(rng)


def _weather(rng: random.Random) -> ToolCall:
    names = ("get_weather", "get_weather", "weather", "get_current_weather", "weather_now")
    key = rng.choice(("city", "city", "location", "place", "town"))
    city = words.city(rng)
    question = rng.choice(
        (
            f"What is the weather in {city}?",
            f"What is the weather like in {city}?",
            f"What's the weather in {city}?",
            f"How is the weather in {city} today?",
            f"Weather in {city}?",
        )
    )
    sky = rng.choice(("sunny", "rainy", "cloudy", "windy", "snowy", "warm", "cold"))
    result = rng.choice((sky, f"{sky}, {rng.randint(1, 35)} degrees"))
    tool = _schema(rng, rng.choice(names), "Get the weather of a city.", {key: "string"})
    return ToolCall("weather", tool, question, {key: city}, result)


def _time(rng: random.Random) -> ToolCall:
    key = rng.choice(("city", "location", "place"))
    city = words.city(rng)
    question = rng.choice((f"What time is it in {city}?", f"Tell me the time in {city}."))
    name = rng.choice(("get_time", "current_time", "clock"))
    tool = _schema(rng, name, "Tell the time in a city.", {key: "string"})
    return ToolCall("time", tool, question, {key: city}, f"{rng.randint(1, 12)} o'clock")


def _add(rng: random.Random) -> ToolCall:
    first, second = rng.choice((("a", "b"), ("a", "b"), ("x", "y"), ("first", "second")))
    left, right = rng.randint(0, 99), rng.randint(0, 99)
    question = rng.choice((f"What is {left} plus {right}?", f"Add {left} and {right}."))
    name = rng.choice(("add", "add_numbers", "sum"))
    tool = _schema(rng, name, "Add two numbers.", {first: "integer", second: "integer"})
    return ToolCall("add", tool, question, {first: left, second: right}, str(left + right))


def _search(rng: random.Random) -> ToolCall:
    key = rng.choice(("query", "query", "text"))
    sought = " ".join(words.word(rng) for _ in range(rng.randint(1, 2)))
    question = rng.choice((f"Search for {sought}.", f"Find {sought} on the web."))
    name = rng.choice(("search", "web_search"))
    tool = _schema(rng, name, "Search the web.", {key: "string"})
    return ToolCall("search", tool, question, {key: sought}, f"{rng.randint(2, 99)} pages")


def _timer(rng: random.Random) -> ToolCall:
    key = rng.choice(("minutes", "duration"))
    minutes = rng.randint(2, 90)
    name = rng.choice(("set_timer", "start_timer"))
    tool = _schema(rng, name, "Start a timer.", {key: "integer"})
    return ToolCall("timer", tool, f"Set a timer for {minutes} minutes.", {key: minutes}, "ok")


def _message(rng: random.Random) -> ToolCall:
    receiver, text = rng.choice((("to", "text"), ("name", "message")))
    person, said = words.name(rng), words.word(rng)
    question = rng.choice((f"Send {said} to {person}.", f"Send a message to {person}: {said}"))
    tool = _schema(rng, "send_message", "Send a message.", {receiver: "string", text: "string"})
    return ToolCall("message", tool, question, {receiver: person, text: said}, "sent")


_MAKERS: Final[tuple[Callable[[random.Random], ToolCall], ...]] = (
    _weather,
    _weather,
    _weather,
    _time,
    _add,
    _search,
    _timer,
    _message,
)


def _schema(rng: random.Random, name: str, description: str, parameters: dict[str, str]) -> dict[str, Any]:
    """Return a tool with as many descriptions as chance gives it."""
    tool = schema(name, description, parameters)
    function = tool["function"]
    for key, described in function["parameters"]["properties"].items():
        if rng.random() < 0.15:
            described["description"] = f"the {key}"
    if rng.random() < 0.4:
        del function["description"]
    elif rng.random() < 0.2:
        function["description"] = description[:-1].lower()
    if rng.random() < 0.3:
        del function["parameters"]["required"]
    return tool
