"""Real wheels of the engine: the installed package, packed again under a label; and an index of them."""

import base64
import contextlib
import functools
import hashlib
import http.server
import importlib.metadata
import shutil
import sysconfig
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

VERSION = importlib.metadata.version("xllamacpp")
SITE = Path(sysconfig.get_path("platlib"))
TAG = f"cp310-abi3-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
#: A package that says that it is the engine and cannot be imported.
BROKEN: Mapping[str, bytes] = {"xllamacpp/__init__.py": b"import no_such_module_at_all\n"}


def pack(
    folder: Path, label: str = "", *, content: Mapping[str, bytes] | None = None, name: str = "xllamacpp",
    version: str = VERSION, tag: str = TAG,
) -> Path:  # fmt: skip
    """Write a wheel of the installed engine, or of other `content`, and return its path."""
    full = f"{version}+{label}" if label else version
    path = folder / f"{name}-{full}-{tag}.whl"
    info = f"{name}-{full}.dist-info"
    if content is None:
        files = {
            f"xllamacpp/{found.name}": found for found in (SITE / "xllamacpp").iterdir() if found.is_file()
        }
        given: dict[str, bytes | Path] = dict(files)
    else:
        given = dict(content)
    given[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {full}\n".encode()
    given[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    )
    lines = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for inner, source in given.items():
            if isinstance(source, Path):
                archive.write(source, inner)
                with source.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").digest()
            else:
                archive.writestr(inner, source)
                digest = hashlib.sha256(source).digest()
            lines.append(f"{inner},sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')},")
        archive.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]) + "\n")
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def index(
    folder: Path, builds: Mapping[str, list[Path]], *, digests: Mapping[Path, str] | None = None
) -> Iterator[str]:
    """Serve an index with a build's wheels below its name, as the engine's own; yields its address.

    `digests` are told with the links of these wheels.
    """
    for build, wheels in builds.items():
        listing = folder / build / "xllamacpp"
        listing.mkdir(parents=True)
        links = []
        for wheel in wheels:
            shutil.copy(wheel, listing / wheel.name)
            told = (digests or {}).get(wheel)
            suffix = f"#sha256={told}" if told else ""
            links.append(f'<a href="{wheel.name.replace("+", "%2B")}{suffix}">{wheel.name}</a><br>')
        (listing / "index.html").write_text(
            "<!DOCTYPE html><html><body>" + "\n".join(links) + "</body></html>"
        )
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass
