"""`arriero doctor`: what would keep arriero from working here, and what is to be done about it?"""

import sys
from typing import Final

import click

from arriero.cli import options, render
from arriero.cli.diagnosis import Finding, examine
from arriero.contracts.errors import Exit

_COLOURS: Final = {"ok": "32", "warn": "33", "fail": "31"}


@click.command(epilog=options.examples(("arriero doctor", "arriero doctor --json")))
@options.json_option
def doctor(*, as_json: bool) -> int:
    """Check what arriero needs: Python, engine, devices, memory, disk, ports, rights, daemons.

    Exit codes: 0 nothing fails (there may be warnings), 1 something does.
    """
    findings = []
    for finding in examine(options.state()):
        findings.append(finding)
        if not as_json:
            _show(finding)
    code = Exit.ERROR if any(finding.level == "fail" for finding in findings) else Exit.OK
    if as_json:
        render.data({"checks": findings, "exit_code": int(code)})
    return code


def _show(finding: Finding) -> None:
    level = f"{finding.level:<4}"
    if render.has_colour(sys.stdout):
        level = f"\x1b[{_COLOURS[finding.level]}m{level}\x1b[0m"
    render.out(f"  {finding.name:<14} {finding.message}", style=level)
    if finding.advice:
        render.out(f"{'':<21}→ {finding.advice}")
