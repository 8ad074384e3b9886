"""Is what the engine needs of the system there?  Says what to install; exits 1 if something is missing."""

import ctypes
import sys

NEEDED = {"libgomp.so.1": "libgomp1 (Debian, Ubuntu), libgomp (Fedora, Arch: gcc-libs)"}


def main() -> int:
    if not sys.platform.startswith("linux"):
        return 0
    missing = []
    for library, package in NEEDED.items():
        try:
            ctypes.CDLL(library)
        except OSError:
            missing.append(f"{library} is missing: install the system package {package}")
    for line in missing:
        print(line, file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
