"""What does a pool of a thousand machines cost the orchestrator?

`python -m tests.bench.herd` runs it alone.  The agents are simulated, in a process of their own; the
orchestrator is the real one, in another, and holds each of them as it holds a machine behind SSH, but
for SSH itself.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from arriero.testing.herd import Herd
from arriero.testing.herd_orchestrator import HerdOrchestrator
from tests.bench.download import cpu_s, rss_bytes

NODES = 1000
WORKERS_EACH = 5
#: So long the CPU of a herd at rest is measured, in pieces.
PIECES = 4
PIECE_S = 5.0
HERD_LIMIT_S = 120.0


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def at_rest(herd: Herd, orchestrator: HerdOrchestrator) -> dict[str, float]:
    """Return what the beats cost, the herd's own process beside it."""
    assert orchestrator.process is not None and herd.process is not None
    pids = {"orchestrator": orchestrator.process.pid, "herd": herd.process.pid}
    shares: dict[str, list[float]] = {name: [] for name in pids}
    beats = herd.count().beats
    started_s = time.monotonic()
    for _ in range(PIECES):
        before, start_s = {name: cpu_s(pid) for name, pid in pids.items()}, time.monotonic()
        time.sleep(PIECE_S)
        for name, pid in pids.items():
            shares[name].append((cpu_s(pid) - before[name]) / (time.monotonic() - start_s))
    return {
        "beats_per_s": round((herd.count().beats - beats) / (time.monotonic() - started_s)),
        "cpu_of_core": round(statistics.median(shares["orchestrator"]), 3),
        "herd_cpu_of_core": round(statistics.median(shares["herd"]), 3),
    }


def measure(nodes: int = NODES, workers_each: int = WORKERS_EACH) -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory(prefix="arriero-bench-") as folder,
        Herd(Path(folder) / "herd", nodes=nodes, workers_each=workers_each) as herd,
    ):
        started_s = time.monotonic()
        with HerdOrchestrator(herd, Path(folder) / "home") as orchestrator:
            joined_s = orchestrator.settled_s(since_s=started_s, limit_s=HERD_LIMIT_S)
            rest = at_rest(herd, orchestrator)
            assert orchestrator.process is not None
            pid = orchestrator.process.pid
            rss = rss_bytes(pid)
            before_s, start_s = cpu_s(pid), time.monotonic()
            herd.drop()
            again_s = orchestrator.settled_s(since_s=start_s, limit_s=HERD_LIMIT_S)
            again_cpu_s = cpu_s(pid) - before_s
            peak = peak_bytes(pid)
            orchestrator.end()
            start_s = time.monotonic()
            orchestrator.start()
            restarted_s = orchestrator.settled_s(since_s=start_s, limit_s=HERD_LIMIT_S)
            workers = len(orchestrator.client.workers())
    return {
        "nodes": nodes,
        "workers": workers,
        **rest,
        "rss_mb": round(rss / 1e6, 1),
        "peak_mb": round(peak / 1e6, 1),
        "joined_s": round(joined_s, 2),
        "again_after_drop_s": round(again_s, 2),
        "again_after_drop_cpu_s": round(again_cpu_s, 2),
        "after_restart_s": round(restarted_s, 2),
    }


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:]))))
