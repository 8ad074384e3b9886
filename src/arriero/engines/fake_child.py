"""The fake engine's process: computes nothing, but lives and dies like a real one.

    python -m arriero.engines.fake_child

reads one line, a mode and its owner's pid: `serve` ends when stdin ends, `hang` has to be killed.
"""

import signal
import sys
import threading

from arriero.runtime.parent_death import die_with


def main() -> None:
    """Wait for the end."""
    mode, owner_pid = sys.stdin.readline().split()
    if not die_with(int(owner_pid)):
        return
    if mode == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Event().wait()
    sys.stdin.read()


if __name__ == "__main__":
    main()
