"""How is a machine made within this one, with processes, a network and a home of its own?  (Linux, root)

A first process holds all of it.  It ends when its standard input does, so also when whoever made it is
killed; the kernel then ends every other process there and takes away mounts and links: nothing has
to be swept up.
"""

import contextlib
import errno
import os
import pwd
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil

READY_TIMEOUT_S: Final = 60.0
#: Each link takes four addresses of 10.213.0.0/16, by its number.
LINKS: Final = 1 << 14
#: The name of the link within.
INTERFACE: Final = "eth0"
#: The place of the folder `run` within; nothing of this machine's /run is seen there.
RUN: Final = Path("/run")
_UNSHARE: Final = ("unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child")
# Paths below the current folder are still found once /tmp, where it may lie, is another one.
# Children that nobody waits for are reaped by the kernel, as SIGCHLD is ignored.
_FIRST: Final = """
set -e
mount --bind etc/passwd /etc/passwd
for hidden in /etc/pip.conf /etc/xdg/pip/pip.conf; do
  test ! -f "$hidden" || mount --bind /dev/null "$hidden"
done
mount -t tmpfs tmpfs /dev/shm
mount --bind var_tmp /var/tmp
mount --bind run /run
mount --bind tmp /tmp
mount -t proc proc /proc
echo "$1" > /proc/sys/kernel/hostname
ip link set lo up
echo ready
exec env --ignore-signal=CHLD cat
"""


