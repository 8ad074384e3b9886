"""What is the address of a machine, and what can be done there?  (The interface of every fabric.)

Strings of people end here: a `NodeAddress` that exists holds nothing that a shell, an option parser
or a terminal could take for something else.
"""

import ipaddress
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, Protocol, TypeAlias
from urllib.parse import quote

from arriero.contracts.errors import ArrieroError, ErrorCode, fail

ACCEPTED_FORMS: Final = "host, user@host, user@host:port, ssh://user@host:port, ssh://user@[::1]:2222"
ADDRESS_LENGTH_MAX: Final = 512
#: Below the home of the user there.
INSTALL_PATH: Final = ".local/share/arriero"
#: So much of a command's standard output (its beginning) and of its errors (their end) is kept.
OUTPUT_BYTES_MAX: Final = 1024 * 1024

# Fullmatch only: `$` would let a line break follow.
_USER: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_HOST: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}")
_ZONE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
_PORT: Final = re.compile(r"[0-9]{1,5}")
_FINGERPRINT: Final = re.compile(r"SHA256:[A-Za-z0-9+/]{43}")
_TARGET: Final = re.compile(
    r"(?:(?P<user>[^@:/\[\]]*)@)?(?:\[(?P<bracketed>[^\[\]]*)\]|(?P<host>[^@:/\[\]]*))(?::(?P<port>.*))?",
    re.DOTALL,
)
# No spaces: a script's first line names its Python below this path, and ends at the first space.  The
# length as well: systems cut that line, the shortest of them after 127 bytes.
_INSTALL_PATH: Final = re.compile(r"/?[A-Za-z0-9_.][A-Za-z0-9_.+-]*(/[A-Za-z0-9_.][A-Za-z0-9_.+-]*)*")
INSTALL_PATH_LENGTH_MAX: Final = 96
KEY_PATH_LENGTH_MAX: Final = 4096


@dataclass(frozen=True, slots=True)
class NodeAddress:
    """Where a machine's SSH server is, who logs in, and where our installation lies there.

    Making one raises INVALID_REQUEST (with the accepted forms) if any part is not well formed.
    """

    #: A name, an alias of ~/.ssh/config, or an IP address; an IPv6 one without its brackets.
    host: str
    #: None: what ~/.ssh/config says, else 22.
    port: int | None = None
    #: None: what ~/.ssh/config says, else the name of the user here.
    user: str | None = None
    #: A private key's file on this machine; None: those of ~/.ssh/config, the agent and the defaults.
    key_path: str | None = None
    #: The host key's SHA-256 as `ssh-keygen -l` prints it; None: known_hosts alone decides.
    host_key: str | None = None
    #: A folder there, absolute or below the user's home.
    install_path: str = INSTALL_PATH

    def __post_init__(self) -> None:
        problem = _problem(self.host, self.port, self.user)
        if problem:
            _refuse(str(self), problem)
        key_path = self.key_path
        if key_path is not None and not (
            0 < len(key_path) <= KEY_PATH_LENGTH_MAX and key_path.isprintable() and key_path[0] in "/~."
        ):
            _refuse_part(
                key_path, "is no private key's path: it begins with none of / ~ . or is not printable"
            )
        if self.host_key is not None and not _FINGERPRINT.fullmatch(self.host_key):
            _refuse_part(
                self.host_key,
                "is no fingerprint of a host key: SHA256: and 43 letters, digits, + and /, as "
                "`ssh-keygen -l` prints it",
            )
        if (
            not _INSTALL_PATH.fullmatch(self.install_path)
            or len(self.install_path) > INSTALL_PATH_LENGTH_MAX
            or {".", ".."} & set(self.install_path.split("/"))
        ):
            _refuse_part(
                self.install_path,
                "is no install path: letters, digits and ._+- between slashes, at most "
                f"{INSTALL_PATH_LENGTH_MAX}; without a slash at its beginning it lies below the home there",
            )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (f"{self.user}@" if self.user else "") + host + (f":{self.port}" if self.port else "")

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        key_path: str | None = None,
        host_key: str | None = None,
        install_path: str = INSTALL_PATH,
    ) -> "NodeAddress":
        """Return the address that a person wrote.  Raises INVALID_REQUEST with the accepted forms."""
        if not text or len(text) > ADDRESS_LENGTH_MAX:
            _refuse(text, f"empty, or longer than {ADDRESS_LENGTH_MAX} characters")
        found = _TARGET.fullmatch(text.removeprefix("ssh://"))
        if found is None:
            _refuse(text, "unknown form (an IPv6 address needs its brackets)")
        port = found["port"]
        bracketed = found["bracketed"]
        if port is not None and not _PORT.fullmatch(port):
            is_bare = bracketed is None and _is_ipv6(f"{found['host']}:{port}")
            _refuse(text, "an IPv6 address needs its brackets" if is_bare else "the port is no number")
        if bracketed is not None and not _is_ipv6(bracketed):
            _refuse(text, "no IPv6 address between the brackets")
        host = bracketed if bracketed is not None else found["host"]
        number = None if port is None else int(port)
        problem = _problem(host, number, found["user"])
        if problem:
            # The whole of it, as it was given.
            _refuse(text, problem)
        return cls(host, number, found["user"], key_path, host_key, install_path)


