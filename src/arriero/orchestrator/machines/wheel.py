"""How does the running installation become a wheel again, and where does pip come from?

The wheel is packed from the files of this very package, so it is never an old one, and works from a clone
as from an installation on a machine that was itself made from such a wheel: the lock lies in the package.
"""

import base64
import csv
import hashlib
import importlib.metadata
import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import arriero
from arriero.contracts.errors import ErrorCode, fail
from arriero.runtime import pip_wheel

#: The same for every file, so that the same content gives the same wheel.
_DATE: Final = (1980, 1, 1, 0, 0, 0)
_WHEEL_TEXT: Final = "Wheel-Version: 1.0\nGenerator: arriero\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_SHORTEST_METADATA: Final = "Metadata-Version: 2.1\nName: arriero\nVersion: 0\nRequires-Python: >=3.11\n"
_TAG_DIGITS: Final = 12
_VERSION: Final = re.compile(r'^__version__ = "([^"]+)"', re.MULTILINE)
#: The files of the arriero that runs.
PACKAGE: Final = Path(str(arriero.__file__)).parent


@dataclass(frozen=True, slots=True)
class Packed:
    """A wheel in a folder."""

    path: Path
    version: str
    sha256: str

    @property
    def tag(self) -> str:
        """The name of the environment that is made of it."""
        return f"{self.version}-{self.sha256[:_TAG_DIGITS]}"


def lock_text(package: Path = PACKAGE) -> str:
    """Return the lock of the packages that arriero needs."""
    return (package / "orchestrator" / "machines" / "runtime.txt").read_text("utf-8")


def pack(folder: Path, package: Path = PACKAGE) -> Packed:
    """Put the wheel of arriero's package and its lock into a folder, unless they are there; older ones go.

    Blocking: some 4 MB are read and hashed.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = _VERSION.search((package / "contracts" / "version.py").read_text("utf-8"))
    assert found is not None, "arriero has a version"
    version = found[1]
    content = _wheel(dict(_own_files(package, version)), "arriero", version)
    sha256 = hashlib.sha256(content).hexdigest()
    packed = Packed(folder / f"arriero-{version}-py3-none-any.whl", version, sha256)
    for old in folder.glob("arriero-*.whl"):
        if old != packed.path:
            old.unlink(missing_ok=True)
    _keep(packed.path, content)
    _keep(folder / "runtime.txt", lock_text(package).encode())
    return packed


def pack_pip(folder: Path) -> Packed:
    """Put a wheel of pip into a folder, unless it is there: that of this environment, or of this machine.

    Raises INSTALL_FAILED if there is none.
    """
    try:
        pip = importlib.metadata.distribution("pip")
        version, content = pip.version, _wheel(_files_of(pip), "pip", pip.version)
    except importlib.metadata.PackageNotFoundError:
        found = pip_wheel.find()
        if found is None:
            fail(
                ErrorCode.INSTALL_FAILED,
                "pip is not here, and machines need it to install arriero",
                last_lines=[],
                suggested_action="install pip on the orchestrator's machine: `python3 -m ensurepip`",
            )
        version, content = found.name.split("-")[1], found.read_bytes()
    name = f"pip-{version}-py3-none-any.whl"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in folder.glob("pip-*.whl"):
        if old.name != name:
            old.unlink(missing_ok=True)
    _keep(folder / name, content)
    return Packed(folder / name, version, hashlib.sha256(content).hexdigest())


def _keep(path: Path, content: bytes) -> None:
    if path.is_file() and path.read_bytes() == content:
        return
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_bytes(content)
    temporary.replace(path)


def _own_files(package: Path, version: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            yield f"arriero/{path.relative_to(package).as_posix()}", path.read_bytes()
    info = f"arriero-{version}.dist-info"
    metadata = _SHORTEST_METADATA
    try:
        own = importlib.metadata.distribution("arriero")
        metadata = own.read_text("METADATA") or metadata
        for license_name in own.metadata.get_all("License-File") or []:
            text = own.read_text(f"licenses/{license_name}")
            if text is not None:
                yield f"{info}/licenses/{license_name}", text.encode()
    except importlib.metadata.PackageNotFoundError:
        pass
    # An editable installation has the metadata of when it was made.
    metadata = re.sub(r"^Version: .*$", f"Version: {version}", metadata, count=1, flags=re.MULTILINE)
    yield f"{info}/METADATA", metadata.encode()
    yield f"{info}/entry_points.txt", b"[console_scripts]\narriero = arriero.__main__:main\n"


def _files_of(distribution: importlib.metadata.Distribution) -> dict[str, bytes]:
    found = {}
    for file in distribution.files or []:
        is_own = not file.is_absolute() and ".." not in file.parts and file.suffix != ".pyc"
        made_here = file.parent.name.endswith(".dist-info") and file.name in (
            "RECORD", "INSTALLER", "REQUESTED", "direct_url.json", "WHEEL",
        )  # fmt: skip
        if is_own and not made_here:
            found[file.as_posix()] = Path(str(distribution.locate_file(file))).read_bytes()
    return found


def _wheel(files: Mapping[str, bytes], name: str, version: str) -> bytes:
    """Return a wheel; what is in it stands in its RECORD, and nothing depends on when it was made."""
    info = f"{name}-{version}.dist-info"
    content = {**dict(sorted(files.items())), f"{info}/WHEEL": _WHEEL_TEXT.encode()}
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    for path, data in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.writerow([path, f"sha256={digest}", len(data)])
    rows.writerow([f"{info}/RECORD", "", ""])
    content[f"{info}/RECORD"] = record.getvalue().encode()
    packed = io.BytesIO()
    # Stored as it is: compressed by another zlib, the same content would be another wheel.
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for path, data in content.items():
            entry = zipfile.ZipInfo(path, _DATE)
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data)
    return packed.getvalue()
