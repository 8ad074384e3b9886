"""`arriero downloads`: what is being fetched?"""

import click

from arriero.cli import options, render
from arriero.contracts.errors import Exit


@click.group(epilog=options.examples(("arriero downloads list", "arriero downloads list --json")))
def downloads() -> None:
    """Show what is being fetched."""


@downloads.command(
    "list", epilog=options.examples(("arriero downloads list", "arriero downloads list --json"))
)
@options.json_option
def list_downloads(*, as_json: bool) -> int:
    """List downloads, running and ended."""
    found = options.orchestrator().downloads()
    if as_json:
        render.data({"downloads": found})
        return Exit.OK
    render.table(
        ("download", "model", "state", "done", "speed", "left", "attempt"),
        [
            [
                record.download_id,
                record.model_ref,
                str(record.state),
                render.bytes_text(record.bytes_downloaded)
                + (f" of {render.bytes_text(record.bytes_total)}" if record.bytes_total else ""),
                f"{record.speed_mbps:.1f} Mbit/s" if record.speed_mbps else "",
                render.seconds_text(record.eta_s) if record.eta_s is not None else "",
                str(record.attempt),
            ]
            for record in found
        ],
    )
    return Exit.OK
