"""Who answers at that address, may we trust it, and does it let us in?  (One attempt.)"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import asyncssh

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.fabrics.base import NodeAddress
from arriero.fabrics.ssh_connection import Gone, SshConnection, reason_of
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy

KEEPALIVE_EVERY_S: Final = 1.0
#: Asked and not answered so often, the connection is given up when the next one is due: after 3 s.
KEEPALIVES_UNANSWERED_MAX: Final = 2
SYSTEM_KNOWN_HOSTS: Final = Path("/etc/ssh/ssh_known_hosts")
#: Instead of an empty list, which would stand for ~/.ssh/known_hosts.
_NO_KNOWN_HOSTS: Final[Any] = ([], [], [])


@dataclass(frozen=True, slots=True)
class Presented:
    """The host key that a server showed and that nothing vouches for."""

    key: asyncssh.SSHKey
    #: As known_hosts calls it.
    host: str
    ip_address: str
    port: int

    @property
    def fingerprint(self) -> str:
        """Its SHA-256, as `ssh-keygen -l` prints it."""
        return self.key.get_fingerprint()

    @property
    def key_type(self) -> str:
        """Its algorithm's name."""
        return self.key.get_algorithm()


class _Client(asyncssh.SSHClient):
    """Decides on host keys that known_hosts does not hold, and tells when the connection is gone."""

    def __init__(self, pinned: str | None, gone: Gone) -> None:
        self._pinned = pinned
        self._gone = gone
        self.presented: Presented | None = None

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        """Return whether the key is the pinned one."""
        if self._pinned is not None and key.get_fingerprint() == self._pinned:
            return True
        self.presented = Presented(key, host, addr, port)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell why the connection is gone."""
        self._gone.tell("closed" if exc is None else reason_of(exc))


async def log_in(
    address: NodeAddress, *, clock: Clock, entropy: Entropy, sockets_dir: Path, timeout_s: float
) -> SshConnection:
    """Return a connection that is logged in.

    Raises SSH_HOST_KEY_UNKNOWN, SSH_AUTH_FAILED, NODE_UNREACHABLE, INVALID_SETTINGS.
    """
    try:
        async with asyncio.timeout(timeout_s):
            if address.host_key is None:
                connection, gone = await _by_known_hosts(address)
            else:
                connection, gone = await _by_pinned_key(address)
    except TimeoutError as error:
        raise _unreachable(address, f"no login within {timeout_s:g} s") from error
    except (asyncssh.Error, OSError, ValueError) as error:
        raise _explained(address, error) from error
    return SshConnection(connection, gone, clock, entropy, name=str(address), sockets_dir=sockets_dir)


async def _by_known_hosts(address: NodeAddress) -> "_LoggedIn":
    known_hosts = await asyncio.to_thread(_known_hosts, address)
    try:
        return await _open(address, known_hosts)
    except _NotTrusted as error:
        is_changed = await asyncio.to_thread(_is_known, known_hosts, error.presented)
        raise _unknown(address, error.presented, is_changed=is_changed) from error
    except asyncssh.KeyExchangeFailed as error:
        if "host key" not in error.reason:
            raise
        # known_hosts holds keys of other kinds than the server has: ask what it shows instead.
        try:
            await _open(address, _NO_KNOWN_HOSTS)
        except _NotTrusted as shown:
            raise _unknown(address, shown.presented, is_changed=True) from error
        raise AssertionError("a key that nothing vouches for was accepted") from error


async def _by_pinned_key(address: NodeAddress) -> "_LoggedIn":
    first: Presented | None = None
    refused: list[str] = []
    while True:
        try:
            return await _open(address, _NO_KNOWN_HOSTS, without=refused)
        except _NotTrusted as error:
            # A server has keys of several kinds, and the pinned one need not be of the kind we like best.
            first = first or error.presented
            refused.append(error.presented.key_type)
        except asyncssh.KeyExchangeFailed as error:
            if first is None:
                raise
            raise _unknown(address, first, is_changed=True) from error


class _NotTrusted(Exception):
    """Nothing vouches for the host key that was shown."""

    def __init__(self, presented: Presented) -> None:
        super().__init__(presented.fingerprint)
        self.presented = presented


_LoggedIn: TypeAlias = tuple[asyncssh.SSHClientConnection, Gone]


async def _open(address: NodeAddress, known_hosts: Any, *, without: Sequence[str] = ()) -> _LoggedIn:
    """Connect once; `without` names kinds of host keys that are not accepted."""
    gone = Gone()
    client = _Client(address.host_key, gone)
    # Each kind stands for its certificates too, and RSA for its newer signatures.
    patterns = ",".join("ssh-rsa*,rsa-sha2-*" if kind == "ssh-rsa" else f"{kind}*" for kind in without)
    try:
        connection = await asyncssh.connect(
            **_target(address),
            client_keys=_keys(address),
            client_factory=lambda: client,
            known_hosts=known_hosts,
            server_host_key_algs=f"-{patterns}" if patterns else (),
            keepalive_interval=KEEPALIVE_EVERY_S,
            keepalive_count_max=KEEPALIVES_UNANSWERED_MAX,
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


def _target(address: NodeAddress) -> dict[str, Any]:
    # What is left out is looked up in ~/.ssh/config.
    target: dict[str, Any] = {"host": address.host}
    if address.port is not None:
        target["port"] = address.port
    if address.user is not None:
        target["username"] = address.user
    return target


def _keys(address: NodeAddress) -> Any:
    # Nothing stands for those of ~/.ssh/config, else of ~/.ssh; the agent's are tried before any.
    return () if address.key_path is None else [str(Path(address.key_path).expanduser())]


def _known_hosts(address: NodeAddress) -> Any:
    """Return, blocking, the files of known hosts that the user's configuration names for this host."""
    options = asyncssh.SSHClientConnectionOptions(**_target(address), client_keys=None)
    # None, for `UserKnownHostsFile none`: it would switch the check off, here it means that none is known.
    named = [Path(str(name)).expanduser() for name in cast("list[str]", options.known_hosts or [])]
    if options.known_hosts is not None:
        named = [*(named or [Path("~/.ssh/known_hosts").expanduser()]), SYSTEM_KNOWN_HOSTS]
    found = [str(path) for path in named if path.is_file()]
    return found or _NO_KNOWN_HOSTS


