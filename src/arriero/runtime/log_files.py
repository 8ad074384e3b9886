"""How does a log stay small whose writer goes on writing?

Who writes has inherited the open file, and outlives whoever looks after it; the log is therefore copied
and cut, not renamed.
"""

import os
from pathlib import Path
from typing import Final

READ_BYTES: Final = 65_536


def rotate(path: Path, bytes_max: int) -> bool:
    """Move the content of a log that is too large to `NAME.1`; returns whether it was.

    The writer appends, so it goes on at the beginning.  Lines written while the last bytes are
    copied may be lost: microseconds once in `bytes_max`.
    """
    try:
        if path.stat().st_size < bytes_max:
            return False
        with path.open("r+b") as source, path.with_suffix(".log.1").open("wb") as target:
            os.fchmod(target.fileno(), 0o600)
            # To the very end: what was written meanwhile is taken along.
            while block := source.read(READ_BYTES):
                target.write(block)
            source.truncate(0)
    except OSError:
        return False
    return True
