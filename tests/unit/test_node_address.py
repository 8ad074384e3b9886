"""Which strings are addresses of machines, and do hostile ones get through?"""

import random
import shlex
import shutil
import subprocess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.fabrics.base import ACCEPTED_FORMS, NodeAddress
from arriero.fabrics.outcome import Kept
from arriero.fabrics.quoting import COMMAND_BYTES_MAX, PID_MARK, command_line

FINGERPRINT = "SHA256:" + "aB3+/" * 8 + "abc"
SAFE = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-:%")
HOSTILE = (
    "-oProxyCommand=touch x", "a b", "a;b", "a|b", "a&b", "$(id)", "`id`", "a\nb", "a\rb", "a\0b", "a\x1b[2J",
    "a'b", 'a"b', "a\\b", "a*", "a?b", "a<b", "a>b", "a!b", "a#b", "~a", "a=b", "{a,b}", "a(b)", "é", "\u202ea",
    "a\u00a0b", "", " ", ".", "..", "a/../b", "\udc80",
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "user", "host", "port"),
    [
        ("workstation", None, "workstation", None),
        ("ana@workstation", "ana", "workstation", None),
        ("ana@10.0.0.7:2222", "ana", "10.0.0.7", 2222),
        ("ssh://ana@box.example:22", "ana", "box.example", 22),
        ("ssh://ana@[::1]:2222", "ana", "::1", 2222),
        ("ana@[fe80::1%eth0]", "ana", "fe80::1%eth0", None),
    ],
)
def test_accepted_forms(text: str, user: str | None, host: str, port: int | None) -> None:
    address = NodeAddress.parse(text)
    assert (address.user, address.host, address.port) == (user, host, port)
    assert NodeAddress.parse(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        *HOSTILE, *(f"ana@{bad}" for bad in HOSTILE), *(f"{bad}@host" for bad in HOSTILE if bad != "a/../b"),
        "ana@host:0", "ana@host:65536", "ana@host:", "ana@host:2x", "ana@host:-1", "ana@host:٣", "ana@::1",
        "ana@[::1", "ana@[host]", "ana@[::1%e th]", "ana:secret@host", "ssh://ana@host/path", "http://host",
        "ana@host:22:22", "a" * 513, "ana@" + "a" * 254, "host\n", "ana@host:22\n",
    ],
)  # fmt: skip
def test_everything_else_is_refused_with_the_accepted_forms(text: str) -> None:
    with pytest.raises(ArrieroError) as refused:
        NodeAddress.parse(text)
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert ACCEPTED_FORMS in refused.value.message
    assert refused.value.message.isascii() and refused.value.message.isprintable()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ana@", "the host is no name"),
        ("@host", "the user is no plain name"),
        ("ana@host:99999", "from 1 to 65535"),
        ("ana@host:22:22", "the port is no number"),
        ("ana@fe80::1", "needs its brackets"),
        ("ana@[::1", "needs its brackets"),
    ],
)
def test_a_person_sees_the_whole_of_what_was_given(text: str, why: str) -> None:
    with pytest.raises(ArrieroError) as refused:
        NodeAddress.parse(text)
    assert refused.value.message.startswith(f"'{text}' is no address of a machine: ")
    assert why in refused.value.message


@pytest.mark.parametrize(
    "part",
    [
        *({"install_path": bad} for bad in HOSTILE if bad != "a=b"), {"install_path": "a=b"}, {"install_path": "a//b"},
        {"install_path": "/"}, {"install_path": "a/"}, {"install_path": "a/-b"}, {"install_path": "a" * 97},
        {"install_path": "x\n"}, {"host_key": "SHA256:short"}, {"host_key": FINGERPRINT + "\n"}, {"host_key": ""},
        {"host_key": "MD5:00"}, {"key_path": ""}, {"key_path": "-i"}, {"key_path": "/a\nb"}, {"key_path": "/" * 4097},
    ],
)  # fmt: skip
def test_no_other_part_is_a_way_in(part: dict[str, str]) -> None:
    with pytest.raises(ArrieroError) as refused:
        NodeAddress("host", **part)  # type: ignore[arg-type]  # All of these are text.
    assert refused.value.code is ErrorCode.INVALID_REQUEST


