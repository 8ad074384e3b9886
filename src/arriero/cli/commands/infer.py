"""`arriero infer`: how does one prompt get its answer?"""

import sys
from typing import Any, Final

import click

from arriero.cli import answer as answers
from arriero.cli import options, pool, render
from arriero.cli.narrator import Narrator
from arriero.cli.signals import Terminated, terminable
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import TaskBody

_EXAMPLES: Final = (
    'arriero infer "Count from 5 to 25."',
    "arriero infer --model hf:org/repo:Q4_K_M --max-tokens 200 -p 'Why is the sky blue?'",
    "git diff | arriero infer --system 'Write a commit message.' -",
    "arriero infer --json --temperature 0 --seed 1 'Say hello.'",
    "arriero infer --ephemeral --timeout 60 'Say hello.'",
)


@click.command(epilog=options.examples(_EXAMPLES))
@click.argument("prompt", required=False)
@click.option("-p", "--prompt", "prompt_option", metavar="TEXT", help="The prompt; `-` reads it from stdin.")
@options.model_option
@click.option("--system", metavar="TEXT", help="A system message before the prompt.")
@click.option("--raw", is_flag=True, help="Send the prompt as it is, without the model's chat template.")
@click.option("--max-tokens", type=click.IntRange(1, 1_000_000), help="Most tokens of the answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 takes the likeliest token each time.")
@click.option("--top-p", type=click.FloatRange(0, 1), help="Choose among the likeliest with this sum.")
@click.option("--top-k", type=click.IntRange(0), help="Choose among so many likeliest tokens.")
@click.option("--seed", type=click.IntRange(-1, 4_294_967_295), help="Makes chance repeatable.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given 16 times.")
@options.node_option("Only on this machine of the pool.")
@click.option("--backend", metavar="NAME", help="cpu, cuda, metal…; nothing falls back by itself.")
@click.option("--device", metavar="ID", help="cuda:0, cpu…")
@options.label_option
@click.option(
    "--timeout", type=click.FloatRange(0, 86_400, min_open=True), metavar="S", help="Seconds for all."
)
@click.option("--ephemeral", is_flag=True, help="What is started for this answer is gone afterwards.")
@options.quiet_option
@options.json_option
def infer(*, prompt: str | None, prompt_option: str | None, as_json: bool, quiet: bool, **given: Any) -> int:
    """Ask a model once.

    The answer streams to stdout, steps and errors go to stderr.  If no orchestrator runs here, one is
    started in the background with an agent; it leaves again when it has been idle.

    Exit codes: 0 answered, 1 error, 2 wrong usage, 124 timed out, 130 interrupted, 137 out of memory.
    """
    deadline = answers.Deadline(given["timeout"])
    body = _body(_prompt(prompt, prompt_option), given)
    narrator = Narrator(is_quiet=quiet)
    answer = answers.Answer(model=body.model)
    with terminable():
        try:
            with pool.serving(
                is_ephemeral=given["ephemeral"], narrator=narrator, timeout_s=deadline.remaining_s()
            ) as client:
                try:
                    answers.run_task(
                        client, body, deadline=deadline, narrator=narrator, answer=answer,
                        write=(lambda _: None) if as_json else answers.write_to_stdout,
                    )  # fmt: skip
                finally:
                    if as_json:
                        answers.name_model(client, answer)
                    else:
                        answers.end_line(answer, narrator)
        except ArrieroError as error:
            answer.error = error.body()
            if not as_json:
                raise
            render.data(answer)
            return int(error.kind.exit_code)
        except (KeyboardInterrupt, Terminated):
            if as_json:
                answer.error = ArrieroError(ErrorCode.REQUEST_CANCELLED).body()
                render.data(answer)
            raise
    if as_json:
        render.data(answer)
    return 0


def _prompt(argument: str | None, option: str | None) -> str:
    if argument is not None and option is not None:
        raise click.UsageError("the prompt is given twice: as an argument and with --prompt")
    text = argument if argument is not None else option
    if text is None:
        raise click.UsageError("there is no prompt; give it as an argument, or `-` for stdin")
    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")
    if not text:
        raise click.UsageError("the prompt is empty")
    return text


def _body(prompt: str, given: dict[str, Any]) -> TaskBody:
    if given["raw"] and given["system"] is not None:
        raise click.UsageError("--system is a chat message, and --raw sends none")
    if len(given["stop"]) > 16 or any(not 1 <= len(word) <= 256 for word in given["stop"]):
        raise click.UsageError("--stop takes up to 16 texts of 1 to 256 characters")
    messages: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
    if given["system"] is not None:
        messages.insert(0, {"role": "system", "content": given["system"]})
    return TaskBody(
        model=given["model"],
        prompt=prompt if given["raw"] else None,
        messages=None if given["raw"] else messages,
        max_tokens=given["max_tokens"],
        temperature=given["temperature"],
        top_p=given["top_p"],
        top_k=given["top_k"],
        seed=given["seed"],
        stop=list(given["stop"]) or None,
        node=given["node"],
        backend=given["backend"],
        device=given["device"],
        labels=options.labels_of(given["labels"]),
    )
