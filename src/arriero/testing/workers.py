"""How is a real worker started by hand, as its agent would, and looked at from outside?"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import msgspec

from arriero.contracts.records import WorkerExit
from arriero.contracts.requests import ReadyCallback, WorkerSpec
from arriero.runtime import processes, state_dir
from arriero.runtime.processes import Identity

START_S: Final = 90.0
STOP_S: Final = 40.0
_LOOK_S: Final = 0.01


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    """Wait, blocking, until a condition holds.  Raises TimeoutError that says `what` did not come."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(_LOOK_S)


class CallbackReceiver:
    """An agent's callback route, and nothing else of an agent.

    Answers with `statuses` in turn, the last one for ever.
    """

    def __init__(self, statuses: Sequence[int] = (200,)) -> None:
        self.statuses = list(statuses)
        self.received: list[ReadyCallback] = []
        self.authorizations: list[str] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                number = min(len(receiver.authorizations), len(receiver.statuses) - 1)
                receiver.authorizations.append(self.headers.get("Authorization", ""))
                self.send_response(receiver.statuses[number])
                self.send_header("Content-Length", "0")
                self.end_headers()
                receiver.received.append(msgspec.json.decode(content, type=ReadyCallback))

            def log_message(self, *arguments: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="callbacks")
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/workers/ready"

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(30)


class HandWorker:
    """A worker process that we own."""

    def __init__(
        self,
        spec: WorkerSpec,
        folder: Path,
        *,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.spec = spec
        self.log_path = folder / f"{spec.worker_id}.log"
        self.run_dir = Path(spec.run_dir)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "arriero", "worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=None if env is None else {**os.environ, **env},
            )
        assert self.process.stdin is not None
        with self.process.stdin as stdin:
            stdin.write(msgspec.json.encode(spec) + b"\n")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def token(self) -> str:
        """The token every request to it carries."""
        return self.spec.token

    @property
    def headers(self) -> dict[str, str]:
        """The header that carries the token."""
        return {"Authorization": f"Bearer {self.spec.token}"}

    @property
    def url(self) -> str:
        """Its address, as it logged it.  Waits for that."""
        wait_until(lambda: bool(self.logged("listening")) or self.process.poll() is not None, "listening")
        lines = self.logged("listening")
        assert lines, self.log()
        return str(lines[0]["url"])

    def log(self) -> str:
        """Return all it wrote."""
        return self.log_path.read_text("utf-8", "replace")

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the log lines of an event."""
        found = []
        for line in self.log().splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") == event:
                    found.append(entry)
        return found

    def states(self) -> list[str]:
        """Return the states it logged, in order (idle and busy after the first idle are not logged)."""
        return [line["state"] for line in self.logged("state")]

    def wait_state(self, state: str, timeout_s: float = START_S) -> None:
        """Wait until it logged a state.  Raises TimeoutError, with the log, if it does not or ends."""
        try:
            wait_until(lambda: state in self.states() or self.process.poll() is not None, state, timeout_s)
        finally:
            if state not in self.states():
                sys.stderr.write(self.log())
        if state not in self.states():
            raise TimeoutError(f"the worker ended before it was {state}: {self.process.poll()}")

    def wait_logged(self, event: str, timeout_s: float = START_S) -> None:
        """Wait until it logged an event.  Raises TimeoutError if it does not."""
        wait_until(lambda: bool(self.logged(event)), event, timeout_s)

    def wait_exit(self, timeout_s: float = STOP_S) -> int:
        """Wait for its end and return its exit code."""
        return self.process.wait(timeout_s)

    def exit_file(self) -> WorkerExit | None:
        """Return what it wrote down of its end."""
        return state_dir.read(self.run_dir / "exit.json", WorkerExit)

    def children(self) -> list[Identity]:
        """Return its child processes (the engine's)."""
        import psutil

        try:
            found = psutil.Process(self.pid).children(recursive=True)
        except psutil.Error:
            return []
        return [known for child in found if (known := processes.identity(child.pid)) is not None]

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def close(self) -> None:
        """End it and all it started, however it stands."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        processes.signal_group(self.pid, signal.SIGKILL)
        self.process.wait(STOP_S)
        shutil.rmtree(self.run_dir, ignore_errors=True)


class HandStarter:
    """Starts workers and their callback receivers in a folder, and ends them all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self.workers: list[HandWorker] = []

    def callbacks(self, statuses: Sequence[int] = (200,)) -> CallbackReceiver:
        """Return a receiver of callbacks that answers."""
        receiver = CallbackReceiver(statuses)
        self._stack.callback(receiver.close)
        return receiver

    def start(
        self,
        *,
        wait_for: str | None = "idle",
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        **fields: Any,
    ) -> HandWorker:
        """Start a worker with the fake engine (or what `fields` of its spec say) and wait for a state.

        `prefix` is a command that becomes the worker's, `env` is added to its environment.
        """
        worker_id = fields.pop("worker_id", f"w-{secrets.token_hex(6)}")
        run_dir = state_dir.socket_dir(worker_id)
        run_dir.mkdir(mode=0o700)
        spec = WorkerSpec(
            **{
                "worker_id": worker_id,
                "node": "here",
                "model_ref": "demo",
                "model_path": "/nonexistent/model.gguf",
                "token": secrets.token_hex(16),
                "port_base": 21_000 + secrets.randbelow(4_000),
                "engine": "fake",
                "run_dir": str(run_dir),
                **fields,
            }
        )
        worker = HandWorker(spec, self._folder, env=env, prefix=prefix)
        self.workers.append(worker)
        self._stack.callback(worker.close)
        if wait_for is not None:
            worker.wait_state(wait_for)
        return worker

    def close(self) -> None:
        """End everything."""
        self._stack.close()


@contextlib.contextmanager
def hand_starter(folder: Path) -> Iterator[HandStarter]:
    """Hold a starter; everything it started is gone afterwards."""
    starter = HandStarter(folder)
    try:
        yield starter
    finally:
        starter.close()
