"""A Hub beside the programs under test: a process of its own, gone with the test."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self


class HubProcess:
    """`python -m arriero.testing.hub`, used as `with HubProcess(…) as hub`."""

    def __init__(self, *arguments: str, **repos: Path) -> None:
        given = [f"--repo={name.replace('__', '/')}={folder}" for name, folder in repos.items()]
        argv = [sys.executable, "-m", "arriero.testing.hub", *arguments, *given]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        #: What HF_ENDPOINT is to be.
        self.url = self._process.stdout.readline().decode().strip()
        assert self.url, "the Hub did not start"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Have its process stand still meanwhile; its connections stay."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it; safe to call twice."""
        self._process.kill()
        self._process.communicate()
