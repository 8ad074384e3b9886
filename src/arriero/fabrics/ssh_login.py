"""Who answers at that address, may we trust it, and does it let us in?  (One attempt.)"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import asyncssh
from asyncssh.packet import SSHPacket

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.fabrics.base import NodeAddress, OnHeard
from arriero.fabrics.ssh import KEY_OPTION
from arriero.fabrics.ssh_connection import Gone, SshConnection, reason_of
from arriero.fabrics.ssh_dial import Names
from arriero.fabrics.ssh_heard import hear, hear_no_more
from arriero.fabrics.ssh_key_first import show_key_first
from arriero.fabrics.ssh_way import (
    NO_KNOWN_HOSTS,
    configured,
    connect_over,
    known_hosts_of,
    open_way,
)
from arriero.runtime.entropy import Entropy

#: Kinds of host keys and the algorithms they sign with, the first ones preferred, as OpenSSH does.
KINDS: Final[dict[str, tuple[str, ...]]] = {
    "ssh-ed25519": ("ssh-ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa-sha2-nistp256",),
    "ecdsa-sha2-nistp384": ("ecdsa-sha2-nistp384",),
    "ecdsa-sha2-nistp521": ("ecdsa-sha2-nistp521",),
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}


@dataclass(frozen=True, slots=True)
class Presented:
    """The host key that a server showed and that nothing vouches for."""

    key: asyncssh.SSHKey
    #: As known_hosts calls it.
    host: str
    ip_address: str
    port: int
    #: Algorithms of all the host keys that the machine has.
    offered: Sequence[str]

    @property
    def fingerprint(self) -> str:
        """Its SHA-256, as `ssh-keygen -l` prints it."""
        return self.key.get_fingerprint()

    @property
    def key_type(self) -> str:
        """Its algorithm's name."""
        return self.key.get_algorithm()

    @property
    def short_type(self) -> str:
        """Its kind, as OpenSSH names files after it."""
        return self.key_type.removeprefix("ssh-").partition("-")[0]


class _Client(asyncssh.SSHClient):
    """Decides on host keys that known_hosts does not hold, and tells when the connection is gone."""

    def __init__(self, address: NodeAddress, gone: Gone, on_heard: OnHeard | None) -> None:
        self._on_heard = on_heard
        self._pinned = address.host_key
        self._is_key_given = address.key_path is not None
        self._gone = gone
        self._connection: asyncssh.SSHClientConnection | None = None
        self.presented: Presented | None = None

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        """Know whose the login is, and hear what comes."""
        self._connection = conn
        if self._on_heard is not None:
            hear(conn, self._on_heard)

    def begin_auth(self, username: str) -> None:
        """Show the key that was given for the machine, before anything is asked."""
        if self._is_key_given and self._connection is not None:
            show_key_first(self._connection)

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Return whether the key is the pinned one."""
        if self._pinned is not None and key.get_fingerprint() == self._pinned:
            return True
        assert self._connection is not None
        self.presented = Presented(key, host, addr, port, _offered(self._connection))
        return False

    def auth_completed(self) -> None:
        """Hear no more."""
        if self._connection is not None:
            hear_no_more(self._connection)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell why the connection is gone."""
        self._gone.tell("closed" if exc is None else reason_of(exc))


def _offered(connection: asyncssh.SSHClientConnection) -> Sequence[str]:
    # Both versions and both sides' lists, as they are signed; in the last one, after 17 bytes, the names
    # of key exchanges come before those of host keys (RFC 4253, 7.1).
    said = SSHPacket(connection.get_hash_prefix())
    *_, theirs = (said.get_string() for _ in range(4))
    lists = SSHPacket(theirs[17:])
    lists.get_namelist()
    return [name.decode("ascii", "replace") for name in lists.get_namelist()]


async def log_in(
    address: NodeAddress,
    *,
    entropy: Entropy,
    sockets_dir: Path,
    timeout_s: float,
    names: Names,
    on_heard: OnHeard | None = None,
) -> SshConnection:
    """Return a connection that is logged in.  `on_heard` hears what comes from the machine until then.

    Raises SSH_HOST_KEY_UNKNOWN, SSH_HOST_KEY_CHANGED, SSH_KEY_UNUSABLE, SSH_AUTH_FAILED, NODE_UNREACHABLE,
    INVALID_SETTINGS.
    """
    try:
        async with asyncio.timeout(timeout_s):
            trust = await asyncio.to_thread(_Trust, address)
            connection, gone = await _trusted(address, trust, names, on_heard)
    except TimeoutError as error:
        raise _unreachable(address, f"no login within {timeout_s:g} s") from error
    except (asyncssh.Error, OSError, ValueError, RuntimeError) as error:
        raise _explained(address, error) from error
    return SshConnection(connection, gone, entropy, name=str(address), sockets_dir=sockets_dir)


