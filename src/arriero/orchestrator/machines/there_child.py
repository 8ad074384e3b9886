"""What do the programs have in common that run on a machine itself, by its own Python?

Standard library alone, from Python 3.11 on.  `there.py` sends this module and one of those that do
something (`survey_child.py`, `environment_child.py`, `agent_child.py`) on standard input; the answer is one
JSON document on standard output, its last line: {"ok": …} or {"error": …}.  Lines before it tell how far
it is: {"told": …}.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

Facts = dict[str, Any]

#: Who says that the folder is ours, and which folders above it we made.
MARKER = "installed-by-arriero.json"
#: Written last into an environment: without it, it is half.
WHOLE = "arriero-environment.json"
LOCK_WAIT_S = 45.0
POLL_S = 0.05
LAST_BYTES = 6000


class Refused(Exception):
    """An expected failure: an error code of arriero, a sentence, details."""

    def __init__(self, code: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.answer = {"error": {"code": code, "message": message, "details": details}}


def main(text: str, actions: dict[str, Callable[..., Any]]) -> None:
    """Do what is asked and print the answer."""
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, _end)
    asked = json.loads(text)
    try:
        answer = {"ok": actions[asked.pop("action")](**asked)}
    except Refused as error:
        answer = error.answer
    except OSError as error:
        answer = _system_error(error).answer
    sys.stdout.write(json.dumps(answer) + "\n")


def tell(told: Facts) -> None:
    """Say how far it is, at once; end if nobody listens any more."""
    try:
        sys.stdout.write(json.dumps({"told": told}) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        raise SystemExit(1) from None


def _end(number: int, _: Any) -> None:
    raise SystemExit(128 + number)


def _system_error(error: OSError) -> Refused:
    where = Path(os.fsdecode(error.filename)).name if isinstance(error.filename, str | bytes) else ""
    why = f"{where}: {error.strerror}" if where else str(error.strerror or error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Refused("INSUFFICIENT_DISK", f"the disk became full ({why})")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return Refused("INSTALL_PATH_UNUSABLE", f"the installation's folder cannot be used ({why})")
    return Refused("INSTALL_FAILED", f"the machine's system refused ({why})", last_lines=[])


# --- The folder ----------------------------------------------------------------------------------


def path_problem(path: Path) -> str:
    """Return why the installation cannot lie at `path`; empty if it can."""
    there = existing(path)
    foreign = [name for name in ("envs", "current", "carried", "home") if (path / name).is_symlink()
               or (path / name).exists()]  # fmt: skip
    if foreign and not (path / MARKER).is_file():
        return f"{path} holds {foreign[0]}, which arriero did not put there"
    if not there.is_dir():
        return f"{there} is no folder"
    if exposed := exposed_at(there):
        return f"what lies in {exposed} could be exchanged by other users of the machine"
    if getattr(os, "ST_NOEXEC", 0) & os.statvfs(there).f_flag:
        return f"{there} lies on a disk from which no program may run (noexec)"
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        # A full disk is told as such, by its numbers.
        return "" if error.errno == errno.ENOSPC else f"{there} cannot be written: {error.strerror}"
    return ""


def exposed_at(path: Path) -> str:
    """Return the folder (or link) on the way to `path` that another user can change; empty if there is none.

    What is put there is run later: whoever can exchange it has our user's rights.
    """
    # Whose the root is may exchange anything; a container's may be somebody else's than root's.
    trusted = {0, os.getuid(), Path("/").stat().st_uid}
    whole = path.resolve()
    for each in (path, *path.parents, whole, *whole.parents):
        found = each.lstat()
        # Many systems have a group for each user, and folders that it may write.
        is_others = found.st_mode & stat.S_IWOTH or (
            found.st_mode & stat.S_IWGRP and found.st_gid not in (0, os.getgid())
        )
        is_kept = stat.S_ISLNK(found.st_mode) or found.st_mode & stat.S_ISVTX
        if found.st_uid not in trusted or (is_others and not is_kept):
            return str(each)
    return ""


def existing(path: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    while not (path.exists() or path.is_symlink()):
        path = path.parent
    return path


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def write(path: Path, value: Any) -> None:
    """Write a JSON file (0600): a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value))
    temporary.chmod(0o600)
    temporary.replace(path)


def read(path: Path) -> Facts:
    """Return a JSON file's content; {} if it is not there or no object."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def current(root: Path) -> str | None:
    """Return the tag of the environment that `current` points to; None if it is not whole."""
    with contextlib.suppress(OSError):
        tag = (root / "current").readlink().name
        if (root / "envs" / tag / WHOLE).is_file():
            return tag
    return None


def whole(root: Path) -> list[str]:
    """Return the tags of the environments that are whole, the newest last."""
    found = list((root / "envs").glob(f"*/{WHOLE}"))
    return [path.parent.name for path in sorted(found, key=lambda path: path.stat().st_mtime)]


@contextlib.contextmanager
def turn(root: Path) -> Iterator[None]:
    """Hold the right to change what is installed; wait for another one, then give up."""
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # One that was removed meanwhile locks nobody out.
            if os.fstat(fd).st_nlink:
                break
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        os.close(fd)
        if time.monotonic() > deadline:
            raise Refused(
                "INSTALL_FAILED",
                f"somebody else has been installing or removing arriero there for {LOCK_WAIT_S:g} s",
                last_lines=[],
            )
        time.sleep(POLL_S)
    try:
        yield
    finally:
        os.close(fd)


# --- Programs ------------------------------------------------------------------------------------


def quiet(argv: list[str], env: dict[str, str] | None = None) -> int:
    """Run a short program; return its exit code, 127 if it cannot be run or takes too long."""
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, env=env,
                              check=False).returncode  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return 127


def systemctl(*arguments: str) -> int:
    """Speak to the user's own service manager; return the exit code."""
    env = {"XDG_RUNTIME_DIR": f"/run/user/{os.getuid()}", **os.environ}
    return quiet(["systemctl", "--user", *arguments], env)


