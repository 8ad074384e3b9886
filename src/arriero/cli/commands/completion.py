"""`arriero completion`: how does a shell complete our commands?"""

from typing import Final

import click
from click.shell_completion import get_completion_class

from arriero.cli import options, render
from arriero.contracts.errors import Exit

_EXAMPLES: Final = (
    'eval "$(arriero completion bash)"                  # in ~/.bashrc',
    'eval "$(arriero completion zsh)"                   # in ~/.zshrc',
    "arriero completion fish > ~/.config/fish/completions/arriero.fish",
)


@click.command(epilog=options.examples(_EXAMPLES))
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@options.json_option
def completion(*, shell: str, as_json: bool) -> int:
    """Print the script that makes SHELL complete commands and options."""
    from arriero.cli.main import COMPLETE_VARIABLE, cli

    kind = get_completion_class(shell)
    assert kind is not None, "click knows these three"
    made = kind(cli, {}, "arriero", COMPLETE_VARIABLE)
    # The template alone: `source()` would run the shell to look at its version.
    script = made.source_template % made.source_vars()
    if as_json:
        render.data({"shell": shell, "script": script})
    else:
        render.out(script)
    return Exit.OK