class _Trust:
    """Which host keys are trusted, as far as it is known without asking the machine; reads files."""

    def __init__(self, address: NodeAddress) -> None:
        self.pinned = address.host_key
        self.known_hosts: Any = NO_KNOWN_HOSTS
        self._preferred: list[str] = []
        if self.pinned is None:
            options = configured(address)
            self.known_hosts = known_hosts_of(options)
            keys, authorities = self._match(options.host_key_alias or options.host, "", options.port)
            certificates = [f"{name}-cert-v01@openssh.com" for kind in KINDS for name in KINDS[kind]]
            self._preferred = [*(certificates if authorities else []), *_algorithms(keys)]

    def algorithms(self) -> list[str]:
        """Return what to ask for first: the kinds that are known, then the others as people prefer them."""
        return list(dict.fromkeys([*self._preferred, *_algorithms(list(KINDS))]))

    def expected(self, presented: Presented, tried: Sequence[str]) -> list[str]:
        """Return, blocking, what else the machine can show that may be trusted."""
        kinds = list(KINDS) if self.pinned is not None else self.known_kinds(presented)
        others = _algorithms([kind for kind in kinds if kind not in tried])
        return [name for name in others if name in presented.offered]

    def known_kinds(self, presented: Presented) -> list[str]:
        """Return, blocking, the kinds of keys that known_hosts has for the machine that showed one."""
        return self._match(presented.host, presented.ip_address, presented.port)[0]

    def _match(self, host: str, ip_address: str, port: int) -> tuple[list[str], bool]:
        other_port = None if port == asyncssh.DEFAULT_PORT else port
        found = asyncssh.match_known_hosts(self.known_hosts, host, ip_address, other_port)
        return [key.get_algorithm() for key in found[0]], bool(found[1])


async def _trusted(
    address: NodeAddress, trust: _Trust, names: Names, on_heard: OnHeard | None
) -> "_LoggedIn":
    first: Presented | None = None
    tried: list[str] = []
    algorithms = trust.algorithms()
    while True:
        try:
            return await _open(address, trust, algorithms, names, on_heard)
        except _NotTrusted as error:
            # A machine has keys of several kinds; the one that is trusted need not be shown first.
            first = first or error.presented
            tried.append(error.presented.key_type)
            algorithms = await asyncio.to_thread(trust.expected, error.presented, tried)
            if not algorithms:
                is_changed = trust.pinned is not None or bool(trust.known_kinds(first))
                raise _unknown(address, first, is_changed=is_changed) from error


def _algorithms(kinds: Sequence[str]) -> list[str]:
    return [name for kind in kinds for name in KINDS.get(kind, ())]


class _NotTrusted(Exception):
    """Nothing vouches for the host key that was shown."""

    def __init__(self, presented: Presented) -> None:
        super().__init__(presented.fingerprint)
        self.presented = presented


_LoggedIn: TypeAlias = tuple[asyncssh.SSHClientConnection, Gone]


async def _open(
    address: NodeAddress, trust: _Trust, algorithms: Sequence[str], names: Names, on_heard: OnHeard | None
) -> _LoggedIn:
    """Connect once, and accept host keys of these kinds alone."""
    gone = Gone()
    client = _Client(address, gone, on_heard)
    try:
        connection = await connect_over(
            await open_way(address, names),
            address,
            client_keys=_keys(address),
            client_factory=lambda: client,
            known_hosts=trust.known_hosts,
            server_host_key_algs=list(algorithms),
            # What the user's configuration may send along, or open, is for the user's own sessions.
            command=None,
            env={},
            send_env=[],
            request_pty=False,
            agent_forwarding=False,
            x11_forwarding=False,
        )
    except asyncssh.HostKeyNotVerifiable as error:
        if client.presented is None:
            raise
        raise _NotTrusted(client.presented) from error
    return connection, gone


