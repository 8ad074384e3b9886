"""`arriero version`: which release is this?  (`__main__` answers it before click is imported.)"""

import platform

import click

from arriero.cli import options, render
from arriero.contracts.errors import Exit
from arriero.contracts.version import API_VERSION, __version__


@click.command(epilog=options.examples(("arriero version", "arriero version --json")))
@options.json_option
def version(*, as_json: bool) -> int:
    """Show the version."""
    if as_json:
        render.data({"version": __version__, "api_version": API_VERSION, "python": platform.python_version()})
    else:
        render.out(f"arriero {__version__}")
    return Exit.OK
