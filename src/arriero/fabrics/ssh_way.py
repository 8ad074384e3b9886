"""Over which hosts is a machine reached, and what ends with a connection that goes over them?  (ProxyJump.)

The library would open that way by itself, but nobody ends it when the connection over it is given up
before it stands, or when the first of several hosts falls silent.  So each hop is made, and ended, here.
"""

import asyncio
from pathlib import Path
from typing import Any, Final, TypeAlias

import asyncssh

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.fabrics.base import NodeAddress
from arriero.fabrics.ssh_dial import Dial, Names

KEEPALIVE_EVERY_S: Final = 1.0
#: Asked and not answered so often, the connection is given up when the next one is due: after 3 s.
KEEPALIVES_UNANSWERED_MAX: Final = 2
SYSTEM_KNOWN_HOSTS: Final = Path("/etc/ssh/ssh_known_hosts")
#: Instead of an empty list, which would stand for ~/.ssh/known_hosts.
NO_KNOWN_HOSTS: Final[Any] = ([], [], [])


#: What the library goes over: a host on the way, or our own steps to the machine; nothing leaves it to the
#: library, and None as well, but it may not look for hosts on the way.
Way: TypeAlias = asyncssh.SSHClientConnection | Dial | tuple[()] | None


async def open_way(address: NodeAddress, names: Names, sought: frozenset[str] = frozenset()) -> Way:
    """Return what leads to a machine: a connection to the last host on the way, where there is one.

    Give it to `connect_over` at once.  `sought`: those to which this way leads in the end.
    """
    options = await asyncio.to_thread(configured, address)
    sought |= {address.host}
    jumps = _jumps_of(options.tunnel)
    if any(jump.host in sought for jump in jumps):
        # As a `ProxyJump` for all hosts, of which that one is one.
        return Dial(names, options.family) if _is_plain(options) else None
    way: Way = Dial(names, options.family) if _is_plain(options) else ()
    for index, jump in enumerate(jumps):
        if index == 0:
            way = await open_way(jump, names, sought)
        way = await connect_over(way, jump)
    return way


def _is_plain(options: asyncssh.SSHClientConnectionOptions) -> bool:
    """Return whether nothing but a name's address is to be found out to reach a host."""
    more = (options.proxy_command, options.local_addr)
    later = (options.canonicalize_hostname, options.config.has_match_final())
    return not any((*more, *later))


async def connect_over(way: Way, address: NodeAddress, **options: Any) -> asyncssh.SSHClientConnection:
    """Return a connection that goes over `way`, which ends with it, or now if there comes none."""
    try:
        if "known_hosts" not in options:
            options["known_hosts"] = await asyncio.to_thread(lambda: known_hosts_of(configured(address)))
        connection = await asyncssh.connect(
            **_target(address),
            **options,
            tunnel=way,
            keepalive_interval=KEEPALIVE_EVERY_S,
            keepalive_count_max=KEEPALIVES_UNANSWERED_MAX,
        )
    except BaseException:
        if isinstance(way, asyncssh.SSHClientConnection):
            way.close()
        raise
    if isinstance(way, asyncssh.SSHClientConnection):
        connection.set_tunnel(way)
        # It may be gone already, and has ended all that it knew of.
        if connection.is_closed():
            way.close()
    return connection


def configured(address: NodeAddress) -> asyncssh.SSHClientConnectionOptions:
    """Return, blocking, what the user's configuration says of a machine; no keys are read."""
    # Told so: unlike connecting, this reads the configuration only when it is asked to.
    return asyncssh.SSHClientConnectionOptions(config=(), **_target(address), client_keys=None)


def known_hosts_of(options: asyncssh.SSHClientConnectionOptions) -> Any:
    """Return, blocking, those of the files of known hosts that are there.

    None would switch the check off for asyncssh; here it means that no host is known.
    """
    named: Any = options.known_hosts
    if named is None:
        return NO_KNOWN_HOSTS
    paths = [Path(str(name)).expanduser() for name in named or ["~/.ssh/known_hosts"]]
    return [str(path) for path in [*paths, SYSTEM_KNOWN_HOSTS] if path.is_file()] or NO_KNOWN_HOSTS


def _target(address: NodeAddress) -> dict[str, Any]:
    # What is left out is looked up in ~/.ssh/config.
    target: dict[str, Any] = {"host": address.host}
    if address.port is not None:
        target["port"] = address.port
    if address.user is not None:
        target["username"] = address.user
    return target


def _jumps_of(named: object) -> list[NodeAddress]:
    if not isinstance(named, str):
        return []
    try:
        return [NodeAddress.parse(each.strip()) for each in named.split(",")]
    except ArrieroError as error:
        fail(ErrorCode.INVALID_SETTINGS, f"ProxyJump in ~/.ssh/config: {error.message}")
