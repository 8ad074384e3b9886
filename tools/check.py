"""Format, lint, types, imports and unit tests, at once; prints what failed, exits 1 if anything did."""

import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
PARTS = {
    "format": ["ruff", "format", "--check", "--quiet", "src", "tests", "tools"],
    "lint": ["ruff", "check", "--quiet", "src", "tests", "tools"],
    "types": ["mypy", "--no-error-summary"],
    "imports": ["lint-imports", "--no-logo"],
    "unit tests": ["pytest", "-q", "-n", "2", "-m", "not costly", "-p", "no:cacheprovider", "tests/unit"],
}


def main() -> int:
    start = time.monotonic()
    running = {
        name: subprocess.Popen(
            [str(BIN / command[0]), *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name, command in PARTS.items()
    }
    failed = []
    for name, process in running.items():
        output, _ = process.communicate()
        print(f"{name}: {'ok' if process.returncode == 0 else 'FAILED'} ({time.monotonic() - start:.0f} s)")
        if process.returncode:
            failed.append(name)
            print(output)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
