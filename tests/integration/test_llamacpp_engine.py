"""Does the real engine's process load, tell, fail and end as it must, whatever happens to whom?"""

import asyncio
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import Sampling
from arriero.engines import registry
from arriero.engines.base import EngineRequest, EngineSpec, LoadProgress, LoadReady, TextDelta
from arriero.engines.gguf import read_header
from arriero.engines.llamacpp_child import EXIT_BAD_SPEC, EXIT_ORPHANED
from arriero.engines.llamacpp_params import environment_of, line_of
from arriero.runtime import cgroups
from arriero.testing import gguf_writer as w
from arriero.testing.engine_suite import load

DEADLINE_S = 60.0
CHILD = [sys.executable, "-P", "-m", "arriero.engines.llamacpp_child"]
OWNER = Path(__file__).with_name("engine_owner.py")


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """290 MB of real bytes."""
    path = w.write_llama(tmp_path_factory.mktemp("large") / "large.gguf", w.LARGE)
    yield path
    path.unlink()


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    return w.write_llama(tmp_path / "tiny.gguf")


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="arriero-") as folder:
        yield Path(folder)


def forget(path: Path) -> None:
    """Have the kernel drop a file from its cache, so that the next reader waits for the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def until(check: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# --- Loading -------------------------------------------------------------------------------------


async def test_a_large_model_loads_in_steps_and_takes_what_was_estimated(
    large_model: Path, run_dir: Path
) -> None:
    kind = registry.kind("llamacpp")
    spec = EngineSpec(large_model, slots=4, context_tokens=1024, run_dir=run_dir)
    estimate = await kind.estimate(spec)
    # The engine tells a step every 200 ms at most; out of the page cache the whole load may be quicker.
    forget(large_model)
    engine = kind.create()
    events = await load(engine, spec)
    steps = [event for event in events if isinstance(event, LoadProgress)]
    ready = events[-1]
    assert isinstance(ready, LoadReady)
    await engine.unload(5.0)
    assert len(steps) >= 3
    assert all(a.fraction < b.fraction for a, b in itertools.pairwise(steps))
    assert (steps[-1].fraction, steps[-1].layers_loaded, steps[-1].layers_total) == (1.0, 12, 12)
    assert any(0 < step.layers_loaded < 12 for step in steps)
    assert steps[-1].memory_mb > steps[0].memory_mb
    # 277 MiB of weights and 48 of cache: what was reckoned is what is used, within an eighth.
    assert estimate.context_tokens == 1024
    assert estimate.device_mb == 0
    assert 0.875 < estimate.host_mb / ready.memory_mb < 1.125


async def test_the_estimate_follows_the_context(tiny_model: Path) -> None:
    kind = registry.kind("llamacpp")
    small = await kind.estimate(EngineSpec(tiny_model, slots=1, context_tokens=256))
    large = await kind.estimate(EngineSpec(tiny_model, slots=16, context_tokens=262_144))
    assert large.host_mb > small.host_mb + 500
    assert large.context_tokens == 262_144


@pytest.mark.parametrize("options", [{"load_mode": "mmap"}, {"load_mode": "direct_io"}])
async def test_other_ways_to_read_the_file(tiny_model: Path, run_dir: Path, options: dict[str, Any]) -> None:
    engine = registry.kind("llamacpp").create()
    events = await load(engine, EngineSpec(tiny_model, run_dir=run_dir, options=options))
    assert isinstance(events[-1], LoadReady)
    assert events[-1].context_tokens == 4096
    await engine.unload(5.0)


async def test_a_model_that_makes_the_engine_abort_kills_only_the_engine(
    tmp_path: Path, tiny_model: Path, run_dir: Path
) -> None:
    file = w.llama_file()
    # Tokens that occur twice: the check of headers does not keep the vocabulary.
    tokens = next(value for key, _, value in file.keys if key == "tokenizer.ggml.tokens")
    file.set("tokenizer.ggml.tokens", w.ARRAY, (w.STRING, [*tokens[1][:-1], tokens[1][0]]))
    engine = registry.kind("llamacpp").create()
    with pytest.raises(ArrieroError) as caught:
        await load(engine, EngineSpec(file.write(tmp_path / "bad.gguf"), run_dir=run_dir))
    assert caught.value.code is ErrorCode.WORKER_START_FAILED
    assert caught.value.details["signal"] == signal.SIGABRT
    assert "GGML_ASSERT" in caught.value.message
    assert any("GGML_ASSERT" in line for line in caught.value.details["log_tail"])
    await engine.unload(0.0)
    engine = registry.kind("llamacpp").create()
    await load(engine, EngineSpec(tiny_model, run_dir=run_dir))
    await engine.unload(5.0)


async def test_a_cut_file_never_reaches_the_engine(tiny_model: Path, run_dir: Path) -> None:
    os.truncate(tiny_model, 200_000)
    engine = registry.kind("llamacpp").create()
    with pytest.raises(ArrieroError) as caught:
        await load(engine, EngineSpec(tiny_model, run_dir=run_dir))
    assert caught.value.code is ErrorCode.MODEL_CORRUPTED
    assert "ends at byte" in caught.value.message
    assert not psutil.Process().children()
    await engine.unload(0.0)


async def test_a_load_that_stops_advancing_is_ended(large_model: Path, run_dir: Path) -> None:
    engine = registry.kind("llamacpp").create()
    spec = EngineSpec(large_model, run_dir=run_dir, options={"loading_stall_s": 0.5})
    with pytest.raises(ArrieroError) as caught:
        async with asyncio.timeout(DEADLINE_S):
            async for _ in engine.load(spec):
                for child in psutil.Process().children():
                    child.suspend()
    assert caught.value.code is ErrorCode.LOADING_TIMEOUT
    assert not psutil.Process().children()


async def test_unloading_while_it_loads_does_not_wait(large_model: Path, run_dir: Path) -> None:
    engine = registry.kind("llamacpp").create()
    events = engine.load(EngineSpec(large_model, run_dir=run_dir))
    await anext(events)
    async with asyncio.timeout(DEADLINE_S):
        await engine.unload(3600.0)
    assert not psutil.Process().children()
    with pytest.raises(ArrieroError) as caught:
        async for _ in events:
            pass
    assert caught.value.code is ErrorCode.WORKER_START_FAILED
    assert engine.exited() is None


async def test_nothing_falls_back_to_the_cpu(tiny_model: Path, run_dir: Path) -> None:
    import xllamacpp

    processor = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_CPU
    if any(device["type"] != processor for device in xllamacpp.get_device_info()):
        pytest.skip("this engine has an accelerator")
    engine = registry.kind("llamacpp").create()
    with pytest.raises(ArrieroError) as caught:
        await load(engine, EngineSpec(tiny_model, run_dir=run_dir, backend="cuda", device="cuda:0"))
    assert caught.value.code is ErrorCode.BACKEND_UNAVAILABLE


async def test_a_run_dir_that_cannot_be_made_is_told(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    engine = registry.kind("llamacpp").create()
    with pytest.raises(ArrieroError) as caught:
        await load(engine, EngineSpec(tiny_model, run_dir=tmp_path / "file" / "run"))
    assert caught.value.code is ErrorCode.STATE_DIR_UNUSABLE


# --- Ends ----------------------------------------------------------------------------------------


def start_child(model: Path, run_dir: Path, *, owner_pid: int | None = None) -> subprocess.Popen[bytes]:
    spec = EngineSpec(model, slots=1, context_tokens=256)
    line = json.loads(line_of(spec, read_header(model), run_dir / "e.sock", threads=1))
    line["owner_pid"] = owner_pid or os.getpid()
    child = subprocess.Popen(
        CHILD,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment_of(spec)},
    )
    assert child.stdin is not None
    child.stdin.write(json.dumps(line).encode() + b"\n")
    child.stdin.flush()
    return child


def test_the_end_of_stdin_ends_the_child(tiny_model: Path, run_dir: Path) -> None:
    with start_child(tiny_model, run_dir) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        assert any(b'"ready"' in line for line in iter(child.stdout.readline, b""))
        child.stdin.close()
        assert child.wait(DEADLINE_S) >= 0, "no signal was needed"


def test_a_child_whose_owner_is_gone_does_not_begin(tiny_model: Path, run_dir: Path) -> None:
    with start_child(tiny_model, run_dir, owner_pid=1 << 22) as child:
        assert child.wait(DEADLINE_S) == EXIT_ORPHANED


@pytest.mark.parametrize("line", [b"", b"\n", b"{}\n", b"nonsense\n"])
def test_a_bad_line_ends_the_child(line: bytes) -> None:
    ended = subprocess.run(CHILD, input=line, capture_output=True, timeout=DEADLINE_S)
    assert ended.returncode == EXIT_BAD_SPEC
    assert b"bad specification" in ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the end of stdin has to do")
@pytest.mark.parametrize("is_loading", [True, False])
def test_an_owner_that_is_killed_takes_its_engine_with_it(
    large_model: Path, tiny_model: Path, run_dir: Path, is_loading: bool
) -> None:
    model = large_model if is_loading else tiny_model
    with subprocess.Popen(
        [sys.executable, OWNER, model, run_dir], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        told = json.loads(owner.stdout.readline())
        while not is_loading and told["event"] != "LoadReady":
            told = json.loads(owner.stdout.readline())
        (pid,) = told["pids"]
        owner.kill()
    until(lambda: is_gone(pid), f"the engine {pid} lives on")


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup below ours with a limit that the large model does not fit into."""
    ours = cgroups.memory_cgroup(os.getpid())
    if ours is None or os.geteuid() != 0:
        pytest.skip("needs root and a memory cgroup")
    folder = ours / f"arriero-test-{os.getpid()}"
    try:
        folder.mkdir()
        limit = "memory.max" if (folder / "memory.max").exists() else "memory.limit_in_bytes"
        (folder / limit).write_text(str(160 << 20))
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    yield folder
    until(lambda: not (folder / "cgroup.procs").read_text(), "the cgroup is not empty")
    folder.rmdir()


