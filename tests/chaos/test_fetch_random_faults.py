"""Whatever a server does, in whatever order: the right bytes, or an honest error; never a mixture.

Method: scripts of random faults from a seed, told in the test's name.  The file may even change
under the same address; then one of its versions must come, whole.
"""

import base64
import hashlib
import random
from pathlib import Path

import pytest
from tests.integration.model_files import SIZE_BYTES, gguf, kit_in, small_limits

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.testing.fault_server import Answer, FaultServer

OLD, NEW = gguf(1), gguf(2)
EXPECTED = {ErrorCode.DOWNLOAD_FAILED, ErrorCode.MODEL_CORRUPTED}


def _random_answer(chance: random.Random) -> Answer:
    content, etag = chance.choice([(OLD, '"old"'), (OLD, '"old"'), (NEW, '"new"')])
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    some_bytes = chance.randrange(SIZE_BYTES)
    faults: list[dict[str, object]] = [
        {},
        {"cut_after": some_bytes},
        {"cut_after": some_bytes, "ignores_range": True},
        {"cut_after": some_bytes, "has_length": False},
        {"status": 500},
        {"is_gzipped": True},
        {"content_range": f"bytes {some_bytes}-{SIZE_BYTES - 1}/{SIZE_BYTES}"},
        {"claimed_length": some_bytes},
        {"etag": chance.choice(["", 'W/"weak"'])},
        {"content": b"GGUF" + chance.randbytes(some_bytes)},
    ]
    fields = {"content": content, "etag": etag, **chance.choice(faults)}
    if fields["content"] is content and chance.random() < 0.5:
        fields["headers"] = {"Repr-Digest": f"sha-256=:{digest}:"}
    return Answer(**fields)  # type: ignore[arg-type]  # The fields are chosen by name.


@pytest.mark.parametrize("seed", range(40))
async def test_random_faults(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    answers = [_random_answer(chance) for _ in range(chance.randrange(1, 8))]
    limits = small_limits(attempts=4, progress_bytes=chance.choice([2**40, 20_000]))
    async with FaultServer(OLD, answers) as server:
        ref = f"{server.url}/m.gguf"
        for _ in range(3):  # Each time a new agent on the same folder.
            async with kit_in(tmp_path, limits=limits) as kit:
                try:
                    record, path = await kit.provisioner.ensure(ref)
                except ArrieroError as error:
                    assert error.code in EXPECTED, error
                    assert not [file for file in kit.files() if not file.startswith(".partial/")]
                else:
                    content = path.read_bytes()
                    assert content in (OLD, NEW)
                    assert record.sha256 == hashlib.sha256(content).hexdigest()
                    return
