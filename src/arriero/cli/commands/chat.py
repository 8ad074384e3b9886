"""`arriero chat`: how does a person talk with a model?"""

import contextlib
import sys
from typing import Any, Final

import click

from arriero.cli import answer as answers
from arriero.cli import options, pool, render
from arriero.cli.narrator import Narrator
from arriero.cli.signals import terminable
from arriero.client.api import Orchestrator
from arriero.contracts.errors import ArrieroError, Exit
from arriero.contracts.requests import TaskBody

_EXAMPLES: Final = (
    "arriero chat",
    "arriero chat --model hf:org/repo:Q4_K_M --system 'You are terse.'",
    "printf 'Count from 1 to 3.\\nAnd back.\\n' | arriero chat --quiet",
)
_DEFAULT: Final = "(the orchestrator's default)"
_HELP: Final = """\
/help         this
/reset        forget what was said
/model [REF]  show, or change, the model
/quit         end (also Ctrl-D)
Ctrl-C stops an answer; what came so far stays in the talk."""


@click.command(epilog=options.examples(_EXAMPLES))
@options.model_option
@click.option("--system", metavar="TEXT", help="A system message before everything.")
@click.option("--max-tokens", type=click.IntRange(1, 1_000_000), help="Most tokens of one answer.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 takes the likeliest token each time.")
@click.option("--seed", type=click.IntRange(-1, 4_294_967_295), help="Makes chance repeatable.")
@options.node_option("Only on this machine of the pool.")
@click.option("--backend", metavar="NAME", help="cpu, cuda, metal…")
@click.option("--device", metavar="ID", help="cuda:0, cpu…")
@options.label_option
@click.option(
    "--timeout", type=click.FloatRange(0, 86_400, min_open=True), metavar="S", help="Limit of an answer."
)
@options.quiet_option
@options.json_option
def chat(*, as_json: bool, quiet: bool, **given: Any) -> int:
    """Talk with a model: a line is a message, the answer streams.

    With piped stdin each line is answered in turn.  With --json each answer is one JSON line.
    Nothing of the talk is written to disk.
    """
    given["labels"] = options.labels_of(given["labels"])
    narrator = Narrator(is_quiet=quiet)
    with terminable(), pool.serving(is_ephemeral=False, narrator=narrator, timeout_s=None) as client:
        return Talk(client, given, narrator, as_json=as_json).run()


class Talk:
    """One talk: its messages so far, and its model."""

    def __init__(
        self, client: Orchestrator, given: dict[str, Any], narrator: Narrator, *, as_json: bool
    ) -> None:
        self._client = client
        self._given = given
        self._narrator = narrator
        self._as_json = as_json
        self._model: str | None = given["model"]
        self._messages: list[dict[str, Any]] = []
        self._code: int = Exit.OK
        self._is_person = render.is_terminal(sys.stdin)
        self.reset()

    def reset(self) -> None:
        """Forget what was said, the system message excepted."""
        self._messages = []
        if self._given["system"] is not None:
            self._messages.append({"role": "system", "content": self._given["system"]})

    def run(self) -> int:
        """Read and answer until the end; return the exit code: piped in, that of the last message."""
        if self._is_person:
            # Line editing and history of this session; nothing is read from or written to disk.
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - Importing it is what makes input() editable.
            render.note(f"model {self._model or _DEFAULT}; /help shows the commands, Ctrl-D ends")
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                # At the prompt Ctrl-C drops the line; Ctrl-D leaves.
                render.note("")
                if not self._is_person:
                    raise
                continue
            if line is None:
                return self._code if not self._is_person else Exit.OK
            line = line.strip()
            if line.startswith("/"):
                if not self._command(line):
                    return Exit.OK
            elif line:
                self._ask(line)

    def _read(self) -> str | None:
        if not self._is_person:
            line = sys.stdin.readline()
            return line or None
        try:
            return input("> ")
        except EOFError:
            render.note("")
            return None

    def _command(self, line: str) -> bool:
        """Do what a /command says; False: the talk is over."""
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit", "/q"):
            return False
        if name == "/reset":
            self.reset()
            render.note("forgotten")
        elif name == "/model":
            self._model = rest.strip() or self._model
            render.note(f"model {self._model or _DEFAULT}")
        elif name == "/help":
            render.note(_HELP)
        else:
            render.note(f"there is no command {name}; /help shows those there are")
        return True

    def _ask(self, line: str) -> None:
        self._messages.append({"role": "user", "content": line})
        answer = answers.Answer(model=self._model)
        try:
            answers.run_task(
                self._client, self._body(), deadline=answers.Deadline(self._given["timeout"]),
                narrator=self._narrator, answer=answer,
                write=(lambda _: None) if self._as_json else answers.write_to_stdout,
            )  # fmt: skip
        except KeyboardInterrupt:
            if not self._is_person:
                raise
        except ArrieroError as error:
            self._code = int(error.kind.exit_code)
            if not self._as_json:
                answers.end_line(answer, self._narrator)
                render.error(error)
        else:
            self._code = Exit.OK
        if answer.text:
            self._messages.append({"role": "assistant", "content": answer.text})
        else:
            # A question without any answer would only confuse the next one.
            self._messages.pop()
        if self._as_json:
            render.data(answer)
        elif answer.error is None:
            answers.end_line(answer, self._narrator)
        self._narrator.is_mid_line = False

    def _body(self) -> TaskBody:
        return TaskBody(
            model=self._model,
            messages=list(self._messages),
            max_tokens=self._given["max_tokens"],
            temperature=self._given["temperature"],
            seed=self._given["seed"],
            node=self._given["node"],
            backend=self._given["backend"],
            device=self._given["device"],
            labels=self._given["labels"],
        )