@pytest.mark.root
def test_out_of_memory_is_told_by_its_proof(large_model: Path, run_dir: Path, small_cgroup: Path) -> None:
    owner = subprocess.run(
        [sys.executable, OWNER, large_model, run_dir, small_cgroup],
        stdout=subprocess.PIPE,
        text=True,
        timeout=DEADLINE_S,
    )
    told = json.loads(owner.stdout.splitlines()[-1])
    assert told["code"] == ErrorCode.OUT_OF_MEMORY
    assert told["details"]["signal"] == signal.SIGKILL
    limit = cgroups.memory_limit_and_usage(small_cgroup)
    assert limit is not None
    assert limit.limit_bytes == 160 << 20
    assert cgroups.oom_kill_count(small_cgroup) >= 1


# --- What only this engine does ------------------------------------------------------------------


async def test_inputs_of_unequal_length_are_embedded_right_together(tmp_path: Path, run_dir: Path) -> None:
    file = w.llama_file()
    file.set("llama.pooling_type", w.U32, 1)
    for model in (file.write(tmp_path / "mean.gguf"), w.write_llama(tmp_path / "chat.gguf")):
        engine = registry.kind("llamacpp").create()
        await load(engine, EngineSpec(model, slots=4, context_tokens=1024, run_dir=run_dir))
        texts = ["one two three four", "a", "and the other one " * 20]
        together, _ = await engine.embed(texts)
        for text, vector in zip(texts, together, strict=True):
            ((alone,), _) = await engine.embed([text])
            assert math.isclose(sum(map(float.__mul__, alone, vector)), 1.0, abs_tol=1e-3)
        with pytest.raises(ArrieroError) as caught:
            await engine.embed(["x " * 2000])
        assert caught.value.code is ErrorCode.CONTEXT_LENGTH_EXCEEDED
        assert caught.value.details["n_prompt_tokens"] == 4000
        await engine.unload(5.0)


async def test_a_schema_is_kept_in_a_chat(tiny_model: Path, run_dir: Path) -> None:
    engine = registry.kind("llamacpp").create()
    await load(engine, EngineSpec(tiny_model, slots=1, context_tokens=1024, run_dir=run_dir))
    schema = {"type": "object", "properties": {"ok": {"const": "sí"}}, "required": ["ok"]}
    request = EngineRequest(
        "r",
        messages=[{"role": "user", "content": "Well?"}],
        sampling=Sampling(temperature=0.0, seed=1),
        chat_options={"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
    )
    events = [event async for event in engine.stream(request)]
    await engine.unload(5.0)
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert json.loads(text) == {"ok": "sí"}
