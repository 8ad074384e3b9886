"""What does a probe answer with?

A probe is a function that ends in a `ProbeResult`, whatever happens: 0 only after it has read what
it asks about, 1 with an error's code, 124 when time ran out.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Final

from arriero.client.connection import FailureCodes
from arriero.contracts.errors import ArrieroError, ErrorCode, ErrorResponse

#: How many of the frames it read a probe shows; all are counted.
SHOWN_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One answer."""

    probe: str
    exit_code: int
    error: ErrorResponse | None
    #: What was read on the way; also present, as far as it came, where the probe failed.
    seen: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return `{probe, exit_code, error, seen}`, the error without its envelope."""
        error = None
        if self.error is not None:
            body = self.error.error
            error = {"code": body.code, "message": body.message, "details": body.details}
        return {"probe": self.probe, "exit_code": self.exit_code, "error": error, "seen": self.seen}


def ask(probe: str, question: Callable[[dict[str, Any]], None]) -> ProbeResult:
    """Run `question(seen)`; it fails by raising `ArrieroError`, and fills `seen` as it goes."""
    seen: dict[str, Any] = {}
    try:
        question(seen)
    except ArrieroError as error:
        return ProbeResult(probe, int(error.kind.exit_code), ErrorResponse(error.body()), seen)
    return ProbeResult(probe, 0, None, seen)


def in_terms_of(
    codes: FailureCodes, error: ArrieroError, *, also: Collection[ErrorCode] = ()
) -> ArrieroError:
    """Return `error` under one of the probe's own codes, with what it was as `cause` among the details.

    Errors that already have such a code, or one of `also`, come back as they are.
    """
    if error.code in (codes.unreachable, codes.timeout, codes.status, *also):
        return error
    code = codes.timeout if error.code is ErrorCode.REQUEST_TIMEOUT else codes.unreachable
    return ArrieroError(
        code, f"{error.code}: {error.message}", cause=error.code.value, cause_details=error.details
    )
