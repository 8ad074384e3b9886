"""Which program does `arriero COMMAND` become?"""

import sys


def main() -> int:
    """Dispatch on the first argument, importing only what it needs."""
    if sys.argv[1:] == ["worker"]:
        from arriero.worker.app import main as worker_main

        return worker_main()
    sys.stderr.write("usage: arriero worker\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
