"""Do tokens come, all of them and each once?"""

from pytest_bdd import given, parsers, then, when

from tests.bdd.world import World


@given(parsers.parse('the prompt "{prompt}"'))
def given_prompt(world: World, prompt: str) -> None:
    world.prompt = prompt


@given(parsers.parse("I want {count:d} tokens at most"))
def given_max_tokens(world: World, count: int) -> None:
    world.max_tokens = count


@then("tokens stream")
def then_stream_tokens(world: World) -> None:
    """Have a worker stream tokens by `arriero probe tokens`.

    0; 1 NO_WORKERS, TOKEN_STREAM_FAILED, TOKEN_STREAM_ERROR, TOKEN_COUNT_MISMATCH; 124 TOKEN_STREAM_TIMEOUT.
    """
    _ask(world)


@then(parsers.parse("the inference completes with {token_count:d} tokens"))
def then_inference_completes_with_tokens(world: World, token_count: int) -> None:
    """Have a worker stream tokens and expect so many of them; ends as `then_stream_tokens` does."""
    _ask(world, "--expect-tokens", str(token_count))


def _ask(world: World, *more: str) -> None:
    limit = ["--max-tokens", str(world.max_tokens)] if world.max_tokens is not None else []
    seen = world.probe("tokens", "--prompt", world.prompt, *limit, *more)
    world.tokens = seen["tokens"]


@when("I ask the pool")
def when_ask_the_pool(world: World) -> None:
    """Ask as a person does: `arriero infer`."""
    limit = ["--max-tokens", str(world.max_tokens)] if world.max_tokens is not None else []
    patience = ["--timeout", f"{world.timeout_s:g}"] if world.timeout_s is not None else []
    answer = world.cli("infer", "--model", world.model, *limit, *patience, world.prompt)
    world.tokens = [answer.get("text", "")] if answer.get("text") else []
