"""Is what was installed on a machine whole, and does its agent run?  Runs there, see `there_child.py`."""

import base64
import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arriero.orchestrator.machines.agent_child import agent_of, answers, is_alive, keeper_of, service_file
from arriero.orchestrator.machines.environment_child import check
from arriero.orchestrator.machines.there_child import MARKER, WHOLE, Facts, Refused, current, read


def examine(path: str) -> list[Facts]:
    """Return what was looked at."""
    root = Path(path).absolute()
    if not (root / MARKER).is_file():
        return [_finding("environment", "arriero is not installed there", "INSTALL_FAILED")]
    return [_environment(root), _agent(root), _keeper(root)]


def _finding(name: str, message: str, code: str = "") -> Facts:
    return {"name": name, "is_ok": not code, "message": message, "code": code}


def _environment(root: Path) -> Facts:
    tag = current(root)
    if tag is None:
        return _finding("environment", "the environment is missing or half", "INSTALL_FAILED")
    environment = root / "envs" / tag
    broken = next(_broken(environment), None)
    if broken is not None:
        return _finding("environment", f"{broken} is missing or was changed: install again", "INSTALL_FAILED")
    try:
        check(environment, str(read(environment / WHOLE).get("version")))
    except Refused as error:
        return _finding("environment", str(error), "INSTALL_FAILED")
    return _finding("environment", f"{tag} is whole")


def _broken(environment: Path) -> Iterator[str]:
    """Yield the files that are not what was installed, by the records of what was."""
    for record in environment.glob("lib/python*/site-packages/*.dist-info/RECORD"):
        folder = record.parent.parent
        with record.open(newline="") as lines:
            for name, stated, *_ in csv.reader(lines):
                if not stated.startswith("sha256="):
                    continue
                try:
                    with (folder / name).open("rb") as file:
                        digest = hashlib.file_digest(file, "sha256").digest()
                except OSError:
                    yield name
                    continue
                if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != stated.partition("=")[2]:
                    yield name


def _agent(root: Path) -> Facts:
    record = agent_of(root / "home")
    if not is_alive(record):
        return _finding("agent", "the agent does not run", "NOT_RUNNING")
    if not answers(record):
        return _finding("agent", f"the agent (pid {record['pid']}) does not answer", "HEALTH_CHECK_ERROR")
    return _finding("agent", f"the agent answers (pid {record['pid']}, arriero {record.get('version', '?')})")


def _keeper(root: Path) -> Facts:
    service = service_file(root)
    if service is not None:
        return _finding("keeper", f"the agent is kept by the service {service.name}")
    if is_alive(keeper_of(root / "home")):
        return _finding("keeper", "the agent is kept by a process of ours: until the machine starts anew")
    return _finding("keeper", "nothing starts the agent again when it ends", "NOT_RUNNING")


ACTIONS: dict[str, Any] = {"examine": examine}
