"""Does each engine keep what all engines promise?"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from arriero.contracts.requests import Sampling
from arriero.engines import registry
from arriero.engines.base import Engine, EngineRequest, EngineSpec
from arriero.testing.engine_suite import EngineSuite
from arriero.testing.gguf_writer import LlamaShape, llama_file, write_llama

#: A batch of 256 tokens takes it some tenths of a second.
SLOW = LlamaShape(layers=4, embedding=512, heads=8, heads_kv=8, feed_forward=2048)


class TestFakeEngine(EngineSuite):
    def make_engine(self) -> Engine:
        return registry.kind("fake").create()

    def make_spec(self, folder: Path) -> EngineSpec:
        return EngineSpec(folder / "any", run_dir=folder / "run")

    def make_slow_spec(self, folder: Path) -> EngineSpec:
        return replace(self.make_spec(folder), options={"token_s": 0.02})

    def make_broken_spec(self, folder: Path) -> EngineSpec:
        return replace(self.make_spec(folder), options={"fail_load": "the script says so"})

    def make_unicode_request(self) -> EngineRequest:
        return EngineRequest("r", prompt="ñandú 🦙🦙", sampling=Sampling(max_tokens=10))


class TestFakeEngineWithProcess(TestFakeEngine):
    def make_spec(self, folder: Path) -> EngineSpec:
        return replace(super().make_spec(folder), options={"child": True})

    def make_slow_spec(self, folder: Path) -> EngineSpec:
        return replace(self.make_spec(folder), options={"child": True, "token_s": 0.02})


class TestLlamaCppEngine(EngineSuite):
    @pytest.fixture(autouse=True)
    def short_folder(self) -> Iterator[None]:
        with tempfile.TemporaryDirectory(prefix="arriero-") as folder:
            self.run_dir = Path(folder)
            yield

    def make_engine(self) -> Engine:
        return registry.kind("llamacpp").create()

    def make_spec(self, folder: Path) -> EngineSpec:
        path = folder / "tiny.gguf"
        return EngineSpec(path if path.exists() else write_llama(path), run_dir=self.run_dir)

    def make_slow_spec(self, folder: Path) -> EngineSpec:
        return replace(self.make_spec(folder), model_path=write_llama(folder / "slow.gguf", SLOW))

    def make_broken_spec(self, folder: Path) -> EngineSpec:
        file = llama_file()
        # A header that can be believed, and a tensor less than the engine needs.
        file.tensors = [tensor for tensor in file.tensors if tensor.name != "blk.1.ffn_up.weight"]
        return replace(self.make_spec(folder), model_path=file.write(folder / "broken.gguf"))

    def make_unicode_request(self) -> EngineRequest:
        return EngineRequest(
            "r",
            prompt="one two",
            sampling=Sampling(temperature=0.0),
            chat_options={"json_schema": {"const": "é€🙂 ñandú 漢字"}},
        )
