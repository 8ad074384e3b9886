"""How does a child make sure that it does not outlive the process that started it?

Standard library alone: engine children import it before anything else.
"""

import ctypes
import os
import signal
import sys
from typing import Final

#: prctl(2), Linux.
_PR_SET_PDEATHSIG: Final = 1


def die_with(owner_pid: int) -> bool:
    """Have the kernel kill us when the owner's thread that started us ends (Linux alone).

    Returns False if the owner is gone already: then the caller ends by itself.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have died before the kernel was asked.
    return os.getppid() == owner_pid