class Namespace:
    """One machine.  Used as `with Namespace(folder, "attic") as machine`; what it writes lies in `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        #: $HOME of root there, as it is called here, and as it is called there.
        self.home = folder / "run/home"
        self.home_there = RUN / "home"
        #: Its own programs, found before all others; and /tmp.
        self.bin = folder / "run/bin"
        self.tmp = folder / "tmp"
        #: Its end of the link to this machine, and this machine's end.
        self.address = ""
        self.gateway = ""
        self._link = ""
        self._unshare: subprocess.Popen[str] | None = None
        self._first: psutil.Process | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
            self._connect()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- What is done in it --------------------------------------------------------------

    @property
    def enter(self) -> tuple[str, ...]:
        """What stands before a program's name and arguments to run it there."""
        assert self._first is not None, "used outside of its `with`"
        kinds = ("--net", "--mount", "--pid", "--uts", "--ipc")
        return ("nsenter", "--target", str(self._first.pid), *kinds, "--", "env", "-i", *self.env)

    @property
    def env(self) -> tuple[str, ...]:
        """The environment of programs there."""
        path = f"{RUN / 'bin'}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return (f"HOME={self.home_there}", f"PATH={path}")

    def run(
        self, argv: Sequence[str], *, stdin: str = "", timeout_s: float = 30.0, may_fail: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a program there to its end.  Raises AssertionError with its errors, unless it `may_fail`."""
        done = subprocess.run(
            [*self.enter, *argv],
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
        assert may_fail or done.returncode == 0, f"{argv} in {self.name}: {done.returncode} {done.stderr}"
        return done

    def processes(self) -> list[psutil.Process]:
        """Return all that run there but the first, with the pids that they have here."""
        assert self._first is not None, "used outside of its `with`"
        wanted = _namespace_of(self._first.pid)
        return [
            process
            for process in psutil.process_iter()
            if process.pid != self._first.pid and _namespace_of(process.pid) == wanted
        ]

    def hide(self, *paths: str) -> None:
        """Let files be empty and useless there, folders empty; those that are not there stay so."""
        for path in paths:
            if Path(path).is_dir():
                self.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", path])
            elif Path(path).exists():
                self.run(["mount", "--bind", "/dev/null", path])

    def close(self) -> None:
        """End it, and every process in it.  Safe to call twice."""
        if self._link:
            subprocess.run(["ip", "link", "del", self._link], capture_output=True, check=False)
            self._link = ""
        if self._unshare is not None:
            assert self._unshare.stdin is not None and self._unshare.stdout is not None
            self._unshare.stdin.close()
            try:
                # It waits for the first process, and that, in the kernel, for all others.
                self._unshare.wait(READY_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._unshare.kill()
                self._unshare.wait()
            self._unshare.stdout.close()
            self._unshare = None

    # --- Its start -----------------------------------------------------------------------

    def _start(self) -> None:
        for folder in ("etc", "var_tmp", "tmp", "run/user", "run/sshd", "run/home", "run/bin"):
            (self.folder / folder).mkdir(mode=0o755, parents=True)
        for folder in ("tmp", "var_tmp"):
            (self.folder / folder).chmod(0o1777)
        self.home.chmod(0o700)
        (self.folder / "etc/passwd").write_text("".join(self._passwd()))
        # The one of the system may be too old, or there may be none.
        (self.bin / "python3").symlink_to(Path(sys.base_prefix) / "bin/python3")
        self._unshare = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", _FIRST, "sh", self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            start_new_session=True,
        )
        assert self._unshare.stdout is not None
        said = self._unshare.stdout.readline()
        if said != "ready\n":
            raise OSError(errno.EPERM, f"no namespace: {(said + self._unshare.stdout.read()).strip()}")
        (self._first,) = psutil.Process(self._unshare.pid).children()

    def _passwd(self) -> Iterator[str]:
        """Yield the users of this machine, root with its home there."""
        for user in pwd.getpwall():
            home = str(self.home_there) if user.pw_uid == 0 else user.pw_dir
            fields = (user.pw_name, "x", user.pw_uid, user.pw_gid, user.pw_gecos, home, user.pw_shell)
            yield ":".join(map(str, fields)) + "\n"

    def _connect(self) -> None:
        """Make the link.  Its name is its number, which the kernel gives to one of us alone."""
        assert self._first is not None
        first = random.randrange(LINKS)
        for number in range(first, first + LINKS):
            link = f"arrhost{number % LINKS}"
            made = _ip(
                "link", "add", link, "type", "veth", "peer", "name", INTERFACE, "netns", str(self._first.pid)
            )
            if made.returncode == 0:
                break
            if "File exists" not in made.stderr:
                raise OSError(errno.EPERM, f"no link: {made.stderr.strip()}")
        self._link = link
        high, low = divmod(4 * (number % LINKS), 256)
        self.gateway = f"10.213.{high}.{low + 1}"
        self.address = f"10.213.{high}.{low + 2}"
        for command in (
            ["addr", "add", f"{self.gateway}/30", "dev", link],
            ["link", "set", link, "up"],
        ):
            done = _ip(*command)
            if done.returncode:
                raise OSError(errno.EPERM, f"ip {' '.join(command)}: {done.stderr.strip()}")
        self.run(["ip", "addr", "add", f"{self.address}/30", "dev", INTERFACE])
        self.run(["ip", "link", "set", INTERFACE, "up"])


def why_not(folder: Path) -> str | None:
    """Return why no `Namespace` with faults can be made here, by making one in `folder`; None if it can."""
    if not sys.platform.startswith("linux"):
        return "namespaces are Linux's"
    if os.getuid() != 0:
        return "only root makes network namespaces"
    for program, package in (
        ("ip", "iproute2"), ("ss", "iproute2"), ("nft", "nftables"), ("unshare", "util-linux"),
    ):  # fmt: skip
        if shutil.which(program) is None:
            return f"{program} is not in PATH ({package})"
    try:
        with Namespace(folder, "trial") as machine:
            machine.run(["nft", "-f", "-"], stdin="table inet trial\n")
    except (OSError, AssertionError) as error:
        return f"no rights to make a network namespace here: {error}"
    return None


def _ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


def _namespace_of(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/pid")  # noqa: PTH115 - It is no path that leads anywhere.
    return None