def _is_known(known_hosts: Any, presented: Presented) -> bool:
    """Return, blocking, whether another key is known for the host."""
    port = None if presented.port == asyncssh.DEFAULT_PORT else presented.port
    found = asyncssh.match_known_hosts(known_hosts, presented.host, presented.ip_address, port)
    return bool(found[0])


# --- What a person is told -----------------------------------------------------------------------


def _unknown(address: NodeAddress, presented: Presented, *, is_changed: bool) -> ArrieroError:
    shown = f"{presented.key_type} {presented.fingerprint}"
    details = {
        "address": str(address),
        "fingerprint": presented.fingerprint,
        "key_type": presented.key_type,
        "is_changed": is_changed,
    }
    if is_changed:
        return ArrieroError(
            ErrorCode.SSH_HOST_KEY_UNKNOWN,
            f"the host key of {address} has CHANGED: it shows {shown}, another one is known. Somebody may be "
            "listening in, or the machine was installed anew",
            **details,
            suggested_action="ask whoever runs the machine; if the key is right, remove the old one "
            f"(`ssh-keygen -R`) and give --accept-host-key {presented.fingerprint}",
        )
    return ArrieroError(
        ErrorCode.SSH_HOST_KEY_UNKNOWN,
        f"the host key of {address} is not known: it shows {shown}",
        **details,
        suggested_action="compare the fingerprint with the machine's own (`ssh-keygen -lf "
        f"/etc/ssh/ssh_host_ed25519_key.pub` there), then give --accept-host-key {presented.fingerprint}",
    )


def _unreachable(address: NodeAddress, why: str) -> ArrieroError:
    return ArrieroError(
        ErrorCode.NODE_UNREACHABLE,
        f"{address} cannot be reached by SSH: {why}",
        address=str(address),
        suggested_action=f"try `ssh {address.user + '@' if address.user else ''}{address.host}`; "
        "check the address, the port and that sshd runs there",
    )


def _explained(address: NodeAddress, error: Exception) -> ArrieroError:
    reason = reason_of(error)
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        # Revoked, a bad certificate, or the key of a host on the way (ProxyJump).
        return ArrieroError(
            ErrorCode.SSH_HOST_KEY_UNKNOWN,
            f"a host key on the way to {address} is not accepted: {reason}",
            address=str(address),
            suggested_action=f"try `ssh {address.host}`: it tells which host, and accepts its key",
        )
    # OpenSSH ends a login after too many keys with a protocol error, of which only the text tells.
    if isinstance(error, asyncssh.PermissionDenied) or "authentication failures" in reason:
        return ArrieroError(
            ErrorCode.SSH_AUTH_FAILED,
            f"{address} refused the login: {reason}",
            address=str(address),
            suggested_action="check the user name, give the key with --key, and see that its public half "
            "stands in ~/.ssh/authorized_keys there",
        )
    if isinstance(error, asyncssh.KeyImportError | asyncssh.KeyEncryptionError):
        return ArrieroError(
            ErrorCode.SSH_AUTH_FAILED,
            f"a private key for {address} cannot be used: {reason}",
            address=str(address),
            suggested_action="put a key with a passphrase into ssh-agent (`ssh-add`) and give no --key",
        )
    if isinstance(error, asyncssh.ConfigParseError):
        return ArrieroError(ErrorCode.INVALID_SETTINGS, f"~/.ssh/config cannot be read: {reason}")
    if isinstance(error, asyncssh.Error | OSError):
        return _unreachable(address, reason)
    raise error
