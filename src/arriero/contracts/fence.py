"""Who asks, and since when may he?  (`X-Arriero-Fence: HOLDER:NUMBER`)

An orchestrator holds a node under a number that rises with each new connection to it.  What carries
a smaller number than the newest comes from before a cut: it is refused, and what it began is over.
"""

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from arriero.contracts.errors import ErrorCode, fail

FENCE_HEADER: Final = "X-Arriero-Fence"
FENCE_NUMBER_MAX: Final = 2**63 - 1
HOLDER_DIGITS: Final = 16
_FORM: Final = re.compile(r"([0-9a-f]{16}):([1-9][0-9]{0,18})")


class Fence(msgspec.Struct, frozen=True):
    """One orchestrator's number on one node."""

    #: The orchestrator's id, 16 hex digits; the same one as long as its database is.
    holder: str
    #: From 1 on; on one node no two holders ever have the same one.
    number: int

    def __str__(self) -> str:
        return f"{self.holder}:{self.number}"

    @classmethod
    def parse(cls, header: str) -> "Fence":
        """Return what a header says.  Raises INVALID_REQUEST if it is not well formed."""
        found = _FORM.fullmatch(header)
        if found is None or int(found[2]) > FENCE_NUMBER_MAX:
            fail(
                ErrorCode.INVALID_REQUEST,
                f"{FENCE_HEADER} {header[:60]!r} is not {HOLDER_DIGITS} hex digits, a colon and a number "
                f"from 1 to {FENCE_NUMBER_MAX}",
                param=FENCE_HEADER,
            )
        return cls(found[1], int(found[2]))


def number_in(details: Mapping[str, object]) -> int:
    """Return the number that a refusal tells in its details; 0 if it tells none, whatever stands there."""
    number = details.get("number")
    return number if isinstance(number, int) and 0 < number <= FENCE_NUMBER_MAX else 0


def silent_s_in(details: Mapping[str, object]) -> float:
    """Return for how long, as a refusal tells, the holder has been silent; 0: it is not, or nobody tells."""
    told = details.get("silent_s")
    return told if isinstance(told, int | float) and told > 0 else 0.0


def holder_id(random_hex: str) -> str:
    """Return a holder's id from at least 16 random hex digits."""
    return random_hex[:HOLDER_DIGITS]
