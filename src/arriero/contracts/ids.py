"""How are things named on the wire, and which given names are well formed?"""

import re
from typing import Final

#: `X-Request-Id` as accepted from a client; anything else is replaced by one of ours.
REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
NODE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
WORKER_ID: Final = re.compile(r"w-[0-9a-f]{12}")
TASK_ID: Final = re.compile(r"t-[0-9a-f]{16}")
DOWNLOAD_ID: Final = re.compile(r"d-[0-9a-f]{12}")


def worker_id(random_hex: str) -> str:
    """Return a worker id from at least 12 random hex digits."""
    return f"w-{random_hex[:12]}"


def task_id(random_hex: str) -> str:
    """Return a task id from at least 16 random hex digits."""
    return f"t-{random_hex[:16]}"


def download_id(random_hex: str) -> str:
    """Return a download id from at least 12 random hex digits."""
    return f"d-{random_hex[:12]}"


def request_id(random_hex: str) -> str:
    """Return a request id from at least 24 random hex digits."""
    return f"req-{random_hex[:24]}"


def is_request_id(text: str) -> bool:
    """Return whether a client's `X-Request-Id` is well formed."""
    return REQUEST_ID.fullmatch(text) is not None
