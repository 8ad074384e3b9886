"""What is a plain file name, and what is a checksum?

Whatever names a file to us (a card, a manifest, an answer of the Hub or of another node) passes here
or through the types below, before it becomes a part of a path.
"""

import re
from typing import Annotated, Final

import msgspec

from arriero.contracts.errors import ErrorCode, fail

FILE_NAME_BYTES_MAX: Final = 255
# No leading dot (hidden, "." and ".."), no separators of any system, nothing that cannot be printed or
# that turns the text around, no surrogates.  `\Z`, since `$` lets a line break follow.
_FILE_NAME: Final = (
    r"\A(?!\.)[^/\\\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]{1,255}\Z"
)
_SHA256: Final = r"\A[0-9a-f]{64}\Z"
_MODEL_ID: Final = r"\Am-[0-9a-f]{12}\Z"

#: Types of fields of wire structs: what is decoded into them is checked.  A length in bytes no pattern
#: can tell; a name that is too long for the disk fails there.
FileName = Annotated[str, msgspec.Meta(pattern=_FILE_NAME)]
Sha256 = Annotated[str, msgspec.Meta(pattern=_SHA256)]
ModelId = Annotated[str, msgspec.Meta(pattern=_MODEL_ID)]
SizeBytes = Annotated[int, msgspec.Meta(ge=0)]


def file_name(text: str) -> str:
    """Return `text` if it is a plain name of a file: no path, nothing hidden, at most 255 bytes.

    Raises INVALID_MODEL_PATH.
    """
    if not is_file_name(text):
        shown = text[:80].encode("utf-8", "backslashreplace").decode()
        fail(ErrorCode.INVALID_MODEL_PATH, f"{shown!r} is no plain name of a file", name=shown)
    return text


def is_file_name(text: str) -> bool:
    """Return whether `text` is a plain name of a file, see `file_name`."""
    return re.search(_FILE_NAME, text) is not None and len(text.encode()) <= FILE_NAME_BYTES_MAX


def sha256(text: str) -> str:
    """Return `text` if it is a SHA-256 checksum, 64 lower-case hexadecimal digits.

    Raises INVALID_MODEL_PATH: a checksum is told where a file is described.
    """
    if not is_sha256(text):
        shown = text[:80].encode("utf-8", "backslashreplace").decode()
        fail(ErrorCode.INVALID_MODEL_PATH, f"{shown!r} is no SHA-256 checksum", name=shown)
    return text


def is_sha256(text: str) -> bool:
    """Return whether `text` is a SHA-256 checksum, 64 lower-case hexadecimal digits."""
    return re.search(_SHA256, text) is not None


def is_model_id(text: str) -> bool:
    """Return whether `text` is the id of a model, which is also the name of its folder."""
    return re.search(_MODEL_ID, text) is not None
