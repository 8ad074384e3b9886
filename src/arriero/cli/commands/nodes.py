"""`arriero nodes`: which machines are in the pool, and what have they?"""

import time

import click

from arriero.cli import options, render
from arriero.contracts.errors import Exit


@click.group(epilog=options.examples(("arriero nodes list", "arriero nodes list --json")))
def nodes() -> None:
    """Show the machines of the pool."""


@nodes.command("list", epilog=options.examples(("arriero nodes list", "arriero nodes list --json")))
@options.json_option
def list_nodes(*, as_json: bool) -> int:
    """List the machines of the pool."""
    found = options.orchestrator().nodes()
    if as_json:
        render.data({"nodes": found})
        return Exit.OK
    now = time.time()
    render.table(
        ("node", "status", "devices", "memory free", "disk free", "last seen", "version"),
        [
            [
                record.name,
                str(record.status),
                ", ".join(device.id for device in record.devices),
                f"{render.mib_text(record.ram_free_mb)} of {render.mib_text(record.ram_mb)}",
                render.mib_text(record.disk_free_mb),
                f"{render.seconds_text(now - record.last_connected_unix)} ago"
                if record.last_connected_unix
                else "",
                record.version,
            ]
            for record in found
        ],
    )
    return Exit.OK
