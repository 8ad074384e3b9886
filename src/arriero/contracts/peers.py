"""What may a machine of the pool do with another one?  Read its models, and nothing else.

Who commands an agent has its token.  A neighbour gets one that is made of it, and leads nowhere else:
a machine that is taken over commands no other one.
"""

import hashlib
import hmac
import re
from typing import Final

_LABEL: Final = b"arriero: reads models"
#: The catalog, and the files in it.
_READ: Final = re.compile(r"/v1/models(?:/m-[0-9a-f]{12}/files/[^/]+)?")


def reading_token(token: str) -> str:
    """Return the token, made of an agent's own, by which its models are read; none where it has none."""
    return hmac.new(token.encode(), _LABEL, hashlib.sha256).hexdigest() if token else ""


def reads_models(method: str, path: str) -> bool:
    """Return whether a request is one that the reading token is for."""
    return method == "GET" and _READ.fullmatch(path) is not None
