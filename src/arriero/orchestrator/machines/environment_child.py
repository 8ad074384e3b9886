"""How does an environment come to be on a machine, whole or not at all?  Runs there, see `there_child.py`."""

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from arriero.orchestrator.machines.there_child import (
    MARKER,
    WHOLE,
    Facts,
    Refused,
    Watch,
    call,
    current,
    missing,
    path_problem,
    quiet,
    read,
    sha256_of,
    tell,
    turn,
    units,
    whole,
    write,
)

#: What a transfer that was cut left is cleared away after this time.
PARTS_KEPT_S = 3600.0
#: How far pip is is told no more often than so.
TELL_EVERY_S = 0.5
#: With these words pip begins with a package.
_BEGINS = ("Collecting", "Processing")
PIP = ["--disable-pip-version-check", "--no-input"]


def prepare(path: str) -> Facts:
    """Make the installation's folders; say what is there already."""
    root = Path(path).absolute()
    problem = path_problem(root)
    if problem:
        raise Refused("INSTALL_PATH_UNUSABLE", problem)
    made = missing(root)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Somebody may have made it in this very moment.
    if problem := path_problem(root):
        raise Refused("INSTALL_PATH_UNUSABLE", problem)
    if not (root / MARKER).exists():
        write(root / MARKER, {"made": made})
    for name in ("envs", "carried", "carried/wheels"):
        (root / name).mkdir(mode=0o700, exist_ok=True)
    return {"has_home": (root / "home").exists()}


def held(path: str, files: dict[str, str]) -> list[str]:
    """Return which files below `carried` are not there with their SHA-256; clear what was left of others."""
    carried = Path(path).absolute() / "carried"
    for part in [*carried.glob(".*.part"), *carried.glob("wheels/.*.part")]:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - part.stat().st_mtime > PARTS_KEPT_S:
                part.unlink()
    return [name for name, sha256 in files.items() if sha256_of(carried / name) != sha256]


def index(path: str, requirement: str, pip: str, timeout_s_of_pip: float) -> bool:
    """Return whether the machine's own package index has a small package of the lock."""
    root = Path(path).absolute()
    with tempfile.TemporaryDirectory(dir=root / "carried", prefix=".index-") as folder:
        asked = Path(folder) / "asked.txt"
        asked.write_text(requirement + "\n")
        argv = [sys.executable, str(root / "carried" / pip / "pip"), "download", "--no-deps", *PIP,
                "--no-cache-dir", "--retries", "1", "--timeout", "8", "--require-hashes",
                "--only-binary=:all:", "--dest", folder, "-r", str(asked)]  # fmt: skip
        try:
            call(argv, timeout_s_of_pip)
        except Refused:
            return False
    return True


def build(
    path: str, tag: str, version: str, wheel: str, pip: str, carried: bool, stall_s_of_pip: float,
    total_s_of_pip: float,
) -> Facts:  # fmt: skip
    """Make an environment, check it, and let `current` point to it; take a half one away if that fails."""
    root = Path(path).absolute()
    environment = root / "envs" / tag
    with turn(root):
        before = current(root)
        # Somebody else may have been quicker.
        is_new = not (environment / WHOLE).is_file()
        if is_new:
            for half in (root / "envs").iterdir():
                if not (half / WHOLE).is_file():
                    shutil.rmtree(half)
            try:
                _fill(root, environment, wheel, pip, carried, stall_s_of_pip, total_s_of_pip)
                check(environment, version)
                write(environment / WHOLE, {"version": version, "wheel": wheel, "python": sys.version})
            except BaseException:
                shutil.rmtree(environment, ignore_errors=True)
                raise
        _point(root, tag)
        others = [each for each in whole(root) if each != tag]
        # The one that ran before is the one to go back to; where none did, the newest stays all the same.
        previous = before if before in others else None
        kept = previous or (others[-1] if others else None)
        for other in others:
            if other != kept:
                _remove_environment(root, other)
        return {"previous": previous, "is_new": is_new}


def _fill(
    root: Path, environment: Path, wheel: str, pip: str, carried: bool, stall_s: float, total_s: float
) -> None:
    venv = [sys.executable, "-m", "venv", "--without-pip", str(environment)]
    call(venv, 60)
    own = root / "carried"
    arriero = own / "arriero.txt"
    arriero.write_text(f"{own / wheel} --hash=sha256:{sha256_of(own / wheel)}\n")
    # What came from the index before a connection broke need not come again.
    cache, scratch = own / "cache", environment / "scratch"
    scratch.mkdir()
    where = ["--cache-dir", str(cache), "--retries", "3", "--timeout", "30"]
    if carried:
        where = ["--no-cache-dir", "--no-index", "--find-links", str(own / "wheels")]
    isolated = ["--isolated"] if carried else []
    argv = [str(environment / "bin" / "python"), str(own / pip / "pip"), *isolated, "install", "--no-deps",
            *where, *PIP, "--require-hashes", "--only-binary=:all:", "--no-compile",
            "--no-warn-script-location", "-r", str(own / "runtime.txt"), "-r", str(arriero)]  # fmt: skip
    call(argv, stall_s, PipWatch(environment, scratch), total_s=total_s, env={"TMPDIR": str(scratch)})
    shutil.rmtree(scratch)
    shutil.rmtree(cache, ignore_errors=True)


