"""How is a request's JSON body read, and what is said of one that is not right?"""

import re
from typing import Final, TypeVar

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode

T = TypeVar("T")
#: Fields that are unknown or missing are named in the reason alone.
_NAMED: Final = re.compile(r"Object (?:contains unknown|missing required) field `([^`]*)`")


def decode(content: bytes, kind: type[T]) -> T:
    """Return a JSON body as `kind`.  Raises INVALID_REQUEST with the field (`param`) and the reason."""
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        field, reason = field_and_reason(error)
        message = f"{field or 'the body'}: {reason}"
        raise ArrieroError(
            ErrorCode.INVALID_REQUEST, message[:500], param=field[:200] or None, reason=reason[:300]
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArrieroError(ErrorCode.INVALID_REQUEST, f"the body is no JSON: {error}"[:300]) from error
    except RecursionError as error:
        raise ArrieroError(ErrorCode.INVALID_REQUEST, "the body is nested too deeply") from error


def field_and_reason(error: msgspec.ValidationError) -> tuple[str, str]:
    """Return which field is wrong (empty: the body itself), and why."""
    reason, _, where = str(error).partition(" - at ")
    # "`$.labels[...]`" for a value, "`key` in `$.labels`" for a key.
    field = where.rpartition("$")[2].strip("`.")
    if (named := _NAMED.match(reason)) is not None:
        field = f"{field}.{named[1]}".lstrip(".")
    return field, reason
