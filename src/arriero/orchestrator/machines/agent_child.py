"""How does a machine's agent start, stop and vanish?  Runs there, see `there_child.py`."""

import contextlib
import hashlib
import http.client
import os
import plistlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arriero.orchestrator.machines.environment_child import remove_all
from arriero.orchestrator.machines.there_child import (
    MARKER,
    POLL_S,
    Facts,
    Refused,
    current,
    make,
    quiet,
    read,
    service_manager,
    systemctl,
    turn,
    units,
)

#: Between SIGKILL and its effect.
KILLED_WAIT_S = 10.0
HEALTH_TIMEOUT_S = 5.0
LOG_LINES = 15


# --- Which processes -----------------------------------------------------------------------------


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def is_alive(record: Facts) -> bool:
    """Return whether the very process that a run file speaks of still lives."""
    pid, ticks = record.get("pid", 0), record.get("pid_start_ticks", 0)
    if not (isinstance(pid, int) and pid > 1 and isinstance(ticks, int)):
        return False
    boot = _boot_id()
    if boot:
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return False
        return record.get("boot_id") == boot and fields[0] not in (b"Z", b"X") and int(fields[19]) == ticks
    # Elsewhere ticks are hundredths of a second since 1970, and `ps` tells whole seconds.
    asked = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    env = {**os.environ, "LC_ALL": "C"}
    said = subprocess.run(asked, capture_output=True, text=True, check=False, env=env).stdout.split(None, 1)
    if len(said) != 2 or said[0].startswith("Z"):
        return False
    started = time.mktime(time.strptime(" ".join(said[1].split()), "%a %b %d %H:%M:%S %Y"))
    return abs(started - ticks / 100) < 2


def _signal(record: Facts, number: int, *, group: bool = False) -> None:
    if is_alive(record):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if group else os.kill)(record["pid"], number)


def agent_of(home: Path) -> Facts:
    """Return the run file of the agent that ran last; {} if there is none."""
    return read(home / "run" / "agent.json")


def keeper_of(home: Path) -> Facts:
    """Return the run file of the keeper that ran last; {} if there is none."""
    return read(home / "run" / "keeper.json")


def _workers(home: Path) -> list[Facts]:
    runs = [read(path) for path in sorted((home / "run" / "workers").glob("w-*.json"))]
    return [{**run, "pid": run.get("record", {}).get("pid", 0)} for run in runs if run]


def _end(keeper: Facts, agent: Facts, grace_s: float) -> None:
    """End a keeper and its agent; both are asked, and killed after `grace_s`."""
    both = [keeper, agent]
    _signal(keeper if is_alive(keeper) else agent, signal.SIGTERM)
    if not _wait_gone(both, grace_s):
        for record in both:
            _kill(record)
        _wait_gone(both, KILLED_WAIT_S)


def _kill(record: Facts) -> None:
    """Kill a process, and the group that it leads.

    An agent that hangs before it has a run file is of its keeper's group; workers have groups of their own.
    """
    _signal(record, signal.SIGKILL, group=True)
    _signal(record, signal.SIGKILL)