def _keys(address: NodeAddress) -> Any:
    # Nothing stands for those of ~/.ssh/config, else of ~/.ssh; the agent's are tried before any.
    return () if address.key_path is None else [str(Path(address.key_path).expanduser())]


# --- What a person is told -----------------------------------------------------------------------


def _unknown(address: NodeAddress, presented: Presented, *, is_changed: bool) -> ArrieroError:
    shown = f"{presented.key_type} {presented.fingerprint}"
    details = {
        "address": str(address),
        "fingerprint": presented.fingerprint,
        "key_type": presented.key_type,
        "option": f"--accept-host-key {presented.fingerprint}",
    }
    if is_changed:
        return ArrieroError(
            ErrorCode.SSH_HOST_KEY_CHANGED,
            f"the host key of {address} has CHANGED: it shows {shown}, another one is known. Somebody may be "
            "listening in, or the machine was installed anew",
            **details,
            suggested_action="ask whoever runs the machine; if the key is right, accept it with "
            f"{details['option']}",
        )
    compare = f"ssh-keygen -lf /etc/ssh/ssh_host_{presented.short_type}_key.pub"
    return ArrieroError(
        ErrorCode.SSH_HOST_KEY_UNKNOWN,
        f"the host key of {address} is not known: it shows {shown}",
        **details,
        compare=compare,
        suggested_action=f"compare the fingerprint with what `{compare}` prints there, then accept it with "
        f"{details['option']}",
    )


def _command(address: NodeAddress) -> str:
    """Return what a person types to try the same."""
    port = f"-p {address.port} " if address.port is not None else ""
    return f"ssh {port}{address.user + '@' if address.user else ''}{address.host}"


def _unreachable(address: NodeAddress, why: str) -> ArrieroError:
    return ArrieroError(
        ErrorCode.NODE_UNREACHABLE,
        f"{address} cannot be reached by SSH: {why}",
        address=str(address),
        suggested_action=f"try `{_command(address)}`; check the address, the port and that sshd runs there",
    )


def _explained(address: NodeAddress, error: Exception) -> ArrieroError:
    reason = reason_of(error)
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        # Revoked, a bad certificate, or the key of a host on the way (ProxyJump).
        return ArrieroError(
            ErrorCode.SSH_HOST_KEY_UNKNOWN,
            f"a host key on the way to {address} is not accepted: {reason}",
            address=str(address),
            suggested_action=f"try `{_command(address)}`: it tells which host, and accepts its key",
        )
    # OpenSSH ends a login after too many keys with a protocol error, of which only the text tells.
    if isinstance(error, asyncssh.PermissionDenied) or "authentication failures" in reason:
        return ArrieroError(
            ErrorCode.SSH_AUTH_FAILED,
            f"{address} refused the login: {reason}",
            address=str(address),
            option=KEY_OPTION,
            suggested_action=f"check the user name, name the key with {KEY_OPTION}, and see that its public "
            "half stands in ~/.ssh/authorized_keys there",
        )
    if isinstance(error, asyncssh.KeyImportError | asyncssh.KeyEncryptionError):
        which = f"the key {address.key_path}" if address.key_path else f"a private key for {address}"
        if isinstance(error, asyncssh.KeyEncryptionError) or "assphrase" in reason:
            advice = "put a key with a passphrase into ssh-agent (`ssh-add FILE`) and give no --key"
        else:
            advice = f"name a private key with {KEY_OPTION}: not its public half, and none of another program"
        return ArrieroError(
            ErrorCode.SSH_KEY_UNUSABLE,
            f"{which} cannot be used: {reason}",
            address=str(address),
            option=KEY_OPTION,
            suggested_action=advice,
        )
    if isinstance(error, asyncssh.ConfigParseError):
        return ArrieroError(ErrorCode.INVALID_SETTINGS, f"~/.ssh/config cannot be read: {reason}")
    if isinstance(error, UnicodeDecodeError):
        return ArrieroError(
            ErrorCode.INVALID_SETTINGS, f"~/.ssh/config or known_hosts cannot be read: {reason}"
        )
    # A ProxyCommand that has ended already is a RuntimeError of the event loop's.
    if isinstance(error, asyncssh.Error | OSError | RuntimeError):
        return _unreachable(address, reason)
    raise error