def _problem(host: str, port: int | None, user: str | None) -> str:
    """Return why there is no such address; empty if there may be."""
    if not (_is_ipv6(host) or (_HOST.fullmatch(host) and ".." not in host)):
        return "the host is no name and no IP address"
    if user is not None and not _USER.fullmatch(user):
        return "the user is no plain name"
    if port is not None and not 1 <= port <= 65535:
        return "the port is not from 1 to 65535"
    return ""


def _is_ipv6(text: str) -> bool:
    address, percent, zone = text.partition("%")
    if percent and not _ZONE.fullmatch(zone):
        return False
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return True


def _shown(text: str) -> str:
    # Percent signs for all that could turn a terminal's line around.
    return "".join(c if " " <= c <= "~" else quote(c, safe="", errors="backslashreplace") for c in text[:80])


def _refuse_part(text: str, why: str) -> NoReturn:
    fail(ErrorCode.INVALID_REQUEST, f"'{_shown(text)}' {why}")


def _refuse(text: str, why: str) -> NoReturn:
    shown = _shown(text)
    fail(
        ErrorCode.INVALID_REQUEST,
        f"'{shown}' is no address of a machine: {why}. Accepted: {ACCEPTED_FORMS}",
        address=shown,
        accepted=ACCEPTED_FORMS,
    )


@dataclass(frozen=True, slots=True)
class Completed:
    """What a command that ended left."""

    #: As a shell tells it: 128 and the signal's number where a signal ended it.
    exit_code: int
    #: The beginning.
    stdout: bytes
    #: The end.
    stderr: bytes
    #: Whether there was more than is kept here.
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class SocketPath:
    """A unix socket of this machine."""

    path: Path


@dataclass(frozen=True, slots=True)
class HostPort:
    """A loopback port of this machine."""

    host: str
    port: int


#: What HTTP to a port of a machine is sent to here.
LocalEnd: TypeAlias = SocketPath | HostPort


class Connection(Protocol):
    """One machine, reached.  Every method raises NODE_UNREACHABLE once the connection is gone.

    Paths that do not begin with a slash lie below the home of the user there.
    """

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float,
        may_fail: bool = False,
        output_bytes_max: int = OUTPUT_BYTES_MAX,
        on_line: Callable[[bytes], None] | None = None,
    ) -> Completed:
        """Run a program there, without a terminal, and wait until it has ended.

        `on_line` hears each line of its standard output as it comes, without the line's end.

        What is secret goes through `stdin`: everybody on a machine can read arguments and, often,
        environments.  Raises SSH_COMMAND_FAILED (exit code and the end of its errors in the details) if
        it exits with another code than 0, unless it `may_fail`; and, in any case, if it does not end
        within `timeout_s`: then it and its process group are ended.
        """
        ...

    async def put(
        self, content: bytes | Path, remote_path: str, *, mode: int,
        on_sent: Callable[[int], None] | None = None,
    ) -> None:  # fmt: skip
        """Write a file there: whole, under its name at once, or not at all.  Its folder must be there.

        `on_sent` hears, piece by piece, how many bytes of it are there.

        Raises SSH_COMMAND_FAILED, INSUFFICIENT_DISK.
        """
        ...

    async def read(self, remote_path: str, *, bytes_max: int) -> bytes:
        """Return a file's content.  Raises NOT_FOUND; SSH_COMMAND_FAILED if it is larger."""
        ...

    async def forward(self, remote_port: int) -> LocalEnd:
        """Return the local end for a loopback port there; the same one each time it is asked for.

        The machine is not asked.  Raises STATE_DIR_UNUSABLE if this machine has no place for a socket.
        """
        ...

    async def check_port(self, remote_port: int) -> None:
        """Know that the machine lets a loopback port there be spoken to, whether anything listens or not.

        Raises SSH_COMMAND_FAILED if it does not.
        """
        ...

    async def unforward(self, remote_port: int) -> None:
        """Close a port's local end; connections that are open stay.  Safe to call twice."""
        ...

    async def expose(self, end: LocalEnd) -> int:
        """Return a loopback port *there* that leads to `end` here; the same one each time it is asked for.

        Every user of that machine can reach it: what answers at `end` must ask who they are.  Raises
        SSH_COMMAND_FAILED if the machine does not allow it.
        """
        ...

    async def unexpose(self, end: LocalEnd) -> None:
        """Close an end's port there; connections that are open stay.  Safe to call twice."""
        ...

    async def closed(self) -> str:
        """Wait until the connection is gone; return why."""
        ...

    async def aclose(self) -> None:
        """End the connection.  Safe to call twice."""
        ...


#: Hears why an attempt failed.
OnRetry: TypeAlias = Callable[[ArrieroError], None]
#: Hears that the machine said something.
OnHeard: TypeAlias = Callable[[], None]


class Fabric(Protocol):
    """A way to reach machines."""

    async def connect(
        self, address: NodeAddress, on_retry: OnRetry | None = None, on_heard: OnHeard | None = None
    ) -> Connection:
        """Return a connection to a machine; `on_retry` hears why an attempt failed that another one follows.

        `on_heard` hears all that comes from the machine itself until we are logged in.
        Raises NODE_UNREACHABLE, SSH_KEY_UNUSABLE, SSH_AUTH_FAILED, SSH_HOST_KEY_UNKNOWN,
        SSH_HOST_KEY_CHANGED.
        """
        ...