def _wait_gone(records: list[Facts], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while any(is_alive(record) for record in records):
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


# --- Start ---------------------------------------------------------------------------------------


def start(
    path: str, name: str, uses_services: bool, answer_timeout_s: float, stop_timeout_s: float = 15.0
) -> Facts:
    """Start the agent of `current` unless one runs or is being started; return when it answers.

    One that does not is asked to end, and killed after `stop_timeout_s`: it has no workers to wait for.
    """
    root = Path(path).absolute()
    home = root / "home"
    if not (root / MARKER).is_file():
        raise Refused("INSTALL_FAILED", "arriero is not installed there", last_lines=[])
    with turn(root):
        log = home / "logs" / "agent.log"
        offset = log.stat().st_size if log.exists() else 0
        is_new, how = not is_alive(agent_of(home)), "the process that keeps it"
        # One that is slow, or comes up just now, is not ended: its workers would be, too.
        _signal(keeper_of(home), signal.SIGHUP)
        if not _wait_answers(home, log, offset, answer_timeout_s, while_it=_is_kept):
            is_new, how = True, _start(root, name, uses_services, log)
            try:
                _wait_answers(home, log, offset, answer_timeout_s)
            except Refused:
                _remove_service(root)
                _end(keeper_of(home), agent_of(home), stop_timeout_s)
                raise
    return {"is_new": is_new, "how": how, "version": agent_of(home).get("version", "")}


def _start(root: Path, name: str, uses_services: bool, log: Path) -> str:
    """Return what keeps the agent now."""
    home = root / "home"
    tag = current(root)
    if tag is None:
        raise Refused("INSTALL_FAILED", "arriero is not installed there, or half", last_lines=[])
    for folder in (home, home / "run", home / "logs"):
        folder.mkdir(mode=0o700, exist_ok=True)
    # By its own path: `current` may point elsewhere when it starts a worker.
    python = root / "envs" / tag / "bin" / "python"
    env = {"ARRIERO_HOME": str(home), "ARRIERO_NODE_NAME": name, "ARRIERO_AGENT_PORT": "0"}
    service = service_manager(root) if uses_services else ""
    if service and (how := _start_service(root, service, python, env, log)):
        return how
    _start_keeper(python, env, log)
    return "a supervised process"


def _start_keeper(python: Path, env: dict[str, str], log: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ARRIERO_", "PYTHON", "SSH_"))}
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        subprocess.Popen(
            [str(python), "-m", "arriero", "keep-agent"],
            stdin=subprocess.DEVNULL, stdout=fd, stderr=fd, cwd="/", env=clean | env, start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(fd)


def _is_kept(home: Path) -> bool:
    """Return whether an agent runs, or who would start one: a keeper ends with one that was told to end."""
    return is_alive(agent_of(home)) or is_alive(keeper_of(home))


def _wait_answers(
    home: Path,
    log: Path,
    offset: int,
    timeout_s: float,
    *,
    while_it: Callable[[Path], bool] = lambda _: True,
) -> bool:
    """Wait until the agent answers; return False as soon as `while_it` does not hold any more."""
    deadline = time.monotonic() + timeout_s
    while not (is_alive(agent_of(home)) and answers(agent_of(home))):
        if not while_it(home):
            return False
        if time.monotonic() > deadline:
            raise Refused(
                "DAEMON_START_FAILED",
                f"the agent does not answer after {timeout_s:g} s",
                log_tail=_tail(log, offset),
            )
        time.sleep(POLL_S)
    return True


def answers(record: Facts) -> bool:
    """Return whether the agent's health route answers, asked from here."""
    host, _, port = str(record.get("url", "")).removeprefix("http://").partition(":")
    try:
        connection = http.client.HTTPConnection(host, int(port), timeout=HEALTH_TIMEOUT_S)
        with contextlib.closing(connection):
            connection.request(
                "GET", "/v1/health", headers={"Authorization": f"Bearer {record.get('token', '')}"}
            )
            return connection.getresponse().status == 200
    except (OSError, ValueError, http.client.HTTPException):
        return False


def _tail(log: Path, offset: int) -> list[str]:
    try:
        with log.open("rb") as file:
            size = log.stat().st_size
            # Shorter than before: it was cut, and begins anew.
            file.seek(max(offset if offset <= size else 0, size - 20_000))
            return file.read().decode("utf-8", "replace").splitlines()[-LOG_LINES:]
    except OSError:
        return []


# --- Services ------------------------------------------------------------------------------------


def _service_name(root: Path) -> str:
    # Of the path: several installations of a user do not meet.
    return "arriero-agent-" + hashlib.sha256(os.fsencode(root)).hexdigest()[:8]


def _unit_file(root: Path) -> Path:
    return units() / f"{_service_name(root)}.service"


def _plist_file(root: Path) -> Path:
    return Path.home() / "Library" / "LaunchAgents" / f"{_service_name(root)}.plist"


def service_file(root: Path) -> Path | None:
    """Return the file of the service that keeps the agent; None if it has none."""
    return next((file for file in (_unit_file(root), _plist_file(root)) if file.exists()), None)


def unit_text(python: str, env: dict[str, str], log: str) -> str:
    """Return the unit of systemd that keeps an agent; all of its values are plain (see `NodeAddress`)."""
    lines = [
        "[Unit]",
        "Description=arriero's agent",
        "StartLimitIntervalSec=0",
        "[Service]",
        f"ExecStart={python} -m arriero agent",
        *(f"Environment={name}={value}" for name, value in sorted(env.items())),
        # What crashed, and not what was told to end; a boot starts it in any case.
        "Restart=on-failure",
        # Not at once: one that cannot start would take a whole core.
        "RestartSec=250ms",
        # Its workers outlive an agent that is killed, and are stopped by one that is told to end.
        "KillMode=process",
        "TimeoutStopSec=60",
        f"StandardOutput=append:{log}",
        f"StandardError=append:{log}",
        "[Install]",
        "WantedBy=default.target",
    ]
    return "\n".join(lines) + "\n"


def plist(label: str, python: str, env: dict[str, str], log: str) -> bytes:
    """Return what launchd keeps an agent by."""
    return plistlib.dumps(
        {
            "Label": label,
            "ProgramArguments": [python, "-m", "arriero", "agent"],
            "EnvironmentVariables": env,
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            # The workers outlive an agent that is killed.
            "AbandonProcessGroup": True,
            "ExitTimeOut": 60,
            "ProcessType": "Interactive",
            "StandardOutPath": log,
            "StandardErrorPath": log,
        }
    )


def _start_service(root: Path, kind: str, python: Path, env: dict[str, str], log: Path) -> str:
    """Return what keeps the agent now; empty, and nothing left, if the machine's service manager will not."""
    name = _service_name(root)
    if kind == "systemd":
        unit = _unit_file(root)
        make(root, unit.parent)
        unit.write_text(unit_text(str(python), env, str(log)))
        if (
            not systemctl("daemon-reload")
            and not systemctl("enable", name)
            and not systemctl("restart", name)
        ):
            return "a user service (systemd)"
    elif kind == "launchd":
        file = _plist_file(root)
        make(root, file.parent)
        file.write_bytes(plist(name, str(python), env, str(log)))
        for domain in ("gui", "user"):
            quiet(["launchctl", "bootout", f"{domain}/{os.getuid()}/{name}"])
            if not quiet(["launchctl", "bootstrap", f"{domain}/{os.getuid()}", str(file)]):
                return "a user service (launchd)"
    _remove_service(root)
    return ""


def _remove_service(root: Path) -> None:
    name = _service_name(root)
    if _unit_file(root).exists():
        systemctl("disable", "--now", name)
        _unit_file(root).unlink(missing_ok=True)
        systemctl("daemon-reload")
    if _plist_file(root).exists():
        for domain in ("gui", "user"):
            quiet(["launchctl", "bootout", f"{domain}/{os.getuid()}/{name}"])
        _plist_file(root).unlink(missing_ok=True)


# --- Stop ----------------------------------------------------------------------------------------


def stop(path: str, grace_s: float) -> Facts:
    """Stop the agent and its workers: asked first, after `grace_s` killed."""
    root = Path(path).absolute()
    if not (root / MARKER).is_file():
        return {"was_running": False, "killed": 0}
    with turn(root):
        return _stop(root, grace_s)


def _stop(root: Path, grace_s: float) -> Facts:
    home = root / "home"
    was_running = any(is_alive(record) for record in (agent_of(home), keeper_of(home), *_workers(home)))
    # A service manager waits by itself; what it kept is waited for below.
    _remove_service(root)
    killed = _stop_all(home, grace_s)
    for file in (home / "run" / "agent.json", home / "run" / "keeper.json"):
        file.unlink(missing_ok=True)
    for file in (home / "run" / "workers").glob("w-*.json"):
        file.unlink(missing_ok=True)
    return {"was_running": was_running, "killed": killed}


def _stop_all(home: Path, grace_s: float) -> int:
    keeper, agent, workers = keeper_of(home), agent_of(home), _workers(home)
    # The keeper passes it on; told twice, an agent would end the same way.
    _signal(keeper if is_alive(keeper) else agent, signal.SIGTERM)
    has_ended = _wait_gone([keeper, agent], grace_s)
    if has_ended:
        # Those of an agent that was not there to stop them.
        left = [worker for worker in workers if is_alive(worker)]
        for worker in left:
            _signal(worker, signal.SIGTERM)
        has_ended = _wait_gone(left, min(grace_s, 10.0))
    if has_ended:
        return 0
    # Once more: more of them may have come up meanwhile.
    agent, workers = agent_of(home), _workers(home)
    alive = [record for record in (keeper, agent, *workers) if is_alive(record)]
    for record in alive:
        _kill(record)
    _wait_gone(alive, KILLED_WAIT_S)
    return len(alive)


def remove(path: str, purge: bool, grace_s: float) -> Facts:
    """Stop what runs and take its service away; with `purge` everything that arriero put there."""
    root = Path(path).absolute()
    if not (root / MARKER).is_file():
        if purge and root.exists() and any(root.iterdir()):
            raise Refused(
                "INSTALL_PATH_UNUSABLE", f"{root} is nothing that arriero made: it is left as it is"
            )
        return {"is_clean": not root.exists(), "killed": 0}
    with turn(root):
        done = _stop(root, grace_s)
        if purge:
            remove_all(root)
    return {"is_clean": not root.exists(), **done}


ACTIONS: dict[str, Any] = {"start": start, "stop": stop, "remove": remove}
