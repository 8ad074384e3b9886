"""What do the tests of models share: small model files, small limits, a provisioner on a folder?"""

import contextlib
import hashlib
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path

from arriero.agent.catalog import ModelCatalog
from arriero.agent.fetch import FetchLimits
from arriero.agent.provisioner import ModelProvisioner, ProvisionLimits
from arriero.agent.retries import RetryLimits
from arriero.contracts.errors import ErrorCode, fail
from arriero.contracts.records import DownloadRecord
from arriero.engines.base import ModelFacts
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SeededEntropy

SIZE_BYTES = 300_000


def gguf(seed: int = 1, size_bytes: int = SIZE_BYTES) -> bytes:
    """Return bytes that `inspect` takes for a model: magic, length, noise."""
    head = b"GGUF" + size_bytes.to_bytes(8, "little")
    return head + random.Random(seed).randbytes(size_bytes - len(head))


def inspect(path: Path) -> ModelFacts:
    """Read the header of such a file; as strict as the real one."""
    content = path.read_bytes()
    if content[:4] != b"GGUF" or int.from_bytes(content[4:12], "little") != len(content):
        fail(ErrorCode.MODEL_CORRUPTED, f"{path.name} is no whole GGUF file")
    return ModelFacts(
        architecture="llama",
        block_count=4,
        context_length=512,
        vocabulary_size=1000,
        quantisation="Q8_0",
        parameters=1_000_000,
        file_bytes=len(content),
        has_chat_template=True,
        is_embedding=False,
    )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def small_limits(
    *,
    attempts: int = 3,
    stall_s: float = 30.0,
    progress_bytes: int = 2**40,
    peer_back_s: float = 0.0,
    rate_bytes_per_s: float = 0.0,
) -> ProvisionLimits:
    return ProvisionLimits(
        fetch=FetchLimits(
            connect_s=30.0,
            stall_s=stall_s,
            retry=RetryLimits(attempts=attempts, base_s=0.001, cap_s=0.01),
            progress_bytes=progress_bytes,
            block_bytes=16_384,
            interval_s=0.0,
            peer_back_s=peer_back_s,
            rate_bytes_per_s=rate_bytes_per_s,
        )
    )


@dataclass(slots=True)
class Kit:
    """A provisioner with its catalog; `changes` is what `on_change` was told."""

    provisioner: ModelProvisioner
    catalog: ModelCatalog
    models_dir: Path
    changes: list[DownloadRecord]

    def files(self) -> list[str]:
        """Return all files below the models folder."""
        found = self.models_dir.rglob("*")
        return sorted(str(path.relative_to(self.models_dir)) for path in found if path.is_file())


@contextlib.asynccontextmanager
async def kit_in(
    folder: Path,
    *,
    limits: ProvisionLimits | None = None,
    hf_endpoint: str | None = None,
    models_dir: Path | None = None,
    inspect: Callable[[Path], ModelFacts] = inspect,
) -> AsyncGenerator[Kit, None]:
    clock = SystemClock()
    changes: list[DownloadRecord] = []
    catalog = await ModelCatalog.open(folder / "agent.db", models_dir or folder / "models", clock)
    try:
        async with ModelProvisioner(
            catalog,
            clock=clock,
            entropy=SeededEntropy(7),
            inspect=inspect,
            limits=limits or small_limits(),
            hf_endpoint=hf_endpoint,
            on_change=changes.append,
        ) as provisioner:
            yield Kit(provisioner, catalog, catalog.models_dir, changes)
    finally:
        await catalog.close()
