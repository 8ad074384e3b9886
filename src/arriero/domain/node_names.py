"""What is this machine called where its name is that of another one?"""

from collections.abc import Container
from typing import Final

#: As `ids.NODE_NAME` has it.
NAME_LENGTH_MAX: Final = 63


def free_name(name: str, taken: Container[str]) -> str:
    """Return the name, or one made of it that nobody has: NAME-local, NAME-local-2…"""
    found, number = name, 1
    while found in taken:
        ending = "-local" if number == 1 else f"-local-{number}"
        found = name[: NAME_LENGTH_MAX - len(ending)] + ending
        number += 1
    return found
