"""How is a machine reached by SSH: how often is it tried, and with which key?"""

import asyncio
import logging
import shlex
import stat
from pathlib import Path
from types import ModuleType
from typing import Final, cast

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.domain import backoff
from arriero.fabrics.base import Connection, NodeAddress, OnHeard, OnRetry
from arriero.fabrics.ssh_dial import Names
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy

CONNECT_TIMEOUT_S: Final = 10.0
ATTEMPTS: Final = 3
#: What names another key, for advice.
KEY_OPTION: Final = "--key FILE"
#: 0 to 200, then 0 to 400 ms.
RETRY_BASE_S: Final = 0.2


class SshFabric:
    """Machines by SSH, as OpenSSH's configuration, keys and agent of this user reach them.

    `sockets_dir` is private to the user and short: a unix socket's path has at most 107 bytes.
    """

    def __init__(
        self,
        clock: Clock,
        entropy: Entropy,
        *,
        sockets_dir: Path,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> None:
        self._clock = clock
        self._entropy = entropy
        self._sockets_dir = sockets_dir
        self._connect_timeout_s = connect_timeout_s
        self._names = Names()

    async def connect(
        self, address: NodeAddress, on_retry: OnRetry | None = None, on_heard: OnHeard | None = None
    ) -> Connection:
        """Return a connection to a machine, after up to three attempts where it does not answer.

        `on_retry` hears why one failed, before the next; `on_heard` all that comes from the machine itself
        until it let us in.
        Raises SSH_HOST_KEY_UNKNOWN or SSH_HOST_KEY_CHANGED (details: fingerprint, key_type),
        SSH_KEY_UNUSABLE, SSH_AUTH_FAILED, NODE_UNREACHABLE; INVALID_SETTINGS if ~/.ssh/config cannot be read.
        """
        if address.key_path is not None:
            await asyncio.to_thread(check_key_file, address.key_path)
        # A quarter of a second of imports, which only those pay who have machines behind SSH.
        login = await asyncio.to_thread(_load)
        attempt = 1
        while True:
            try:
                return cast(
                    "Connection",
                    await login.log_in(
                        address,
                        entropy=self._entropy,
                        sockets_dir=self._sockets_dir,
                        timeout_s=self._connect_timeout_s,
                        names=self._names,
                        on_heard=on_heard,
                    ),
                )
            except ArrieroError as error:
                if error.code is not ErrorCode.NODE_UNREACHABLE:
                    raise
                if attempt == ATTEMPTS:
                    error.details["attempts"] = attempt
                    raise
                if on_retry is not None:
                    on_retry(error)
            await self._clock.sleep_s(backoff.delay_s(attempt, self._entropy.chance(), RETRY_BASE_S))
            attempt += 1


def check_key_file(key_path: str) -> None:
    """Know, blocking, that a private key's file is there and nobody else's to read.

    Raises SSH_KEY_UNUSABLE.  Nothing was sent to anybody then.
    """
    try:
        path = Path(key_path).expanduser()
        found = path.stat()
        # Others may wait for ever when they are opened, as pipes do.
        is_file = stat.S_ISREG(found.st_mode)
        if is_file:
            with path.open("rb"):
                pass
    except (OSError, RuntimeError) as error:
        # A RuntimeError: there is no user of the name after the `~`.
        why = error.strerror if isinstance(error, OSError) else "nobody has that home"
        fail(
            ErrorCode.SSH_KEY_UNUSABLE,
            f"the key {key_path} cannot be read: {why}",
            key_path=key_path,
            option=KEY_OPTION,
            suggested_action=f"name a private key with {KEY_OPTION}, or none to use those of ssh-agent "
            "and ~/.ssh",
        )
    if not is_file:
        fail(
            ErrorCode.SSH_KEY_UNUSABLE,
            f"the key {key_path} is no regular file",
            key_path=key_path,
            option=KEY_OPTION,
            suggested_action=f"name the file of a private key with {KEY_OPTION}",
        )
    if found.st_mode & 0o077:
        fail(
            ErrorCode.SSH_KEY_UNUSABLE,
            f"the key {key_path} can be read by others (mode {stat.S_IMODE(found.st_mode):03o}, at most 600)",
            key_path=key_path,
            suggested_action=f"chmod 600 {shlex.quote(str(path))}",
        )


def _load() -> ModuleType:
    from arriero.fabrics import ssh_login

    # It tells every command and channel; what matters of it is in our errors.
    logging.getLogger("asyncssh").setLevel(logging.CRITICAL)
    return ssh_login
