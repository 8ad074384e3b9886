"""Does a machine say anything while we log in?

What a machine that answers is asked need not be asked it a second time at once; one that is silent
may never have got the question.  The library tells of a login's beginning and end alone, and nothing
of what comes between, so this looks in where it takes what came.  The lock holds that fast, and a test
watches.
"""

import asyncssh

from arriero.fabrics.base import OnHeard


def hear(connection: asyncssh.SSHClientConnection, on_heard: OnHeard) -> None:
    """Call `on_heard` each time something came, before it is read."""
    usual = connection._recv_data

    def receive() -> None:
        on_heard()
        usual()

    connection._recv_data = receive  # type: ignore[method-assign]  # Of this one connection alone.


def hear_no_more(connection: asyncssh.SSHClientConnection) -> None:
    """Let what comes go the short way.  Safe to call twice."""
    vars(connection).pop("_recv_data", None)
