"""How do the daemons appear in help and completion?  Made from their table of flags.

`__main__` starts a daemon before click is imported; these run it as well, for whoever comes by here.
"""

from typing import Any

import click

from arriero.cli import options
from arriero.cli.commands import daemons


def _entry(role: str) -> click.Command:
    def callback(**values: Any) -> int:
        return daemons.run(role, values)

    return click.Command(
        role,
        callback=callback,
        help=daemons.MEANING[role],
        epilog=options.examples(daemons.EXAMPLES[role]),
        params=[
            click.Option([flag.name], help=flag.help, metavar=flag.metavar or None, is_flag=not flag.metavar)
            for flag in daemons.FLAGS[role]
        ],
    )


orchestrator = _entry("orchestrator")
agent = _entry("agent")
