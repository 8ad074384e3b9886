"""How fast does an agent fetch one large file from loopback, beside `curl -s URL | sha256sum`?

`python -m tests.bench.download` runs it alone.  Each round is the agent's own process from the request
to the file in the catalog: fetched over several connections, hashed, synced, its header read.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arriero.client.api import download_frames
from arriero.contracts.states import DownloadState
from arriero.testing.agents import AgentProcess
from arriero.testing.gguf_writer import U32, GgufFile, Tensor, llama_file

SIZE_BYTES = 1 << 30
ROUNDS = 3


def model(size_bytes: int) -> GgufFile:
    """Return a small Llama with one tensor more that makes it as large as it shall be."""
    file = llama_file()
    width = 4096
    file.tensors.append(Tensor("ballast.weight", (width, size_bytes // (2 * width))))
    file.set("general.file_type", U32, 1)
    return file


@contextmanager
def serving(path: Path) -> Iterator[str]:
    """Serve one file from a process of its own; yield its address."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("file_server.py")), str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}/{path.name}"
    finally:
        server.kill()
        server.wait(10)
        assert server.stdout is not None
        server.stdout.close()


class Usage:
    """The CPU and the memory of a process while a block runs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self.peak_bytes = 0

    def __enter__(self) -> "Usage":
        self._cpu_s, self._rss_bytes = cpu_s(self._pid), rss_bytes(self._pid)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watcher.join()
        self.cpu_s = cpu_s(self._pid) - self._cpu_s
        self.extra_bytes = self.peak_bytes - self._rss_bytes

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, rss_bytes(self._pid))


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def piped_s(url: str) -> float:
    start = time.perf_counter()
    with subprocess.Popen(["curl", "-s", url], stdout=subprocess.PIPE) as curl:
        subprocess.run(["sha256sum"], stdin=curl.stdout, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def fetched_s(agent: AgentProcess, url: str) -> float:
    """Have the agent fetch the model; remove it afterwards, so that the next round fetches it again."""
    start = time.perf_counter()
    download_id = agent.client.start_download(url).download_id
    with agent.client.download_progress(download_id, silence_s=120.0) as stream:
        last = list(download_frames(stream))[-1]
    seconds = time.perf_counter() - start
    assert last.stage is DownloadState.COMPLETE, last
    for record in agent.client.models():
        agent.client.remove_model(record.model_id)
    return seconds


def measure(size_bytes: int = SIZE_BYTES, rounds: int = ROUNDS) -> dict[str, Any]:
    """Interleave the two round by round, after one of each that does not count."""
    piped: list[float] = []
    fetched: list[float] = []
    spent: list[float] = []
    extra: list[int] = []
    with tempfile.TemporaryDirectory(prefix="arriero-bench-") as folder:
        path = model(size_bytes).write(Path(folder) / "large.gguf")
        with serving(path) as url, AgentProcess(Path(folder) / "home") as agent:
            assert agent.process is not None
            piped_s(url)
            for _ in range(rounds):
                piped.append(piped_s(url))
                with Usage(agent.process.pid) as usage:
                    fetched.append(fetched_s(agent, url))
                spent.append(usage.cpu_s)
                extra.append(usage.extra_bytes)
    ratios = [one / other for one, other in zip(piped, fetched, strict=True)]
    return {
        "mib": size_bytes >> 20,
        "curl_sha256sum_s": round(statistics.median(piped), 2),
        "agent_s": round(statistics.median(fetched), 2),
        "of_curl": round(statistics.median(ratios), 3),
        "agent_cpu_s": round(statistics.median(spent), 2),
        "agent_extra_mb": round(max(extra) / 1e6, 1),
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
