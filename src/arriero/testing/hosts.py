"""Three machines on one: how does a test get hosts with an sshd, a home and a network each, and break them?

    with Hosts(folder) as hosts:
        NodeAddress.parse(hosts[0].target, key_path=str(hosts[0].key), host_key=hosts[0].fingerprint())
        hosts[0].cut()

Each has processes, /tmp, /run, root's home and an address of its own, and no way to anybody but this
machine: no package index can be reached.  Everything is gone at the end, also when whoever made them
is killed.  Needs root on Linux; `why_not()` says what is missing.
"""

import asyncio
import contextlib
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

import psutil

from arriero.testing import namespaces
from arriero.testing.fault_proxy import FaultProxy
from arriero.testing.namespaces import INTERFACE, RUN, Namespace
from arriero.testing.sshd import Place, SshServer, sshd_path

#: A command that runs when nothing else does takes a few ms.
SLOW_START_S: Final = 60.0
_USER: Final = re.compile(r'"([^"]+)",pid=')


class Listener(NamedTuple):
    """Who listens where."""

    address: str
    port: int
    process: str


def why_not() -> str | None:
    """Return why there can be no `Hosts` here; None if there can."""
    if sshd_path() is None:
        return "sshd is not installed (openssh-server)"
    with tempfile.TemporaryDirectory(prefix="arriero-") as folder:
        return namespaces.why_not(Path(folder))


class Host(Namespace):
    """A machine with an SSH server; its first user is root."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, name)
        self._server: SshServer | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            place = Place(self.address, 22, self.enter, RUN / "ssh", self.env)
            self._server = SshServer(self.folder / "run/ssh", place=place)
            self._server.__enter__()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End it, and every process in it.  Safe to call twice."""
        super().close()
        if self._server is not None:
            self._server.kill()
            self._server = None

    # --- What tests read -----------------------------------------------------------------

    @property
    def server(self) -> SshServer:
        """Its SSH server."""
        assert self._server is not None, "used outside of its `with`"
        return self._server

    @property
    def target(self) -> str:
        """Its address, as a person gives it."""
        return f"{self.server.user}@{self.address}"

    @property
    def key(self) -> Path:
        """A private key that is let in."""
        return self.server.key

    @property
    def wrong_key(self) -> Path:
        """A private key that is not."""
        return self.server.wrong_key

    def fingerprint(self) -> str:
        """Return the SHA-256 of its host key."""
        return self.server.fingerprint()

    def known_hosts_line(self) -> str:
        """Return what known_hosts holds of it."""
        return self.server.known_hosts_line()

    def listening(self) -> list[Listener]:
        """Return all TCP listeners there, by port."""
        found = []
        for line in self.run(["ss", "-ltnHp"]).stdout.splitlines():
            fields = line.split()
            address, _, port = fields[3].rpartition(":")
            user = _USER.search(line)
            found.append(Listener(address.strip("[]"), int(port), user[1] if user is not None else ""))
        return sorted(found, key=lambda listener: (listener.port, listener.address))

    # --- What tests do to it -------------------------------------------------------------

    def cut(self) -> None:
        """Take its cable out: who sends hears, after a while, that there is no way."""
        self.run(["ip", "link", "set", INTERFACE, "down"])

    def drop_packets(self) -> None:
        """Throw away all that comes and goes: connections stay open, and nobody is told."""
        self._filter("drop")

    def lose(self, percent: int) -> None:
        """Throw away so many of a hundred packets, in each direction."""
        self._filter(f"numgen random mod 100 < {percent} drop" if percent < 100 else "drop")

    def heal(self) -> None:
        """Put the cable in and throw nothing away any more."""
        self.run(["nft", "-f", "-"], stdin="table inet faults\ndelete table inet faults\n")
        self.run(["ip", "link", "set", INTERFACE, "up"])

    def restart_sshd(self) -> None:
        """Kill its SSH server and all of its connections, and start it again; commands go on."""
        self.server.restart()

    def end_all(self) -> None:
        """Kill all that runs there but its SSH server, also sessions whose clients could not say goodbye."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if not self.server.is_listener(process):
                    process.kill()

    @contextlib.contextmanager
    def slow(self, delay_ms: float) -> Iterator[str]:
        """Yield another target of the same SSH server, every answer of which comes so much later."""
        with _Relay(self.address, self.server.port, delay_ms / 2000) as port:
            yield f"{self.server.user}@127.0.0.1:{port}"

    def _filter(self, rule: str) -> None:
        # What the machine's programs say to each other is not touched.
        lines = [
            "table inet faults",
            "delete table inet faults",
            "table inet faults {",
            "chain came { type filter hook input priority -300; policy accept;",
            f'iifname "{INTERFACE}" {rule};',
            "}",
            "chain goes { type filter hook output priority -300; policy accept;",
            f'oifname "{INTERFACE}" {rule};',
            "}",
            "}",
        ]
        self.run(["nft", "-f", "-"], stdin="\n".join(lines) + "\n")


class Hosts:
    """`count` machines, called host1, host2…; their folders lie in `folder`."""

    def __init__(self, folder: Path, count: int = 3) -> None:
        self._hosts = [Host(folder / f"host{number}", f"host{number}") for number in range(1, count + 1)]
        self._stack = contextlib.ExitStack()

    def __getitem__(self, index: int) -> Host:
        return self._hosts[index]

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for host in self._hosts:
                stack.enter_context(host)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class _Relay:
    """A `FaultProxy` in a thread of its own: tests that wait for a command can have it too."""

    def __init__(self, host: str, port: int, delay_s: float) -> None:
        self._host = host
        self._port = port
        self._delay_s = delay_s
        self._thread = threading.Thread(target=lambda: asyncio.run(self._relay()), name="slow")
        self._listens = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._own_port = 0

    def __enter__(self) -> int:
        self._thread.start()
        assert self._listens.wait(SLOW_START_S), "the relay did not start"
        return self._own_port

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._loop is not None and self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(SLOW_START_S)

    async def _relay(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with FaultProxy(self._port, host=self._host, delay_s=self._delay_s) as proxy:
            self._own_port = proxy.port
            self._listens.set()
            await self._stop.wait()