class PipWatch(Watch):
    """Tells how far pip is: how many packages it has got hold of, and how many are in place.

    What is on its way lies in `scratch`.
    """

    def __init__(self, environment: Path, scratch: Path) -> None:
        self._environment = environment
        self._scratch = scratch
        self._size = 0
        self._line = b""
        self._gathered = 0
        self._package = ""
        self._told = (0, 0)
        self._look_s = 0.0

    def hear(self, piece: bytes) -> None:
        """Take what pip says."""
        *lines, rest = (self._line + piece).split(b"\n")
        self._line = rest[-4096:]
        for line in lines:
            package = package_begun(line.decode("utf-8", "replace"))
            if package:
                self._gathered += 1
                self._package = package

    def look(self) -> bool:
        """Count what is in place, and what is on its way: pip says nothing of either."""
        now_s = time.monotonic()
        if now_s < self._look_s:
            return False
        self._look_s = now_s + TELL_EVERY_S
        before, self._size = self._size, _size_below(self._scratch)
        installed = sum(1 for _ in self._environment.glob("lib/python*/site-packages/*.dist-info/RECORD"))
        if self._told != (self._gathered, installed):
            self._told = (self._gathered, installed)
            tell({"gathered": self._gathered, "installed": installed, "package": self._package})
            return True
        return self._size != before


def _size_below(folder: Path) -> int:
    size = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += Path(base, name).lstat().st_size
    return size


def package_begun(line: str) -> str:
    """Return the package that pip says it begins with; empty if it says something else."""
    word, _, rest = line.strip().partition(" ")
    if word not in _BEGINS or not rest:
        return ""
    # "Collecting rich-click==1.9.9 (from -r …)", "Processing /some/where/rich_click-1.9.9-py3-none-any.whl".
    name = rest.split(" ")[0].rsplit("/", 1)[-1]
    return re.split("[=<>~!;]" if word == "Collecting" else "-", name, maxsplit=1)[0]


def check(environment: Path, version: str) -> None:
    """Know that an environment runs, and what.  Raises INSTALL_FAILED."""
    argv = [str(environment / "bin" / "python"), "-m", "arriero", "version", "--json"]
    said = call(argv, 60)
    found = json.loads(said.strip().splitlines()[-1])["version"]
    if found != version:
        raise Refused("INSTALL_FAILED", f"the new environment has arriero {found} instead of {version}")


def _point(root: Path, tag: str) -> None:
    if current(root) == tag:
        return
    fresh = root / f".current.{os.getpid()}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(Path("envs") / tag)
    fresh.replace(root / "current")


def _remove_environment(root: Path, tag: str) -> None:
    environment = root / "envs" / tag
    # The mark first: what is left when this is cut short is half, and taken away by the next one.
    (environment / WHOLE).unlink(missing_ok=True)
    shutil.rmtree(environment, ignore_errors=True)


def undo(path: str, drop: str, keeps_home: bool) -> Facts:
    """Take away what an installation left, and the environment `drop`, unless something else is installed.

    The agent's home stays where it was there before: models may be in it.
    """
    root = Path(path).absolute()
    if not (root / MARKER).is_file():
        return {"is_clean": not root.exists()}
    with turn(root):
        if drop:
            _remove_environment(root, drop)
        for half in (root / "envs").glob("*"):
            if not (half / WHOLE).is_file():
                shutil.rmtree(half, ignore_errors=True)
        if not whole(root):
            (root / "current").unlink(missing_ok=True)
            if not (keeps_home and (root / "home").exists()):
                remove_all(root)
    return {"is_clean": not root.exists()}


def switch(path: str, tag: str, drop: str) -> Facts:
    """Let `current` point to an environment that is there, and take another one away."""
    root = Path(path).absolute()
    if not (root / MARKER).is_file():
        raise Refused("INSTALL_FAILED", "arriero is not installed there", last_lines=[])
    with turn(root):
        if tag not in whole(root):
            raise Refused("INSTALL_FAILED", f"the environment {tag} is not there any more", last_lines=[])
        _point(root, tag)
        if drop and drop != tag:
            _remove_environment(root, drop)
    return {"current": current(root)}


def remove_all(root: Path) -> None:
    """Remove everything of ours, and the folders we made for it where nothing else is in them."""
    known = read(root / MARKER)
    # Another installation of this user may rely on it.
    if known.get("lingers") and not list(units().glob("arriero-agent-*.service")):
        quiet(["loginctl", "disable-linger"])
    (root / "current").unlink(missing_ok=True)
    for name in ("envs", "home", "carried"):
        shutil.rmtree(root / name, ignore_errors=True)
        if (root / name).exists():
            shutil.rmtree(root / name)
    for name in (".lock", MARKER):
        (root / name).unlink(missing_ok=True)
    for made in (known.get("made", []), known.get("elsewhere", [])):
        with contextlib.suppress(OSError):
            for folder in made:
                Path(folder).rmdir()
    # Where the user's daemons have their sockets; others may have some there.
    for base in {os.environ.get("XDG_RUNTIME_DIR") or "/tmp", "/tmp"}:
        with contextlib.suppress(OSError):
            (Path(base) / f"arriero-{os.getuid()}").rmdir()


ACTIONS: dict[str, Any] = {
    "prepare": prepare,
    "held": held,
    "index": index,
    "build": build,
    "undo": undo,
    "switch": switch,
}
