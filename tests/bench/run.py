"""What does the path cost?  The engine's own HTTP server, the worker and the orchestrator, in one run.

`make bench` prints a table, compares it with tests/bench/baseline.json, and appends a JSON line to
reports/bench.jsonl.  `--record` makes the run the new baseline.
"""

import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from arriero.contracts.version import __version__
from arriero.runtime.state_dir import StateDir, socket_dir
from arriero.testing.hosts import why_not
from tests.bench import cancel, download, herd, links, placement
from tests.bench.load import Round, Target, one_round

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "tests/bench/baseline.json"
HISTORY = ROOT / "reports/bench.jsonl"
ARRIERO = [sys.executable, "-m", "arriero"]
PROMPT = "Once upon a time"
TOKENS_MAX = 200
ROUNDS = 7
STREAMS = (1, 4, 8)
LONG_CUT_S = 10.0


def run(*arguments: str, env: dict[str, str]) -> str:
    done = subprocess.run([*ARRIERO, *arguments], env=env, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"arriero {arguments[0]} exited {done.returncode}: {done.stderr}")
    return done.stdout


def targets_of(state: StateDir) -> list[Target]:
    orchestrator = state.running("orchestrator")
    assert orchestrator is not None
    worker = state.worker_runs()[0]
    sockets = [path for path in socket_dir(worker.record.worker_id).rglob("*") if path.is_socket()]
    front, back = urlsplit(orchestrator.url), urlsplit(worker.record.url)
    return [
        Target("engine", socket_path=str(sockets[0])),
        Target("worker", back.hostname or "", back.port or 0, token=worker.token),
        Target("orchestrator", front.hostname or "", front.port or 0),
    ]


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure_streams(targets: list[Target], pids: dict[str, int]) -> dict[str, Any]:
    """Interleave the targets round by round, so that a drift of the machine meets all alike."""
    found: dict[str, Any] = {}
    for streams in STREAMS:
        rounds: dict[str, list[Round]] = {target.name: [] for target in targets}
        cpu: dict[str, float] = dict.fromkeys(pids, 0.0)
        for number in range(ROUNDS + 1):
            for target in targets:
                before = {name: cpu_s(pid) for name, pid in pids.items()}
                result = await one_round(target, streams=streams, prompt=PROMPT, tokens_max=TOKENS_MAX)
                if number == 0:
                    continue  # Warm-up.
                rounds[target.name].append(result)
                if target.name == "orchestrator":
                    for name, pid in pids.items():
                        cpu[name] += cpu_s(pid) - before[name]
        chunks = sum(result.tokens for result in rounds["orchestrator"])
        engine = statistics.median(r.tokens_per_s for r in rounds["engine"])
        found[str(streams)] = {
            **{
                name: {
                    "tokens_per_s": round(statistics.median(r.tokens_per_s for r in results)),
                    "of_engine": round(statistics.median(r.tokens_per_s for r in results) / engine, 3),
                    "first_token_ms": round(statistics.median(r.first_token_ms for r in results), 2),
                }
                for name, results in rounds.items()
            },
            "cpu_ms_per_1000_tokens": {name: round(1e6 * spent / chunks, 1) for name, spent in cpu.items()},
        }
    return found


def wall_ms(arguments: list[str], env: dict[str, str], runs: int = 7) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run(*arguments, env=env)
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times), 1)


def measure_commands(env: dict[str, str], engine: Target) -> dict[str, float]:
    bare = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        bare.append(1000 * (time.perf_counter() - start))
    prompt = ["infer", "--quiet", "--model", "demo", "--max-tokens", "20", "Tell me a story about a llama."]
    infer = wall_ms(prompt, env)
    alone = [
        1000 * asyncio.run(one_round(engine, streams=1, prompt="Tell me a story", tokens_max=20)).seconds
        for _ in range(7)
    ]
    engine_ms = round(statistics.median(alone), 1)
    return {
        "python_ms": round(statistics.median(bare), 1),
        "version_ms": wall_ms(["version"], env),
        "infer_warm_ms": infer,
        "engine_alone_ms": engine_ms,
        "infer_added_ms": round(infer - engine_ms, 1),
    }


def show(line: dict[str, Any], baseline: dict[str, Any] | None) -> None:
    print(
        f"{'streams':>7} {'target':>13} {'tokens/s':>9} {'of engine':>10} {'first token':>12}  baseline of engine"
    )
    for streams, row in line["streams"].items():
        for name in ("engine", "worker", "orchestrator"):
            cell = row[name]
            old = baseline["streams"][streams][name]["of_engine"] if baseline else "–"
            print(
                f"{streams:>7} {name:>13} {cell['tokens_per_s']:>9} {cell['of_engine']:>10} "
                f"{cell['first_token_ms']:>9} ms  {old}"
            )
        print(f"        CPU ms per 1000 tokens: {row['cpu_ms_per_1000_tokens']}")
    print("slot free after the client left:", line["cancel"])
    print("commands:", line["commands"])
    print("download:", line["download"])
    print("herd:", line["herd"])
    print("placement:", line["placement"])
    print("links:", line["links"])


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="arriero-bench-") as folder:
        env = {
            **os.environ,
            "ARRIERO_HOME": f"{folder}/home",
            "ARRIERO_ORCHESTRATOR_PORT": "0",
            "ARRIERO_AGENT_PORT": "0",
        }
        state = StateDir(Path(env["ARRIERO_HOME"]))
        try:
            run("up", env=env)
            run("infer", "--quiet", "--model", "demo", "--max-tokens", "5", "Hello", env=env)
            targets = targets_of(state)
            orchestrator = state.running("orchestrator")
            assert orchestrator is not None
            pids = {"orchestrator": orchestrator.pid, "worker": state.worker_runs()[0].record.pid}
            line = {
                "version": __version__,
                "unix": round(time.time()),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
                "streams": asyncio.run(measure_streams(targets, pids)),
                "cancel": asyncio.run(cancel.measure({target.name: target for target in targets})),
                "commands": measure_commands(env, targets[0]),
            }
        finally:
            run("down", env=env)
    # The pool is down: nothing else computes meanwhile.
    line["download"] = download.measure()
    line["herd"] = herd.measure()
    line["placement"] = placement.measure()
    no_machines = why_not()
    line["links"] = {"not_measured": no_machines} if no_machines else links.measure(long_s=LONG_CUT_S)
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else None
    show(line, baseline)
    HISTORY.parent.mkdir(exist_ok=True)
    with HISTORY.open("a") as history:
        history.write(json.dumps(line) + "\n")
    if "--record" in sys.argv:
        BASELINE.write_text(json.dumps(line, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
