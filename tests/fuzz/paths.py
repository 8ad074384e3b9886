"""Does nothing that is told from outside lead out of the models folder?

    python -m tests.fuzz.paths --count 50000 --downloads 2000 --seed 1

gives hostile references, cards and records to what parses them, and has repositories with hostile
names and sizes fetched from a Hub on loopback, into a folder whose surroundings are compared after.
"""

import argparse
import asyncio
import hashlib
import os
import random
import stat
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from arriero.agent.sources import remote_file
from arriero.contracts import names, refs
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import ModelFile, ModelRecord
from arriero.testing.hub import HubServer
from tests.fuzz.gguf import scratch_folder
from tests.integration.model_files import gguf, kit_in

MODELS: Final = Path("/models")
PIECES: Final = (
    "..", ".", "", "/", "\\", "...", "....//", "%2e%2e", "%2f", "%5c", "%00", "\0", "\n", "\r\n", "\x1b[2J", "~", "~root", "$HOME", "`id`",
    "C:", "C:\\", "//host/share", "/etc/passwd", "/dev/zero", "/proc/self/mem", ".partial", "ready", "model.json", "m.gguf", "m.part",
    "a b", "-rf", "*", "?", "#", "@", ":", ";", "|", "\u202e", "\u2028", "\u2215", "\uff0f", "\u2024\u2024", "\ufeff", "é", "e\u0301",
    "x" * 255, "x" * 300, "é" * 200, "CON", "NUL", "m.gguf.part", "m-0123456789ab", "m-00001-of-00002.gguf", "mmproj", ".gguf", ".GGUF",
    ".safetensors", ".bin", "\ud800",
)  # fmt: skip
FORMS: Final = (
    "hf:{}/{}", "hf:o/r/{}", "hf:o/r/{}/{}.gguf", "hf:o/r:{}", "hf:o/r@{}", "hf:{}/{}:{}@{}", "file://{}", "file:///{}", "file:///a/{}/{}.gguf",
    "https://h/{}", "https://h/{}/{}.gguf", "https://{}/m.gguf", "http://127.0.0.1/{}", "{}", "{}:{}", "demo{}",
)  # fmt: skip
DIGEST: Final = "0123456789abcdef" * 4
DIGESTS: Final = (
    "",
    "x",
    DIGEST,
    DIGEST[:-1],
    DIGEST + "\n",
    DIGEST.upper(),
    "../" * 21 + "x",
    "sha256:" + DIGEST,
    "\0" * 64,
)
SIZES: Final = (0, 1, -1, 1 << 62, 1 << 63, -(1 << 63), 1.5, "1", None)


@dataclass(slots=True)
class Outcome:
    """What became of them."""

    accepted: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def hostile_name(chance: random.Random) -> str:
    """Return what somebody might call a file."""
    name = chance.choice(("", "/", ".", "-")).join(
        chance.choice(PIECES) for _ in range(chance.randrange(1, 4))
    )
    if chance.random() < 0.3:
        name = chance.choice(("m", "sub/m", "m-Q8_0", "../m", "/m", "x/../../m")) + name
    return name + (
        chance.choice((".gguf", ".GGUF", ".safetensors", "-Q8_0.gguf", "")) if chance.random() < 0.7 else ""
    )


def parse_many(*, seed: int, count: int) -> Outcome:
    """Give `count` references, cards and records to what parses them; see where their files would lie."""
    chance = random.Random(seed)
    outcome = Outcome()
    for _ in range(count):
        kind = chance.choice((_reference, _reference, _file, _record))
        try:
            kind(chance, outcome)
        except ArrieroError as error:
            outcome.refused[str(error.code)] += 1
            if error.code not in (ErrorCode.INVALID_MODEL_REFERENCE, ErrorCode.INVALID_MODEL_PATH):
                outcome.failures.append(f"{error.code}: {error.message}")
            msgspec.json.encode(error.body())
        except (msgspec.MsgspecError, UnicodeEncodeError):
            outcome.refused["not decoded"] += 1
    return outcome


def _reference(chance: random.Random, outcome: Outcome) -> None:
    form = chance.choice(FORMS)
    text = form.format(*(hostile_name(chance) for _ in range(form.count("{}"))))
    match refs.parse(text):
        case refs.HfRef(path=path):
            outcome.accepted["hf"] += 1
            if path is not None:
                _is_inside(text, MODELS / "m-0123456789ab", path, outcome)
        case refs.HttpsRef() as ref:
            outcome.accepted["https"] += 1
            _is_inside(text, MODELS / "m-0123456789ab", remote_file(ref).name, outcome, is_plain=True)
        case refs.FileRef(path=path):
            outcome.accepted["file"] += 1
            if os.path.normpath(path) != path.replace("//", "/").replace("/./", "/").rstrip(
                "/"
            ) and ".." in path.split("/"):
                outcome.failures.append(f"{text!r} climbs: {path!r}")
        case refs.DemoRef():
            outcome.accepted["demo"] += 1


