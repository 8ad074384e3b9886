"""How did the last step end?  The only steps that judge."""

import json
from typing import Any

from pytest_bdd import parsers, then

from tests.bdd.world import World


@then("it succeeds")
def then_it_succeeds(world: World) -> None:
    world.see_failure()
    assert world.last_exit_code == 0, f"exit {world.last_exit_code}: {world.last_error}"


@then(parsers.parse("it fails with exit code {exit_code:d} and {code}"))
def then_it_fails(world: World, exit_code: int, code: str) -> None:
    world.see_failure()
    assert world.last_error is not None, f"it did not fail: exit {world.last_exit_code}, {world.answer}"
    assert (world.last_exit_code, world.last_error.code) == (exit_code, code), world.last_error
    assert world.last_error.message
    assert world.last_error.details.get("suggested_action"), "every error says what to do"


@then(parsers.parse("the error says {name} is {value}"))
def then_error_says(world: World, name: str, value: str) -> None:
    assert world.last_error is not None
    assert world.last_error.details.get(name) == _value(value), dict(world.last_error.details)


@then(parsers.parse("at least {least:d} is the {name} of the error"))
def then_error_says_at_least(world: World, name: str, least: int) -> None:
    assert world.last_error is not None
    assert world.last_error.details.get(name, 0) >= least, dict(world.last_error.details)


@then(parsers.parse("the error names {text}"))
def then_error_names(world: World, text: str) -> None:
    assert world.last_error is not None
    told = f"{world.last_error.message} {json.dumps(dict(world.last_error.details))}"
    assert text in told, told


@then(parsers.parse("{count:d} tokens have come"))
def then_tokens_have_come(world: World, count: int) -> None:
    assert len(world.tokens) == count, world.tokens


@then("some tokens have come")
def then_some_tokens_have_come(world: World) -> None:
    assert world.tokens, "no token came"


@then(parsers.parse("the text is {text}"))
def then_text_is(world: World, text: str) -> None:
    assert "".join(world.tokens).strip() == text, world.tokens


@then(parsers.parse("at least {count:d} events have come"))
def then_events_have_come(world: World, count: int) -> None:
    assert len(world.events) >= count, world.events


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
