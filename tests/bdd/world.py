"""What does one scenario know?  (`World`)

A scenario stands outside: it starts programs, speaks HTTP, reads exit codes.  It ends everything it
started, and fails if something of its pool is left behind or a failure was never looked at.
"""

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arriero.contracts.records import WorkerRecord
from arriero.testing.pool import ARRIERO, Pool, eventually

LOG = logging.getLogger("bdd")
PROGRAM_TIMEOUT_S = 180.0
READY_LINE_S = 60.0
#: With a probe, where the scenario says nothing of it.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class ErrorResponse:
    """The error a program ended with."""

    code: str
    message: str
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Server:
    """A program that plays a broken part."""

    process: subprocess.Popen[str]
    url: str


@dataclass
class World:
    """The state of one scenario."""

    pool: Pool | None = None
    last_exit_code: int | None = None
    last_error: ErrorResponse | None = None
    #: Frames of event streams, as they were read.
    events: list[dict[str, Any]] = field(default_factory=list)
    #: Texts of the tokens that were received.
    tokens: list[str] = field(default_factory=list)
    #: What the last program told on stdout, as JSON.
    answer: dict[str, Any] = field(default_factory=dict)
    #: Addresses by the names that feature files use.
    addresses: dict[str, str] = field(default_factory=dict)
    #: Replaces the look-up where a broken server plays the part.
    url: str | None = None
    is_agent_asked: bool = False
    worker_id: str | None = None
    model: str = "demo"
    prompt: str = "Count from 5 to 25."
    max_tokens: int | None = None
    #: The user's patience with the next program.
    timeout_s: float | None = None
    #: Done while the next program runs, once it has begun.
    meanwhile: Callable[[], None] | None = None
    #: Files and what else a scenario remembers, by name.
    kept: dict[str, Any] = field(default_factory=dict)
    #: Ends what `keep` was given, last first.
    ends: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _is_failure_seen: bool = True
    _tmp: Path | None = None
    _words_path: Path = Path("/nonexistent")
    _before_stop: list[Callable[[], object]] = field(default_factory=list)

    # --- Parts ------------------------------------------------------------------------------------

    @property
    def tmp(self) -> Path:
        """A folder of the scenario's own."""
        if self._tmp is None:
            self._tmp = Path(self.ends.enter_context(tempfile.TemporaryDirectory(prefix="bdd-")))
        return self._tmp

    def make_pool(self, **settings: object) -> Pool:
        """Return this scenario's pool, made now and not started; later settings are added to it."""
        if self.pool is None:
            self.pool = self.ends.enter_context(Pool())
        for name, value in settings.items():
            self.pool.setting(name, value)
        return self.pool

    @property
    def running_pool(self) -> Pool:
        """The pool of a scenario that has one."""
        assert self.pool is not None, "the scenario has no pool"
        return self.pool

    def start_server(self, module: str, *arguments: str) -> Server:
        """Start a program that tells its address in its first line, ended with the scenario."""
        process = self.ends.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self.ends.callback(process.kill)
        self.ends.callback(process.stdin.close)
        ready, _, _ = select.select([process.stdout], [], [], READY_LINE_S)
        line = process.stdout.readline() if ready else ""
        url = line.strip().removeprefix("READY ")
        assert url.startswith("http://"), f"{module} told no address: {line!r}"
        LOG.info("started %s %s at %s", module, " ".join(arguments), url)
        return Server(process, url)

    def address(self, name: str) -> str:
        """Return the address a feature file means: one that was named before, or one as it stands."""
        return self.addresses.get(name, name)

    def worker(self) -> WorkerRecord:
        """Return the scenario's worker: the one that is known, else the agent's newest."""
        workers = self.running_pool.workers()
        if self.worker_id is not None:
            workers = [record for record in workers if record.worker_id == self.worker_id]
        assert workers, "the agent has no such worker"
        return workers[-1]

    def worker_in(self, *states: str, timeout_s: float = 60.0) -> WorkerRecord:
        """Wait until the scenario's worker is in one of the states; return its record."""

        def look() -> WorkerRecord | None:
            record = self.worker()
            return record if str(record.state) in states else None

        return eventually(f"the worker is {' or '.join(states)}", look, timeout_s)

    # --- Programs ---------------------------------------------------------------------------------

    @property
    def env(self) -> dict[str, str]:
        """The environment of the programs of this scenario; without a pool, one where nothing runs."""
        if self.pool is not None:
            return self.pool.env
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ARRIERO_")}
        return {**kept, "ARRIERO_HOME": str(self.tmp / "no-pool"), "NO_COLOR": "1"}

    def probe(
        self, name: str, *arguments: str, look_up: bool = True, has_worker: bool = True
    ) -> dict[str, Any]:
        """Run `arriero probe NAME …` to its end, keep how it ended, and return what it saw."""
        given = [name, *arguments, "--json"]
        if look_up and self.url is not None:
            given += ["--url", self.url]
        elif look_up and self.is_agent_asked:
            given += ["--agent"]
        if look_up and has_worker and self.url is None and self.worker_id is not None:
            given += ["--worker", self.worker_id]
        given += ["--timeout", f"{PATIENCE_S if self.timeout_s is None else self.timeout_s:g}"]
        code, answer, words = self._run("probe", *given)
        assert answer.get("probe") == name, f"no answer of the probe: {answer} {words}"
        assert answer["exit_code"] == code, f"it says {answer['exit_code']} and exits {code}"
        self._took(code, answer["error"])
        seen: dict[str, Any] = answer["seen"]
        return seen

    def cli(self, *arguments: str) -> dict[str, Any]:
        """Run `arriero … --json` to its end, keep how it ended, and return what it answered."""
        code, answer, _ = self._run(*arguments, "--json")
        self._took(code, answer.get("error"))
        return answer

    def _run(self, *arguments: str) -> tuple[int, dict[str, Any], str]:
        meanwhile, self.meanwhile = self.meanwhile, None
        began_s = time.monotonic()
        self._words_path = self.tmp / "words"
        with (
            self._words_path.open("wb") as words_file,
            subprocess.Popen(
                [*ARRIERO, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=words_file,
                env=self.env,
                text=True,
            ) as process,
        ):
            try:
                if meanwhile is not None:
                    meanwhile()
                out, _ = process.communicate(timeout=PROGRAM_TIMEOUT_S)
            finally:
                process.kill()
        words = self._words_path.read_text("utf-8", "replace")
        took_s = time.monotonic() - began_s
        LOG.info("arriero %s: exit %s in %.2f s", " ".join(arguments), process.returncode, took_s)
        if words:
            LOG.info("stderr: %s", words.strip())
        LOG.info("stdout: %s", out.strip()[:2000])
        self.answer = json.loads(out) if out.strip().startswith("{") else {}
        return process.returncode, self.answer, words

    def hears(self, text: str, timeout_s: float = 60.0) -> None:
        """Wait until the program that runs now has said `text` on stderr."""

        def look() -> bool:
            return text in self._words_path.read_text("utf-8", "replace")

        eventually(f"the program says {text!r}", look, timeout_s)

    # --- How it went ------------------------------------------------------------------------------

    def took(self, exit_code: int, code: str | None, message: str = "", **details: Any) -> None:
        """Keep how something ended that was asked over HTTP."""
        error = None if code is None else {"code": code, "message": message, "details": details}
        self._took(exit_code, error)

    def _took(self, exit_code: int, error: Mapping[str, Any] | None) -> None:
        self.check_nothing_unseen()
        self.last_exit_code = exit_code
        self.last_error = None
        if error is not None:
            self.last_error = ErrorResponse(error["code"], error["message"], error.get("details") or {})
        assert (exit_code == 0) == (self.last_error is None), f"exit {exit_code} with {self.last_error}"
        self._is_failure_seen = exit_code == 0

    def see_failure(self) -> None:
        """Say that the scenario has looked at how the last step ended."""
        self._is_failure_seen = True

    def check_nothing_unseen(self) -> None:
        """Fail if the last step failed and the scenario passed that over."""
        assert self._is_failure_seen, f"a step ended with {self.last_exit_code} {self.last_error}"

    def at_end(self, end: Callable[[], object]) -> None:
        """Have something done when the scenario is over and its pool still runs."""
        self._before_stop.append(end)

    def close(self) -> None:
        """End everything.  Fails if the pool leaves something behind after a clean stop."""
        left: list[str] = []
        try:
            for end in self._before_stop:
                with contextlib.suppress(ProcessLookupError):
                    end()
            if self.pool is not None:
                left = self.pool.stop()
        finally:
            self.ends.close()
        assert not left, f"the pool left behind: {left}"