def service_manager(root: Path) -> str:
    """Return `systemd` or `launchd` where it can keep a user's program when nobody is logged in."""
    if sys.platform == "darwin":
        return "launchd" if shutil.which("launchctl") else ""
    if not (shutil.which("systemctl") and shutil.which("loginctl")) or systemctl("show-environment"):
        return ""
    if _lingers():
        return "systemd"
    # Without lingering it would be ended together with the last login.
    quiet(["loginctl", "enable-linger"])
    if not _lingers():
        return ""
    write(root / MARKER, {**read(root / MARKER), "lingers": True})
    return "systemd"


def _lingers() -> bool:
    asked = ["loginctl", "show-user", str(os.getuid()), "--property=Linger", "--value"]
    try:
        said = subprocess.run(asked, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    return said.stdout.strip() == b"yes"


def units() -> Path:
    """Return where the units of the user's own services are."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"


def make(root: Path, folder: Path) -> None:
    """Make a folder outside of `root`; those that were not there go with the installation."""
    made = missing(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if made:
        known = read(root / MARKER)
        write(root / MARKER, {**known, "elsewhere": [*made, *known.get("elsewhere", [])]})


def missing(folder: Path) -> list[str]:
    """Return the folder and those above it that are not there, the lowest first."""
    found = []
    while not folder.exists():
        found.append(str(folder))
        folder = folder.parent
    return found


class Watch:
    """Looks on while a program runs; this one does nothing."""

    def hear(self, piece: bytes) -> None:
        """Take a piece of its output, in another thread."""

    def look(self) -> bool:
        """Have a look around, every now and then; return whether it came further."""
        return False


def call(
    argv: list[str], timeout_s: float, watch: Watch | None = None, *, total_s: float = math.inf,
    env: dict[str, str] | None = None,
) -> str:  # fmt: skip
    """Run a program, with `env` besides what it inherits, and return its output.

    It is ended when its watch sees it come no further for `timeout_s`, when it takes `total_s`, and when
    nobody waits for our answer any more: a connection that is gone must not leave an installation that
    goes on by itself.
    """
    watch = watch or Watch()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ARRIERO_", "PYTHON", "VIRTUAL_ENV"))}
    kept = bytearray()
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**clean, **(env or {})},
        cwd="/",
    )
    assert process.stdout is not None
    reader = threading.Thread(target=_keep_end, args=(process.stdout, kept, watch), daemon=True)
    reader.start()
    asker = select.poll()
    asker.register(1, select.POLLERR | select.POLLHUP)
    begun_s = moved_s = time.monotonic()
    try:
        while process.poll() is None:
            if any(found & (select.POLLERR | select.POLLHUP) for _, found in asker.poll(0)):
                raise SystemExit(1)
            if watch.look():
                moved_s = time.monotonic()
            elif time.monotonic() - moved_s > timeout_s:
                _give_up(f"{_name(argv)} came no further for {timeout_s:g} s", kept)
            if time.monotonic() - begun_s > total_s:
                _give_up(f"{_name(argv)} took more than {total_s:g} s", kept)
            time.sleep(POLL_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join(5)
    if process.returncode:
        _tell(argv, process.returncode, kept)
    return kept.decode("utf-8", "replace")


def _give_up(why: str, kept: bytearray) -> NoReturn:
    raise Refused("INSTALL_FAILED", why, **_last(kept))


def _tell(argv: list[str], code: int, kept: bytearray) -> NoReturn:
    text = kept.decode("utf-8", "replace")
    if f"Errno {errno.ENOSPC}]" in text or f"Errno {errno.EDQUOT}]" in text:
        raise Refused("INSUFFICIENT_DISK", "the disk became full while arriero was installed", **_last(kept))
    lines: list[str] = _last(kept)["last_lines"]
    said = next(
        (line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "it said nothing"
    )
    raise Refused("INSTALL_FAILED", f"{_name(argv)} failed with exit code {code}: {said}", **_last(kept))


def _keep_end(stream: Any, kept: bytearray, watch: Watch) -> None:
    while piece := stream.read1(65536):
        watch.hear(piece)
        kept += piece
        del kept[:-LAST_BYTES]
    stream.close()


def _last(kept: bytearray) -> Facts:
    lines = [line.rstrip() for line in kept.decode("utf-8", "replace").splitlines() if line.strip()]
    return {
        "last_lines": ["".join(c if c.isprintable() else " " for c in line)[:300] for line in lines[-12:]]
    }


def _name(argv: list[str]) -> str:
    return next((word for word in argv if word in ("venv", "install", "download", "version")), argv[0])
