"""The fake engine's process: computes nothing, but lives and dies like a real one.

    python -m arriero.engines.fake_child

reads one line: `serve` ends when stdin ends, `hang` has to be killed.
"""

import signal
import sys
import threading


def main() -> None:
    """Wait for the end."""
    if sys.stdin.readline().strip() == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        threading.Event().wait()
    sys.stdin.read()


if __name__ == "__main__":
    main()
