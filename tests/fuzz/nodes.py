"""Does anything execute that somebody gives for the name, host, user, path or label of a machine?

    python -m tests.fuzz.nodes --count 10000 --seed 1

Each string tries to make a file of its own, by whatever shell, option or format reads it. They are given

- to `POST /v1/nodes` and `PATCH /v1/nodes/{name}` of a real orchestrator, and a share of them to the
  command; a real sshd stands at the address, and the user's ~/.ssh/config has commands in which host
  and user stand: what is accepted goes as far as it can,
- to a command on a machine, through /bin/sh and through an sshd's login shell: they have to arrive,
- to the programs that run on a machine, as names of files and of its agent.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.fabrics.base import Connection
from arriero.fabrics.quoting import command_line
from arriero.orchestrator.machines import there, there_child
from tests.support.home import Home, until
from tests.support.machines import NO_INDEX, reached
from tests.support.remote import Remote

#: With CANARY a command that makes the file of this string.
COMMANDS: Final = (
    "$(CANARY)", "`CANARY`", ";CANARY;", "|CANARY", "&CANARY&", "&&CANARY", "||CANARY", "\nCANARY\n", "\r\nCANARY\r\n", "';CANARY;'",
    '";CANARY;"', "\\';CANARY;'", "';CANARY;#", '"$(CANARY)"', "<(CANARY)", ">(CANARY)", "${x:-$(CANARY)}", "\0CANARY", "%0aCANARY",
    "-oProxyCommand=CANARY", "-oProxyCommand=CANARY x", "-o ProxyCommand=CANARY", "--rsh=CANARY", "\nProxyCommand CANARY\n",
    "\nMatch exec \"CANARY\"\n", "' CANARY '", "}};CANARY;{{", "\u2028CANARY\u2028", "\x85CANARY\x85", "(CANARY)", "{CANARY,}", "=(CANARY)",
    "'+__import__('os').system('CANARY')+'", "\"+__import__('os').system('CANARY')+\"", "\\\");import os;os.system('CANARY')#",
    "'''+__import__('os').system('CANARY')+'''", "{0.__class__}", "{{7*7}}", "%(x)s", "\nExecStartPre=CANARY\n", "\nEnvironment=X=$(CANARY)\n",
)  # fmt: skip
PIECES: Final = (
    "", "", "a", "node", "-", "--", "-rf", "-i", "-F", "/", "..", "../", "../../", "/../", "~", "~root", "~nobody-of-that-name", "*", "?",
    "[a-z]", "{a,b}", "$HOME", "${IFS}", "$IFS$9", "%h", "%r", "%%", "%n%s%x", "%2e%2e%2f", "%00", "%0d%0a", "\0", "\n", "\r", "\t", " ",
    "\x1b[2J", "\x1b]0;x\x07", "\x1bP", "\x9b31m", "\x7f", "\x08\x08", "\u202e", "\u200f", "\u2066", "\u2028", "\u2029", "\ufeff",
    "\udc80", "\ud800", "é", "e\u0301", "\uff0f", "\uff04(", "中", "@", ":", "::", "[::1]", "[", "]", "#", "!", "!!", "^", "\\", "\\\\", "'",
    '"', "`", "$", "a" * 64, "a" * 300, "b" * 5000, "é" * 200, "EOF", "NUL", "/dev/stdin", "/etc/passwd", "x=y", ",", "0", "-1", "65536",
    "00:11:22:33:44:55", "SHA256:" + "A" * 43,
)  # fmt: skip
#: In the user's configuration every host and user is put into commands.
SSH_CONFIG: Final = 'Match exec "true %h %r %n %p"\nHost * !127.0.0.1\n  ProxyCommand false %h %r %p\n'
#: The parts of a machine that people give.
ADD_FIELDS: Final = (
    "name", "user", "host", "port", "ssh", "key_path", "accept_host_key", "install_path", "label", "value", "mac",
)  # fmt: skip
UPDATE_FIELDS: Final = (
    "of", "user", "host", "port", "ssh", "key_path", "accept_host_key", "label", "value", "mac",
)  # fmt: skip
#: What each part may consist of and how long it may be: strings that are reduced to that are accepted.
TAME: Final[dict[str, tuple[str, int]]] = {
    "name": (r"[^a-z0-9-]", 63),
    "user": (r"[^A-Za-z0-9._-]", 60),
    "host": (r"[^A-Za-z0-9._-]|\.(?=\.)", 200),
    "port": (r"[^0-9]", 5),
    "key_path": (r"[^ -~]", 4000),
    "install_path": (r"[^A-Za-z0-9_.+/-]|/(?=/)", 90),
    "label": (r"[^A-Za-z0-9._/-]", 60),
    "value": (r"[^A-Za-z0-9._/-]", 60),
}
#: Each of them may cost an installation that fails: seconds.
TAME_SHARE: Final = 0.02
AT_ONCE: Final = 6
COMMAND_EVERY: Final = 100
#: Of a command's output, what a terminal may be sent.
_PLAIN: Final = frozenset("\n\t")


@dataclass(slots=True)
class Outcome:
    """What became of them."""

    codes: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    arrived: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Hostile:
    """Strings of a seed, each with a file that it would like to make in `canaries`."""

    canaries: Path
    seed: int

    def text(self, number: int) -> str:
        """Return string `number`."""
        chance = random.Random(f"{self.seed}-{number}")
        canary = self.canaries / str(number)
        command = chance.choice((f"touch {canary}", f"touch${{IFS}}{canary}", f"touch$IFS$9{canary}"))
        parts = [chance.choice(PIECES) for _ in range(chance.randrange(4))]
        for _ in range(chance.randrange(1, 3)):
            parts.insert(chance.randrange(len(parts) + 1), chance.choice(COMMANDS).replace("CANARY", command))
        if chance.random() < 0.15:
            parts = [chance.choice(PIECES) for _ in range(chance.randrange(1, 5))]
        return "".join(parts)

    def reduced(self, number: int, part: str, chance: random.Random) -> str:
        """Return string `number`; now and then what `part` accepts of it."""
        text = self.text(number)
        if part not in TAME or chance.random() > TAME_SHARE:
            return text
        unfit, most = TAME[part]
        begin = (
            "/" if part == "key_path" else f"/{self.canaries.parent.name}/" if part == "install_path" else "a"
        )
        return (
            (begin + re.sub(unfit, "", text))[:most].rstrip("/")
            if part != "port"
            else "2" + re.sub(unfit, "", text)[:4]
        )

    def executed(self) -> list[str]:
        """Return the strings that were executed."""
        return [f"{self.text(int(file.name))!r} was executed" for file in self.canaries.iterdir()]


# --- What people give ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """A pool with one machine, and an sshd to add others behind."""

    home: Home
    remote: Remote
    hostile: Hostile

    def sound(self) -> dict[str, Any]:
        """Return what would be accepted: its installation fails for want of packages."""
        server = self.remote.server
        return {
            "name": "new",
            "ssh": server.target,
            "key_path": str(server.key),
            "accept_host_key": server.fingerprint(),
            "install_path": str(self.remote.folder / "other"),
            "carry": True,
        }

    def changed(self, part: str, text: str) -> dict[str, Any]:
        """Return which fields hold a string."""
        user, port = self.remote.server.user, self.remote.server.port
        fields: dict[str, dict[str, Any]] = {
            "user": {"ssh": f"{text}@127.0.0.1:{port}"},
            "host": {"ssh": f"{user}@{text}:{port}"},
            "port": {"ssh": f"{user}@127.0.0.1:{text}"},
            "label": {"labels": {text: "x"}},
            "value": {"labels": {"x": text}},
        }
        return fields.get(part, {part: text})

    def ask(self, number: int) -> tuple[str, str]:
        """Give one string to a route; return the part it was given for and what the answer says."""
        chance = random.Random(f"part {self.hostile.seed}-{number}")
        if chance.random() < 0.5:
            part = chance.choice(ADD_FIELDS)
            text = self.hostile.reduced(number, part, chance)
            path = str(self.remote.folder / "other" / str(number))
            given = self.sound() | {"install_path": path} | self.changed(part, text)
            code = self._call("POST", "/v1/nodes", given)
        else:
            part = chance.choice(UPDATE_FIELDS)
            text = self.hostile.reduced(number, part, chance)
            given = {"labels": {"x": "y"}} if part == "of" else self.changed(part, text)
            if "ssh" in given:
                # What was given for another part would keep it from being tried.
                given["key_path"] = str(self.remote.server.key)
            name = quote(text.encode("utf-8", "replace"), safe="") if part == "of" else "far"
            code = self._call("PATCH", f"/v1/nodes/{name}", given)
        return part, code

    def _call(self, method: str, path: str, body: dict[str, Any]) -> str:
        record = self.home.state.running("orchestrator")
        assert record is not None, "the orchestrator is gone"
        address = urlsplit(record.url)
        with contextlib.closing(
            http.client.HTTPConnection(str(address.hostname), address.port, timeout=120)
        ) as connection:
            # Escaped, so that halves of characters go out as well.
            headers = {"Authorization": f"Bearer {record.token}", "Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body), headers)
            answer = connection.getresponse()
            content = answer.read()
        if set(content) & {0x1B, 0x07, 0x08, 0x00}:
            return "RAW"
        if answer.getheader("Content-Type", "").startswith("text/event-stream"):
            content = [line for line in content.splitlines() if line.startswith(b"data: ")][-1][6:]
        found = json.loads(content)
        return "accepted" if "name" in found or "message" in found else str(found["error"]["code"])

    def command(self, number: int) -> str:
        """Give one string to the command; return what is wrong with how it ended, or its exit code."""
        chance = random.Random(f"command {self.hostile.seed}-{number}")
        # What a system cannot pass to a program at all is nobody's to try.
        text = self.hostile.text(number).replace("\0", "").replace("\ud800", "")
        given = {**self.sound(), **self.changed(part := chance.choice(ADD_FIELDS), text)}
        words = ["nodes", "add", f"--ssh={given['ssh']}", f"--key={given['key_path']}"]
        words += [f"--accept-host-key={given['accept_host_key']}", f"--install-path={given['install_path']}"]
        words += [f"--label={key}={value}" for key, value in given.get("labels", {}).items()]
        words += [f"--mac={given['mac']}"] if "mac" in given else []
        words += ["--", given["name"]]
        env = {**self.home.env, "PYTHONIOENCODING": "utf-8:surrogateescape"}
        done = subprocess.run(
            [sys.executable, "-m", "arriero", *words],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=120,
        )
        said = (done.stdout + done.stderr).decode("utf-8", "replace")
        raw = sorted({c for c in said if not c.isprintable() and c not in _PLAIN})
        if raw or "Traceback" in said or done.returncode not in (1, 2):
            return f"{part} {text!r}: exit code {done.returncode}, raw {raw}: {said[-300:]!r}"
        return str(done.returncode)


@contextlib.contextmanager
def standing(folder: Path, hostile: Hostile) -> Iterator[Standing]:
    """Yield a pool with a machine `far` that works."""
    own = folder / "own"
    (own / ".ssh").mkdir(parents=True, mode=0o700)
    (own / ".ssh/config").write_text(SSH_CONFIG)
    (folder / "far/other").mkdir(parents=True)
    with Home(orchestrator_idle_s=0) as home, Remote(folder / "far", PIP_RETRIES="0", **NO_INDEX) as remote:
        remote.prepare()
        home.env |= {"HOME": str(own), "SSH_AUTH_SOCK": "", "PIP_RETRIES": "0", **NO_INDEX}
        try:
            added = remote.add(home, "far")
            assert added.code == 0, added
            yield Standing(home, remote, hostile)
        finally:
            home.run("down")


def ask_many(at: Standing, numbers: Sequence[int], outcome: Outcome) -> None:
    """Give strings to the routes, a few at the same time."""
    before = sorted(Path.home().iterdir())
    # Nothing that fails may be our own fault.
    ours = {"RAW", str(ErrorCode.INTERNAL_ERROR)}
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for number, (part, code) in zip(numbers, threads.map(at.ask, numbers), strict=True):
            outcome.codes[f"{part}: {code}"] += 1
            if code in ours:
                outcome.failures.append(f"{part} {at.hostile.text(number)!r}: {code}")
    if sorted(Path.home().iterdir()) != before:
        outcome.failures.append("the user's home on the machine is not as it was")
    left = sorted(str(path) for path in (at.remote.folder / "other").rglob("*"))
    if left:
        outcome.failures.append(f"left on the machine: {left[:10]}")


def command_many(at: Standing, numbers: Sequence[int], outcome: Outcome) -> None:
    """Give strings to the command, two at the same time."""
    with ThreadPoolExecutor(2) as threads:
        for ended in threads.map(at.command, numbers):
            outcome.commands[ended if ended.isdigit() else "wrong"] += 1
            if not ended.isdigit():
                outcome.failures.append(ended)


def still_works(at: Standing, outcome: Outcome) -> None:
    """Know that the pool is as it was, and that its machine can be reached again."""
    names = [record["name"] for record in at.home.run("nodes", "list", "--json").json["nodes"]]
    if names != ["box", "far"]:
        outcome.failures.append(f"the pool has {names}")
    server = at.remote.server
    at.home.run(
        "nodes", "update", "far", "--ssh", server.target, "--key", str(server.key),
        "--accept-host-key", server.fingerprint(),
    )  # fmt: skip
    until("far is back", lambda: at.home.run("nodes", "show", "far", "--json").json["status"] == "ready")
    done = at.home.run("infer", "--model", "demo", "--node", "far", "--max-tokens", "3", "Hello")
    if done.code:
        outcome.failures.append(f"far does not compute any more: {done.err}")


# --- What goes to a machine ----------------------------------------------------------------------


def sendable(texts: Sequence[str]) -> list[str]:
    """Return strings that a system can take as an argument."""
    return [text.replace("\0", "").replace("\ud800", "") for text in texts]


async def pass_many(at: Standing, numbers: Sequence[int], outcome: Outcome) -> None:
    """Have strings printed by /bin/sh here, and through the login shell of an sshd."""
    size = 100
    async with reached(at.remote.server, at.remote.folder) as connection:
        for start in range(0, len(numbers), size):
            some = sendable([at.hostile.text(number) for number in numbers[start : start + size]])
            some = [text[:700] for text in some]
            printed = b"".join(text.encode("utf-8", "surrogateescape") + b"\0" for text in some)
            argv = ["printf", "%s\\0", *some]
            far = (await connection.run(argv, timeout_s=30)).stdout
            shell = ["/bin/sh", "-c", command_line(argv)]
            here = await asyncio.to_thread(subprocess.run, shell, capture_output=True, check=True)
            if far != printed or here.stdout.partition(b"\n")[2] != printed:
                outcome.failures.append(f"not as they were sent: {some!r}")
            outcome.arrived["as arguments"] += len(some)


async def name_many(at: Standing, numbers: Sequence[int], outcome: Outcome) -> None:
    """Give strings to the programs that run on a machine: as names of files, now and then of an agent."""
    size = 200
    root = at.remote.folder / "stub"
    _stub(root)
    async with reached(at.remote.server, at.remote.folder) as connection:
        for start in range(0, len(numbers), size):
            some = sendable([at.hostile.text(number) for number in numbers[start : start + size]])
            files = {text: "0" * 64 for text in some if text not in ("", "/dev/stdin")}
            found = await there.ask(
                connection, sys.executable, "held", timeout_s=30, path=str(root), files=files
            )
            if sorted(found) != sorted(files):
                outcome.failures.append(f"not the names that were given: {some!r}")
            outcome.arrived["as names"] += len(files)
            await _name_agent(connection, root, some[0], outcome)
            with contextlib.suppress(ArrieroError):
                await there.ask(
                    connection, sys.executable, "survey", timeout_s=30, install_path=f"{root}/{some[-1]}"
                )


def _stub(root: Path) -> None:
    """Make an installation whose agent tells its name and ends."""
    bin_ = root / "envs/stub/bin"
    bin_.mkdir(parents=True)
    (root / there_child.MARKER).write_text("{}")
    (root / "envs/stub" / there_child.WHOLE).write_text("{}")
    (root / "current").symlink_to("envs/stub")
    (bin_ / "python").write_text(
        f'#!/bin/sh\nprintf %s "$ARRIERO_NODE_NAME" > {root}/.n && mv {root}/.n {root}/name\n'
    )
    (bin_ / "python").chmod(0o755)


async def _name_agent(connection: Connection, root: Path, name: str, outcome: Outcome) -> None:
    (root / "name").unlink(missing_ok=True)
    with contextlib.suppress(ArrieroError):
        await there.ask(
            connection, sys.executable, "start", timeout_s=30, path=str(root), name=name, uses_services=False,
            answer_timeout_s=0.5,
        )  # fmt: skip
    told = (root / "name").read_bytes() if (root / "name").exists() else b"nothing"
    if told != name.encode("utf-8", "surrogateescape"):
        outcome.failures.append(f"the agent was called {told!r}, not {name!r}")


def run(*, seed: int, count: int, folder: Path, command_every: int = COMMAND_EVERY) -> Outcome:
    """Try `count` strings in all ways."""
    hostile = Hostile(folder / "c", seed)
    hostile.canaries.mkdir()
    outcome = Outcome()
    numbers = range(count)
    with standing(folder, hostile) as at:
        ways: tuple[Callable[[], None], ...] = (
            lambda: ask_many(at, numbers, outcome),
            lambda: command_many(at, numbers[::command_every], outcome),
            lambda: asyncio.run(pass_many(at, numbers, outcome)),
            lambda: asyncio.run(name_many(at, numbers, outcome)),
        )
        with ThreadPoolExecutor(len(ways)) as threads:
            for done in [threads.submit(way) for way in ways]:
                done.result()
        still_works(at, outcome)
    outcome.failures += hostile.executed()
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    start = time.monotonic()
    # Short: paths of sockets, and of what is installed, are limited.
    folder = Path(tempfile.mkdtemp(prefix="arr-", dir="/tmp"))
    try:
        outcome = run(seed=options.seed, count=options.count, folder=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for part, times in sorted(outcome.codes.items()):
        print(f"    {part}: {times}")
    print(f"{options.count} strings to the routes; exit codes of commands {dict(outcome.commands)}; ", end="")
    print(f"{dict(outcome.arrived)} arrived at machines as they were; {len(outcome.failures)} failures")
    for what in outcome.failures[:20]:
        print(f"    {what}")
    print(f"seed {options.seed}: {time.monotonic() - start:.0f} s")
    return 1 if outcome.failures else 0


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main())