def test_an_address_may_say_everything() -> None:
    address = NodeAddress.parse(
        "ana@host", key_path="/home/ana/my keys/id", host_key=FINGERPRINT, install_path="/opt/arriero"
    )
    assert (address.key_path, address.host_key) == ("/home/ana/my keys/id", FINGERPRINT)
    assert NodeAddress("host").install_path == ".local/share/arriero"


@given(st.text(max_size=40) | st.text("an@:[]/%.-1 \n;$", max_size=20))
def test_what_gets_through_is_harmless_and_reads_back(text: str) -> None:
    try:
        address = NodeAddress.parse(text)
    except ArrieroError as refused:
        assert refused.code is ErrorCode.INVALID_REQUEST
        refused.message.encode()
        return
    for part in (address.host, address.user or "a"):
        assert set(part) <= SAFE and part[0] != "-"
    assert NodeAddress.parse(str(address)) == address


# --- Arguments on their way through a shell ------------------------------------------------------

SHELLS = ["sh", "bash", "dash", "zsh", "fish", "tcsh", "ksh", "busybox"]


def hostile_arguments(count: int, seed: int = 0) -> list[str]:
    """Return strings that mean something to some shell, or to a terminal."""
    chance = random.Random(seed)
    atoms = [
        *"'\"\\$`!*?[]{}()<>|&;#~=%^-+ \t\n\r\x01\x1b\x7fé中",
        "$(touch pwned)", "`touch pwned`", "; touch pwned;", "' ; touch pwned '", "\\'; touch pwned; '", "\n touch pwned\n",
        "| touch pwned", "&& touch pwned", "${IFS}", "$HOME", "%s", "--", "-rf", "=ls", "!!", "\udc80", "EOF", "a" * 50,
    ]  # fmt: skip
    return ["".join(chance.choices(atoms, k=chance.randint(0, 8))) for _ in range(count)]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_login_shell_passes_arguments_as_they_are(shell: str, tmp_path: Any) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    sent = hostile_arguments(2000)
    start = [program, "sh"] if shell == "busybox" else [program]
    for index in range(0, len(sent), 500):
        some = sent[index : index + 500]
        line = command_line(["printf", "%s\\0", *some])
        got = subprocess.run(
            [*start, "-c", line],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            env={"PATH": "/usr/bin:/bin"},
            check=True,
        ).stdout
        mark, _, printed = got.partition(b"\n")
        assert mark.startswith(PID_MARK.encode())
        assert printed == b"".join(text.encode("utf-8", "surrogateescape") + b"\0" for text in some)
    assert list(tmp_path.iterdir()) == []


def test_plain_commands_stay_readable() -> None:
    assert command_line(["uname", "-s"]) == f"exec /bin/sh -c 'echo {PID_MARK}$$; exec uname -s'"
    # zsh takes =ls for the path of ls, although shlex leaves it unquoted.
    assert shlex.quote("=ls") == "=ls" and "=ls" not in command_line(["printf", "=ls"])


@pytest.mark.parametrize("argument", ["a\0b", "\ud800", "x" * (COMMAND_BYTES_MAX + 1)])
def test_what_cannot_be_an_argument_is_refused(argument: str) -> None:
    with pytest.raises(ArrieroError) as refused:
        command_line(["printf", argument])
    assert refused.value.code is ErrorCode.INVALID_REQUEST


@given(st.lists(st.binary(max_size=9)), st.integers(1, 20), st.booleans())
def test_of_an_output_its_beginning_or_its_end_is_kept(chunks: list[bytes], most: int, is_end: bool) -> None:
    kept = Kept(most, is_end=is_end)
    for chunk in chunks:
        kept.feed(chunk)
    whole = b"".join(chunks)
    assert kept.content() == (whole[-most:] if is_end else whole[:most])
    assert kept.is_cut == (len(whole) > most)