def _file(chance: random.Random, outcome: Outcome) -> None:
    told = {
        "name": hostile_name(chance),
        "size_bytes": chance.choice(SIZES),
        "sha256": chance.choice(DIGESTS),
    }
    if chance.random() < 0.5:
        told |= {"size_bytes": 1, "sha256": DIGEST}
    if chance.random() < 0.5:
        file = msgspec.convert(told, ModelFile)  # As of another node, decoded already.
    else:
        file = msgspec.json.decode(msgspec.json.encode(told), type=ModelFile)
    outcome.accepted["card"] += 1
    _is_inside(repr(told), MODELS / "m-0123456789ab", file.name, outcome, is_plain=True)
    if file.sha256 != DIGEST or file.size_bytes < 0:
        outcome.failures.append(f"{told} was believed")


def _record(chance: random.Random, outcome: Outcome) -> None:
    told = {
        "model_id": chance.choice(("m-0123456789ab", hostile_name(chance))),
        "model_ref": "hf:o/r",
        "provider": "hf",
        "files": [chance.choice(("m.gguf", hostile_name(chance)))],
        "size_bytes": 1,
        "sha256": DIGEST,
        "added_unix": 0.0,
    }
    record = msgspec.convert(told, ModelRecord)
    outcome.accepted["record"] += 1
    _is_inside(repr(told), MODELS, record.model_id, outcome, is_plain=True)
    _is_inside(repr(told), MODELS / record.model_id, record.files[0], outcome, is_plain=True)


def _is_inside(given: str, folder: Path, name: str, outcome: Outcome, *, is_plain: bool = False) -> None:
    path = os.path.normpath(os.path.join(folder, name))  # noqa: PTH118  As the system would join it.
    is_below = path.startswith(f"{folder}/") and "\0" not in path
    if (
        not is_below
        or (is_plain and Path(path).parent != folder)
        or (is_plain and not names.is_file_name(name[:100]))
    ):
        outcome.failures.append(f"{given!r} leads to {path!r}")


# --- Real downloads ----------------------------------------------------------------------------


def picture(folder: Path, *, without: Path | None = None) -> dict[str, str]:
    """Return what a folder and all below it is, links not followed: kind, rights, time and content."""
    seen = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        if without is not None and path.is_relative_to(without):
            continue
        status = path.lstat()
        told = f"{stat.filemode(status.st_mode)} {status.st_mtime_ns}"
        if path.is_symlink():
            told += f" {path.readlink()}"
        elif path.is_file():
            told += hashlib.sha256(path.read_bytes()).hexdigest()
        seen[str(path.relative_to(folder))] = told
    return seen


async def fetch_many(*, seed: int, count: int, folder: Path) -> Outcome:
    """Fetch from `count` repositories with hostile names and sizes, into a folder with surroundings."""
    chance = random.Random(seed)
    outcome = Outcome()
    surroundings = folder / "surroundings"
    models = surroundings / "home" / "models"
    models.mkdir(parents=True)
    for name in ("m.gguf", "home/m.gguf", "home/model.json", "home/m.gguf.part", "m-Q8_0.gguf"):
        (surroundings / name).write_text("not to be touched")
    before = picture(surroundings, without=models)
    async with HubServer() as hub, kit_in(folder, hf_endpoint=hub.url, models_dir=models) as kit:
        for number in range(count):
            many = range(chance.randrange(1, 4))
            given = [_sendable(hostile_name(chance) + chance.choice(("", ".gguf"))) for _ in many]
            files = {name: gguf(number, 1000 + chance.randrange(3)) for name in given}
            repo = hub.add("o/r", files)
            if chance.random() < 0.1:
                repo.claimed_sizes[chance.choice(list(repo.files))] = chance.choice((-1, 1, 1 << 40, 1 << 63))
            wanted = chance.choice(("hf:o/r", "hf:o/r:Q8_0"))
            try:
                record, path = await kit.provisioner.ensure(wanted)
            except ArrieroError as error:
                outcome.refused[str(error.code)] += 1
                if error.code is ErrorCode.INTERNAL_ERROR:
                    outcome.failures.append(f"{list(files)}: {error.message}")
            else:
                outcome.accepted["hf"] += 1
                if (
                    path.parent != models / record.model_id
                    or path.is_symlink()
                    or not names.is_file_name(path.name)
                ):
                    outcome.failures.append(f"{list(files)} became {path}")
                await kit.catalog.remove(record.model_id)
            if picture(surroundings, without=models) != before:
                outcome.failures.append(f"{list(files)} changed what lies outside")
                break
    return outcome


def _sendable(name: str) -> str:
    return name.encode("utf-8", "replace").decode() or "empty"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--downloads", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    start = time.monotonic()
    parsed = parse_many(seed=options.seed, count=options.count)
    with tempfile.TemporaryDirectory(prefix="arriero-fuzz-", dir=scratch_folder()) as name:
        fetched = asyncio.run(fetch_many(seed=options.seed, count=options.downloads, folder=Path(name)))
    for outcome in (parsed, fetched):
        print(
            f"accepted {dict(outcome.accepted)}, refused {dict(outcome.refused)}, {len(outcome.failures)} failures"
        )
        for what in outcome.failures[:20]:
            print(f"    {what}")
    print(f"seed {options.seed}: {time.monotonic() - start:.0f} s")
    return 1 if parsed.failures or fetched.failures else 0


if __name__ == "__main__":
    sys.exit(main())
