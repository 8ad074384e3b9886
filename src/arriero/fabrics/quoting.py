"""How does a list of arguments pass a remote login shell unharmed?

SSH has no lists: the server hands one string to the user's login shell, and that may be any.  Quoting
for a POSIX shell does not hold everywhere: fish reads `\\'` within single quotes as a quote, so that
what follows would be executed; csh ends a string at a line break; zsh expands an unquoted `=name`.
So what is not plain reaches the login shell as base64, and /bin/sh takes it out.
"""

import base64
import re
import shlex
from collections.abc import Sequence
from typing import Final

from arriero.contracts.errors import ErrorCode, fail

#: Linux refuses a single argument of 128 KiB, which the whole command is for /bin/sh.
COMMAND_BYTES_MAX: Final = 96 * 1024
PID_MARK: Final = "arriero-pid:"
# The same for every shell, quoted or not.
_PLAIN: Final = re.compile(r"[A-Za-z0-9_./:,@+-]+")


def command_line(argv: Sequence[str]) -> str:
    """Return what runs `argv` in any login shell, each argument exactly as it is.

    Its first output is a line of `PID_MARK` and a process id, that of the program and, where the server
    gives each command a session of its own (as OpenSSH does), of its process group.

    Raises INVALID_REQUEST if an argument holds a NUL or is no text, or if all are too long together.
    """
    check(argv)
    quoted = shlex.join(argv)
    # exec: the program takes the shell's place, so that it has its pid.
    script = f"echo {PID_MARK}$$; exec {quoted}"
    if not all(_PLAIN.fullmatch(argument) for argument in argv):
        packed = base64.b64encode(f"exec {quoted}".encode("utf-8", "surrogateescape")).decode()
        script = f'echo {PID_MARK}$$; eval "$(echo {packed} | base64 -d)"'
    if len(script) > COMMAND_BYTES_MAX:
        fail(
            ErrorCode.INVALID_REQUEST,
            f"the arguments of {argv[0]} take {len(script)} bytes, at most {COMMAND_BYTES_MAX} can be sent",
        )
    return f"exec /bin/sh -c '{script}'"


def check(argv: Sequence[str]) -> None:
    """Know that a system can take the arguments.

    Raises INVALID_REQUEST if one holds a NUL, at which it would end, or is no text.
    """
    assert argv and argv[0] and argv[0][0] != "-", argv
    for argument in argv:
        if "\0" in argument:
            fail(ErrorCode.INVALID_REQUEST, f"an argument of {argv[0]} holds a NUL character")
        try:
            argument.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            fail(ErrorCode.INVALID_REQUEST, f"an argument of {argv[0]} holds half a character")
