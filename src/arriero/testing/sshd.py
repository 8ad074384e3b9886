"""How does a test get a real OpenSSH server, with keys and a configuration of its own?

`with SshServer(folder) as server:` listens on a free loopback port and lets the user of the test in
with `server.key`.  Everything of it lies in `folder`; its processes are ended with it.
"""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import asyncssh
import psutil

READY_TIMEOUT_S: Final = 60.0
ENDED_TIMEOUT_S: Final = 60.0
DEFAULT_PORT: Final = 22
#: Somebody else may take the free port first.
STARTS_MAX: Final = 5
#: Where the server's unprivileged half lives; a package makes it when a system boots.
_PRIVILEGE_DIR: Final = Path("/run/sshd")
# Each test logs in and fails as it likes; servers from 9.8 on would shut the door after a few failures.
_NO_PENALTIES: Final = "PerSourcePenalties no\n"


def sshd_path() -> str | None:
    """Return where the server's program is; None if it is not installed."""
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server listens and lives, if not on a free port of this machine's loopback."""

    address: str
    port: int
    #: What runs a program there; it has the server as its child, or becomes it.
    enter: tuple[str, ...]
    #: The server's folder as it is called there.
    folder: Path
    #: The commands that run there get these.
    env: tuple[str, ...]


class SshServer:
    """One server; `host_key_types` as asyncssh names them; `env` is what commands there find set."""

    def __init__(
        self,
        folder: Path,
        *,
        host_key_types: Sequence[str] = ("ssh-ed25519",),
        more_config: str = "",
        env: Mapping[str, str] | None = None,
        place: Place | None = None,
    ) -> None:
        self.folder = folder
        self.user = getpass.getuser()
        self.address = place.address if place is not None else "127.0.0.1"
        self.port = place.port if place is not None else 0
        #: A private key that is let in, and one that is not.
        self.key = folder / "key"
        self.wrong_key = folder / "wrong_key"
        self.log = folder / "sshd.log"
        #: $HOME of what runs there; commands and files without a path begin in the user's own home.
        self.home = folder / "home"
        self._host_key_types = tuple(host_key_types)
        self._more_config = more_config
        # What the user's own shell does at its start is nothing for tests.
        self._place = place or Place("127.0.0.1", 0, (), folder, (f"HOME={self.home}",))
        # One line for all: of several, sshd takes the first alone.
        self._env = [*self._place.env, *(f"{name}={value}" for name, value in (env or {}).items())]
        self._process: subprocess.Popen[bytes] | None = None
        self._host_keys: dict[str, asyncssh.SSHKey] = {}

    def __enter__(self) -> "SshServer":
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._place.enter:
            self.home.mkdir(exist_ok=True)
        _new_key("ssh-ed25519", self.wrong_key)
        public = _new_key("ssh-ed25519", self.key).export_public_key()
        (self.folder / "authorized_keys").write_bytes(public)
        self.renew_host_keys(self._host_key_types)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    # --- What tests read -----------------------------------------------------------------

    @property
    def target(self) -> str:
        """Its address, as a person gives it."""
        return f"{self.user}@{self.address}:{self.port}"

    def fingerprint(self, key_type: str = "ssh-ed25519") -> str:
        """Return the SHA-256 of one of its host keys."""
        return self._host_keys[key_type].get_fingerprint()

    def known_hosts_line(self, key_type: str = "ssh-ed25519") -> str:
        """Return what known_hosts holds of it."""
        public = self._host_keys[key_type].export_public_key().decode().strip()
        name = self.address if self.port == DEFAULT_PORT else f"[{self.address}]:{self.port}"
        return f"{name} {public}\n"

    def processes(self) -> list[psutil.Process]:
        """Return the server and the processes of its connections, the commands that run in them too."""
        assert self._process is not None
        try:
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def is_listener(self, process: psutil.Process) -> bool:
        """Return whether a process is the server itself, and not one of its connections."""
        assert self._process is not None
        # What enters a place stays, as the server's parent.
        return (process.ppid() if self._place.enter else process.pid) == self._process.pid

    # --- What tests do to it -------------------------------------------------------------

    def renew_host_keys(self, key_types: Sequence[str]) -> None:
        """Give it other host keys, from its next start on."""
        for key_type in self._host_keys:
            self._host_key_file(key_type).unlink()
        self._host_keys = {kind: _new_key(kind, self._host_key_file(kind)) for kind in key_types}

    def start(self) -> None:
        """Start it and wait until it listens, on the port it had before if there was one."""
        program = sshd_path()
        assert program is not None, "sshd is not installed"
        if os.getuid() == 0 and not self._place.enter:
            _PRIVILEGE_DIR.mkdir(mode=0o755, exist_ok=True)
        for _ in range(1 if self.port else STARTS_MAX):
            port = self.port or _free_port()
            self._write_config(program, port)
            with self.log.open("wb") as log:
                # It starts itself anew for each connection, so it wants its whole path.
                self._process = subprocess.Popen(
                    [*self._place.enter, program, "-D", "-e", "-f", self._there("sshd_config")],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            if self._listens():
                self.port = port
                return
            self.kill()
        raise AssertionError(f"sshd did not start: {self.log.read_text('utf-8', 'replace')}")

    def kill(self) -> None:
        """End it and all of its connections at once; nothing if it does not run."""
        if self._process is None:
            return
        # The parent first, so that it starts nothing more.
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(ENDED_TIMEOUT_S)
        self._process = None

    def restart(self) -> None:
        """End it and its connections as a restart does: what was started through them goes on."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name().startswith("sshd"):
                    process.kill()
        assert self._process is not None
        self._process.wait(ENDED_TIMEOUT_S)
        self._process = None
        self.start()

    def suspend(self) -> None:
        """Let it, and all of its connections, answer nothing any more, as a machine that hangs."""
        for process in self.processes():
            process.suspend()

    # --- Its start -----------------------------------------------------------------------

    def _host_key_file(self, key_type: str) -> Path:
        return self.folder / f"host_{key_type}"

    def _there(self, name: str) -> str:
        return str(self._place.folder / name)

    def _write_config(self, program: str, port: int) -> None:
        path = self.folder / "sshd_config"
        lines = [
            f"Port {port}",
            f"ListenAddress {self.address}",
            *(f'HostKey "{self._there(self._host_key_file(kind).name)}"' for kind in self._host_keys),
            f'AuthorizedKeysFile "{self._there("authorized_keys")}"',
            "PidFile none",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "UsePAM no",
            # Temporary folders are often others' to write.
            "StrictModes no",
            "UseDNS no",
            "MaxStartups 1000",
            "Subsystem sftp internal-sftp",
            "SetEnv " + " ".join(f'"{each}"' for each in self._env),
            self._more_config,
            # Of several words on a matter, the first one counts: a test may want to read more.
            "LogLevel INFO",
        ]
        plain = "\n".join(lines) + "\n"
        path.write_text(plain + _NO_PENALTIES, "utf-8")
        check = [*self._place.enter, program, "-t", "-f", self._there(path.name)]
        if subprocess.run(check, capture_output=True, check=False).returncode:
            path.write_text(plain, "utf-8")

    def _listens(self) -> bool:
        assert self._process is not None
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if b"Server listening on" in self.log.read_bytes():
                return True
            time.sleep(0.01)
        return False


def _new_key(key_type: str, path: Path) -> asyncssh.SSHKey:
    key = asyncssh.generate_private_key(key_type)
    path.write_bytes(key.export_private_key())
    path.chmod(0o600)
    return key


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
