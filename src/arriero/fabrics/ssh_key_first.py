"""How does a login with a given key do without the questions whose answers are known?

By itself the library asks which ways to log in there are, then whether the key would do, then shows that
it has it: from far away each of the three takes a while, and a link that is back is waited for.  Here
the last one comes first; a machine that refuses is asked in the usual way after all.

The library has no option for that.  What is used of its inside, the lock holds fast and a test watches.
"""

import asyncssh
from asyncssh.auth import ClientAuth
from asyncssh.packet import Boolean, String


def show_key_first(connection: asyncssh.SSHClientConnection) -> None:
    """Let a login that is about to begin show its one key at once; without one it goes as ever.

    A key that a person may have to touch is shown to nobody who has not asked for it.
    """
    keys = connection._client_keys
    if len(keys) != 1 or keys[0].use_executor or not connection._choose_signature_alg(keys[0]):
        return
    usual = connection.try_next_auth

    def first(*, next_method: bool = False) -> None:
        connection.try_next_auth = usual  # type: ignore[method-assign]
        connection._auth = _KeyShown(connection, keys[0])

    connection.try_next_auth = first  # type: ignore[method-assign]


class _KeyShown(ClientAuth):
    """One request, which needs no other before it."""

    def __init__(self, connection: asyncssh.SSHClientConnection, key: asyncssh.SSHKeyPair) -> None:
        self._key = key
        super().__init__(connection, b"publickey")

    async def _start(self) -> None:
        key = self._key
        await self.send_request(
            Boolean(True), String(key.algorithm), String(key.public_data), key=key, trivial=False
        )

    def auth_failed(self) -> None:
        """Begin in the usual way, as if nothing had been tried."""
        self._conn._auth_methods = [b"none"]
