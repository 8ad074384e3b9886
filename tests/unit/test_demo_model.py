"""Is the demo model in the package the one that was trained and tested?"""

import hashlib
import json
from pathlib import Path

from arriero import demo_model

_REFERENCE_FILE = Path(__file__).parents[1] / "reference" / "demo_tokens.json"


def test_the_file_has_the_recorded_hash() -> None:
    assert hashlib.sha256(demo_model.path().read_bytes()).hexdigest() == demo_model.SHA256


def test_the_file_has_the_recorded_size_and_stays_small() -> None:
    assert demo_model.path().stat().st_size == demo_model.SIZE_BYTES
    assert demo_model.SIZE_BYTES < 2_000_000


def test_the_file_is_gguf_version_3() -> None:
    with demo_model.path().open("rb") as file:
        assert file.read(8) == b"GGUF\x03\x00\x00\x00"


def test_the_reference_tokens_belong_to_this_file() -> None:
    reference = json.loads(_REFERENCE_FILE.read_text(encoding="utf-8"))
    assert reference["sha256"] == demo_model.SHA256
