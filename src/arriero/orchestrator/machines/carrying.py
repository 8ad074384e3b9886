"""Where do the packages come from that a machine cannot get by itself?

They are fetched on our machine for the other one's system, processor and Python, checked by the lock's
hashes, kept in `ARRIERO_HOME/dist/wheels` and used again; a person may put wheels there, too.
"""

import asyncio
import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.events import NodeStep
from arriero.fabrics.base import OUTPUT_BYTES_MAX, Connection
from arriero.fabrics.outcome import Kept
from arriero.orchestrator.machines.environment_child import package_begun
from arriero.orchestrator.machines.lock import Pinned, Target, fits
from arriero.orchestrator.machines.survey import Tell
from arriero.orchestrator.machines.there import ask
from arriero.runtime.processes import exit_code_of

FETCH_TIMEOUT_S: Final = 900.0
HELD_TIMEOUT_S: Final = 120.0
_LAST_LINES: Final = 12
TOLD_EVERY: Final = 0.05
#: What pip says of a package that no index has in a fitting form, and of one that could not be asked.
_MISSING: Final = re.compile(
    r"(?:satisfies the requirement|No matching distribution found for) ([A-Za-z0-9._-]+)"
)
_NO_INDEX: Final = re.compile(
    r"NewConnectionError|ConnectTimeoutError|NameResolutionError|ProxyError|SSLError"
)


async def fetch(
    folder: Path, pip: Path, packages: Sequence[Pinned], target: Target, tell: Tell
) -> list[Path]:
    """Return a wheel of each package that fits the target: those kept in `folder`, the rest fetched into it.

    Raises PACKAGE_UNAVAILABLE (details: package, platform, python), INSTALL_FAILED.
    """
    found = await asyncio.to_thread(_kept, folder, packages, target)
    missing = [package for package in packages if package.name not in found]
    if missing:
        tell(
            NodeStep(
                step="package",
                message=f"fetching {len(missing)} packages for {target} with Python {target.python}",
                fraction=0.0,
            )
        )
        await _download(folder, pip, missing, target, tell)
        found |= await asyncio.to_thread(_kept, folder, missing, target)
        for package in missing:
            if package.name not in found:
                _refuse(package.name, target, "what was fetched does not fit")
    return [found[package.name] for package in packages]


def _kept(folder: Path, packages: Sequence[Pinned], target: Target) -> dict[str, Path]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    tags = target.tags()
    wheels = sorted(folder.glob("*.whl"))
    found = {}
    for package in packages:
        for path in wheels:
            # By its content: whatever it is called, nothing else is installed.
            if fits(path.name, package, tags) and sha256_of(path) in package.hashes:
                found[package.name] = path
    return found


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256, blocking."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


async def _download(folder: Path, pip: Path, packages: Sequence[Pinned], target: Target, tell: Tell) -> None:
    program = ["-m", "pip"] if importlib.util.find_spec("pip") else [str(pip / "pip")]
    version = target.python_version
    fresh = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=".part-", dir=folder))
    begun = 0

    def hear(line: bytes) -> None:
        nonlocal begun
        package = package_begun(line.decode("utf-8", "replace"))
        if package:
            fraction = min(begun / len(packages), 1.0)
            begun += 1
            message = f"fetching {begun} of {len(packages)}: {package}"
            tell(NodeStep(step="package", message=message, fraction=fraction))

    try:
        asked = fresh / "asked.txt"
        await asyncio.to_thread(asked.write_text, "".join(f"{package.line()}\n" for package in packages))
        code, output = await _run(
            [
                sys.executable, *program, "download", "--no-deps", "--require-hashes", "--only-binary=:all:",
                "--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "30",
                *(word for each in target.platforms() for word in ("--platform", each)),
                "--python-version", ".".join(map(str, version)), "--implementation", "cp",
                "--abi", f"cp{version[0]}{version[1]}", "--abi", "abi3", "--abi", "none",
                "--dest", str(fresh), "--requirement", str(asked),
            ],
            hear,
        )  # fmt: skip
        if code:
            _explain(output, target)
        for path in await asyncio.to_thread(lambda: sorted(fresh.glob("*.whl"))):
            await asyncio.to_thread(path.replace, folder / path.name)
    finally:
        await asyncio.to_thread(shutil.rmtree, fresh, ignore_errors=True)


