"""`arriero down`: how does everything end that runs with this state folder?"""

from typing import Final

import click

from arriero.cli import options, render, teardown
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.runtime import settings

_EXAMPLES: Final = ("arriero down", "arriero down --grace 0     # at once", "arriero down --json")


@click.command(epilog=options.examples(_EXAMPLES))
@click.option("--grace", type=click.FloatRange(0, 3600), metavar="S",
              help="Seconds before SIGKILL; default: the setting stop_grace_s.")  # fmt: skip
@options.quiet_option
@options.json_option
def down(*, grace: float | None, quiet: bool, as_json: bool) -> int:
    """Stop orchestrator, agent and workers of this machine, whatever state they are in.

    Also what killed daemons left behind: orphaned workers, sockets, stale files.  Nothing running is
    no error.
    """
    state = options.state()
    grace_s = _grace_s() if grace is None else grace
    if not state.run.is_dir():
        report = teardown.Report()
    else:
        report = teardown.down(
            state, grace_s=grace_s, tell=(lambda _: None) if quiet or as_json else render.out
        )
    if as_json:
        render.data(report)
    elif not quiet:
        if report.removed:
            render.out(f"removed what was left behind: {', '.join(report.removed)}")
        if not (report.stopped or report.remaining or report.removed):
            render.out("nothing was running")
    if report.remaining:
        pids = [process.pid for process in report.remaining]
        raise ArrieroError(ErrorCode.INTERNAL_ERROR, f"processes that SIGKILL did not end: {pids}")
    return 0


def _grace_s() -> float:
    """Return the configured grace; the default where the settings are not valid: a pool must be endable."""
    try:
        return settings.load().stop_grace_s
    except ArrieroError as error:
        render.note(f"warning: {error.code}: {error.message}")
        return settings.Settings().stop_grace_s
