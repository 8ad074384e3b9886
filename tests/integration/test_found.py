"""Is what huggingface_hub itself has fetched found, as it lays it out?

Method: the real client fetches from the tiny Hub into a cache of its own.
"""

from pathlib import Path

import huggingface_hub
import pytest
from tests.integration.model_files import gguf, sha256

from arriero.agent.files import in_thread
from arriero.agent.found import by_content, by_name, scan
from arriero.agent.hub import Hub
from arriero.agent.hub_http import close_connections
from arriero.contracts.refs import HfRef
from arriero.testing.hub import HubServer


async def test_what_the_hub_names_is_found_in_the_cache_of_the_real_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    parts = {f"Q8_0/m-{part:05d}-of-00002.gguf": gguf(part) for part in (1, 2)}
    async with HubServer() as hub:
        repo = hub.add("o/r", {**parts, "mmproj-F16.gguf": gguf(3), "README.md": b"hello"})

        def fetch_all() -> None:
            for name in repo.files:
                huggingface_hub.hf_hub_download("o/r", name, cache_dir=tmp_path / "hub", endpoint=hub.url)

        await in_thread(fetch_all)
        model = await Hub(hub.url).resolve(HfRef("o/r", quant="Q8_0"), 0.0)
    close_connections()
    env = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    (there,) = scan(env, tmp_path, tmp_path)
    assert there.revision == model.revision == repo.commit
    assert (
        list(there.sha256s) == [file.sha256 for file in model.files] == [sha256(gguf(n)) for n in (1, 2, 3)]
    )
    assert by_name(env, tmp_path, HfRef("o/r", quant="Q8_0")) == there
    sha256s, sizes = [file.sha256 or "" for file in model.files], [file.size_bytes for file in model.files]
    assert by_content(env, tmp_path, sha256s, sizes, tmp_path) == there