async def _run(argv: Sequence[str], on_line: Callable[[bytes], None]) -> tuple[int, str]:
    """Run a program, hear each line that it says, and return its exit code and the end of what it said."""
    said = Kept(OUTPUT_BYTES_MAX, is_end=True, on_line=on_line)
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
    )
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            assert process.stdout is not None
            while piece := await process.stdout.read(65_536):
                said.feed(piece)
            await process.wait()
    except TimeoutError:
        fail(
            ErrorCode.INSTALL_FAILED,
            f"the packages could not be fetched within {FETCH_TIMEOUT_S:g} s",
            last_lines=[],
        )
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    assert process.returncode is not None
    return exit_code_of(process.returncode)[0], said.content().decode("utf-8", "replace")


def _explain(output: str, target: Target) -> None:
    missing = _MISSING.search(output)
    if missing is not None:
        if _NO_INDEX.search(output):
            _refuse(missing[1].split("==")[0], target, "our own package index does not answer either")
        _refuse(missing[1].split("==")[0], target, "no index that we know has a wheel of it")
    lines = [line for line in output.splitlines() if line.strip()][-_LAST_LINES:]
    said = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "")
    fail(ErrorCode.INSTALL_FAILED, f"the packages could not be fetched: {said}", last_lines=lines)


def _refuse(package: str, target: Target, why: str, **details: Any) -> None:
    fail(
        ErrorCode.PACKAGE_UNAVAILABLE,
        f"{package} cannot be had for {target} with Python {target.python}: {why}",
        package=package,
        platform=str(target),
        python=target.python,
        **details,
    )


def check_had(failure: ArrieroError, target: Target) -> None:
    """Know that no package was missing in the machine's own index, by the last lines of a pip that failed.

    Raises PACKAGE_UNAVAILABLE (details: package, platform, python) if one was.  An index that does not
    answer lacks nothing.
    """
    said = failure.details.get("last_lines")
    # It is the machine's word: it may be anything.
    lines = [str(line) for line in said] if isinstance(said, list) else []
    output = "\n".join(lines)
    missing = _MISSING.search(output)
    if missing is not None and not _NO_INDEX.search(output):
        _refuse(
            missing[1].split("==")[0],
            target,
            "its own package index has no wheel of it",
            last_lines=lines,
            suggested_action="with --carry all packages are brought from here: those in "
            "ARRIERO_HOME/dist/wheels, and what the index of this machine has; or use another Python there",
        )


async def bring(
    connection: Connection, python: str, install_path: str, files: dict[str, Path], tell: Tell
) -> None:
    """Copy files below `carried` there, by their names there; those that are there already stay.

    Raises INSUFFICIENT_DISK, SSH_COMMAND_FAILED, NODE_UNREACHABLE; what was copied is not lost then.
    """
    sums = await asyncio.to_thread(lambda: {name: sha256_of(path) for name, path in files.items()})
    missing = await ask(connection, python, "held", timeout_s=HELD_TIMEOUT_S, path=install_path, files=sums)
    sizes = {name: files[name].stat().st_size for name in missing}
    total = sum(sizes.values())
    done, told_at = 0, -1.0

    def tell_copied(name: str, sent: int) -> None:
        nonlocal told_at
        fraction = (done + sent) / total if total else 1.0
        # Many are small: a step for each would say nothing.
        if told_at + TOLD_EVERY <= fraction < 1.0:
            message = f"copying {total / 1e6:.0f} MB: {Path(name).name}"
            tell(NodeStep(step="package", message=message, fraction=fraction))
            told_at = fraction

    for name in sorted(missing, key=lambda name: sizes[name]):
        tell_copied(name, 0)
        there = f"{install_path}/carried/{name}"
        await connection.put(files[name], there, mode=0o600, on_sent=partial(tell_copied, name))
        done += sizes[name]
    kept = len(files) - len(missing)
    message = f"{len(missing)} {'file' if len(missing) == 1 else 'files'} copied"
    message += f", {kept} were there" if kept else ""
    tell(NodeStep(step="package", message=message, fraction=1.0))
