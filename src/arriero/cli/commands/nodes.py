"""`arriero nodes`: which machines are in the pool, how does one join, and how does it leave?"""

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from arriero.cli import completing, node_rows, options, pool, render
from arriero.cli.narrator import Narrator
from arriero.cli.signals import Terminated, terminable
from arriero.client.api import Orchestrator
from arriero.contracts import ids
from arriero.contracts.errors import ArrieroError, ErrorCode, Exit
from arriero.contracts.events import JOINED, NodeDone, NodeStep
from arriero.contracts.requests import LABEL, LABEL_VALUE, NodeAddBody, NodeUpdateBody
from arriero.contracts.states import NodeState
from arriero.domain.engine_builds import install_command

_EXAMPLES: Final = ("arriero nodes add workstation --ssh ana@workstation", "arriero nodes list")
_ADD_EXAMPLES: Final = (
    "arriero nodes add workstation --ssh ana@workstation",
    "arriero nodes add attic --ssh ana@192.168.1.7:2222 --key ~/.ssh/attic --label room=attic",
    "arriero nodes add attic --ssh attic --accept-host-key SHA256:…",
)
_REMOVE_EXAMPLES: Final = ("arriero nodes remove attic", "arriero nodes remove attic --purge")
_UPGRADE_EXAMPLES: Final = ("arriero nodes upgrade attic", "arriero nodes upgrade --all")
_UPDATE_EXAMPLES: Final = (
    "arriero nodes update attic --label room=cellar",
    "arriero nodes update attic --ssh ana@192.168.1.8",
)


name_argument = click.argument("name", shell_complete=completing.nodes)
key_option = click.option(
    "--key",
    "key_path",
    metavar="FILE",
    help="Private key to log in with; default: those that ssh would use.",
)
host_key_option = click.option(
    "--accept-host-key",
    metavar="FINGERPRINT",
    help="Accept this host key (SHA256:…), once you have compared it.",
)
label_option = click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="KEY=VALUE",
    help="For requests that ask for it; may be given several times.",
)
mac_option = click.option(
    "--mac", metavar="ADDRESS", help="Hardware address that wakes the machine (Wake-on-LAN)."
)
carry_option = click.option(
    "--carry", is_flag=True, help="Bring all packages along, even where the machine has an index of its own."
)


@click.group(epilog=options.examples(_EXAMPLES))
def nodes() -> None:
    """Add machines to the pool, look after them, take them out."""


# --- Joining ---------------------------------------------------------------------------------


@nodes.command("add", epilog=options.examples(_ADD_EXAMPLES))
@click.argument("name")
@click.option(
    "--ssh",
    required=True,
    metavar="USER@HOST[:PORT]",
    help="How ssh reaches it; names of ~/.ssh/config work.",
)
@key_option
@host_key_option
@click.option(
    "--install-path",
    metavar="FOLDER",
    help="Where arriero goes on that machine.  [default: ~/.local/share/arriero]",
)
@label_option
@mac_option
@carry_option
@options.quiet_option
@options.json_option
def add(
    *, name: str, ssh: str, key_path: str | None, accept_host_key: str | None, install_path: str | None,
    labels: tuple[str, ...], mac: str | None, carry: bool, quiet: bool, as_json: bool,
) -> int:  # fmt: skip
    """Make a machine part of the pool, over SSH.

    Checks the connection and the machine, installs this version of arriero there for the user who logs
    in, starts its agent, and registers it.  Nothing there listens to the network: everything goes through
    SSH.  Whatever fails leaves nothing behind; an engine that cannot be had for its GPU can be installed
    later.

    Exit codes: 0 it is part of the pool, 1 error, 2 wrong usage, 124 timed out, 130 interrupted.
    """
    _check_name(name)
    _check_address(ssh, key_path=_key(key_path), host_key=accept_host_key, install_path=install_path)
    narrator = Narrator(is_quiet=quiet)
    body = NodeAddBody(
        name=name,
        ssh=ssh,
        key_path=_key(key_path),
        accept_host_key=accept_host_key,
        install_path=install_path,
        labels=_labels(labels),
        mac=_mac(mac),
        carry=carry,
    )
    show_step = _shown(narrator)
    has_joined = False

    def heard(step: NodeStep) -> None:
        nonlocal has_joined
        has_joined = has_joined or step.step == JOINED
        show_step(step)

    with terminable(), pool.serving(is_ephemeral=False, narrator=narrator, timeout_s=None) as client:
        try:
            done = _added(client, body, narrator, heard, may_ask=not as_json)
        except (KeyboardInterrupt, Terminated):
            narrator.clear()
            left = f"what was begun on {name} is taken back"
            if has_joined:
                command = install_command(name)
                left = f"{name} is part of the pool; its engine was not installed: `{command}`"
            narrator.say("orchestrator", f"interrupted: {left}")
            raise
    return _ended(done, narrator, as_json=as_json)


def _added(
    client: Orchestrator, body: NodeAddBody, narrator: Narrator, heard: Callable[[NodeStep], None], *,
    may_ask: bool,
) -> NodeDone:  # fmt: skip
    try:
        return client.add_node(body, heard)
    except ArrieroError as error:
        narrator.clear()
        fingerprint = _accepted(error) if may_ask else None
        if fingerprint is None:
            raise
    return client.add_node(msgspec.structs.replace(body, accept_host_key=fingerprint), heard)


def _accepted(error: ArrieroError) -> str | None:
    """Ask a person who looks on whether an unknown host key is right; return it if so."""
    fingerprint = error.details.get("fingerprint")
    is_asked = error.code is ErrorCode.SSH_HOST_KEY_UNKNOWN and render.is_terminal(sys.stdin)
    if not is_asked or not isinstance(fingerprint, str) or not render.is_terminal(sys.stderr):
        return None
    render.note(error.message)
    render.note(f"compare it with what this prints there: {error.details.get('compare', '')}")
    is_right = click.confirm("Is this the machine you mean? Accept this key", default=False, err=True)
    return fingerprint if is_right else None


# --- Looking ---------------------------------------------------------------------------------


@nodes.command("list", epilog=options.examples(("arriero nodes list", "arriero nodes list --json")))
@options.json_option
def list_nodes(*, as_json: bool) -> int:
    """List the machines of the pool."""
    client = options.orchestrator()
    found = client.nodes()
    if as_json:
        render.data({"nodes": found})
        return Exit.OK
    workers = client.workers()
    render.table(node_rows.COLUMNS, node_rows.listed(found, workers, now_unix=time.time()))
    for record in found:
        if record.error is not None and record.status is NodeState.UNREACHABLE:
            render.note(f"{record.name}: {record.error.code}: {record.error.message}")
            render.note(f"  hint: {record.error.details.get('suggested_action', '')}")
        for advice in record.advice:
            render.note(f"{record.name}: {advice}")
    return Exit.OK


@nodes.command(
    "show", epilog=options.examples(("arriero nodes show attic", "arriero nodes show attic --json"))
)
@name_argument
@options.json_option
def show(*, name: str, as_json: bool) -> int:
    """Show all that is known of a machine."""
    client = options.orchestrator()
    record = client.node(name)
    if as_json:
        render.data(record)
        return Exit.OK
    for label, text in node_rows.shown(record, client.workers(), now_unix=time.time()):
        if text:
            render.out(f"{label:<14}{text}")
    return Exit.OK


@nodes.command("doctor", epilog=options.examples(("arriero nodes doctor attic",)))
@name_argument
@options.json_option
def doctor(*, name: str, as_json: bool) -> int:
    """Look over a machine for what is wrong with it.

    Exit codes: 0 all is well, 1 something is not, or the machine cannot be reached.
    """
    found = options.orchestrator(timeout_s=60.0).examine_node(name)
    is_well = all(finding.is_ok for finding in found)
    if as_json:
        render.data({"findings": found})
    else:
        for finding in found:
            mark = "ok" if finding.is_ok else (finding.code or "problem")
            render.out(f"{mark:<24}{finding.name}: {finding.message}")
            if finding.advice:
                render.out(f"{'':<24}  hint: {finding.advice}")
    return Exit.OK if is_well else Exit.ERROR


@nodes.command("logs", epilog=options.examples(("arriero nodes logs attic --lines 500",)))
@name_argument
@click.option(
    "--lines",
    type=click.IntRange(1, 100_000),
    default=100,
    show_default=True,
    help="So many of the last lines.",
)
@options.json_option
def logs(*, name: str, lines: int, as_json: bool) -> int:
    """Print the log of a machine's agent."""
    content, is_cut = options.orchestrator(timeout_s=60.0).node_log(name, lines)
    if as_json:
        shown = content.decode("utf-8", "replace").splitlines()
        render.data({"node": name, "lines": shown, "is_cut": is_cut})
        return Exit.OK
    if is_cut:
        render.note("earlier lines are left out: these are the last 4 MiB")
    render.log(content)
    return Exit.OK


# --- Changing --------------------------------------------------------------------------------


@nodes.command("update", epilog=options.examples(_UPDATE_EXAMPLES))
@name_argument
@click.option("--ssh", metavar="USER@HOST[:PORT]", help="How ssh reaches it now.")
@key_option
@host_key_option
@label_option
@mac_option
@options.json_option
def update(
    *, name: str, ssh: str | None, key_path: str | None, accept_host_key: str | None,
    labels: tuple[str, ...], mac: str | None, as_json: bool,
) -> int:  # fmt: skip
    """Change what is kept of a machine; `--label KEY=` takes a label away, `--mac ""` the address."""
    body = NodeUpdateBody(
        ssh=ssh,
        key_path=_key(key_path),
        accept_host_key=accept_host_key,
        labels=_labels(labels),
        mac="" if mac == "" else _mac(mac),
    )
    if ssh is not None:
        _check_address(ssh)
    if body == NodeUpdateBody():
        raise options.refuse("nothing to change: give at least one option")
    record = options.orchestrator().update_node(name, body)
    if as_json:
        render.data(record)
    else:
        render.note(f"[orchestrator] {name} is changed")
    return Exit.OK


@nodes.command("drain", epilog=options.examples(("arriero nodes drain attic --wait 600",)))
@name_argument
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(0, 86_400),
    metavar="SECONDS",
    help="Wait up to so long for the requests that run there.",
)
@options.quiet_option
@options.json_option
def drain(*, name: str, wait_s: float | None, quiet: bool, as_json: bool) -> int:
    """Give a machine no new work; what runs there goes on to its end.

    Exit codes: 0 drained, 1 error, 124 something still runs after --wait: it stays drained.
    """
    return _work(
        lambda client, on_step: client.drain_node(name, on_step, wait_s=wait_s), quiet=quiet, as_json=as_json
    )


@nodes.command("undrain", epilog=options.examples(("arriero nodes undrain attic",)))
@name_argument
@options.json_option
def undrain(*, name: str, as_json: bool) -> int:
    """Give a machine work again."""
    record = options.orchestrator().undrain_node(name)
    if as_json:
        render.data(record)
    else:
        render.note(f"[orchestrator] {name} takes work again")
    return Exit.OK


@nodes.command("upgrade", epilog=options.examples(_UPGRADE_EXAMPLES))
@click.argument("name", required=False, shell_complete=completing.nodes)
@click.option("--all", "is_all", is_flag=True, help="All machines behind SSH, one after the other.")
@carry_option
@options.quiet_option
@options.json_option
def upgrade(*, name: str | None, is_all: bool, carry: bool, quiet: bool, as_json: bool) -> int:
    """Bring a machine to this version: drain, install, restart, check; back to the old one if that fails.

    Exit codes: 0 upgraded, or already of this version; 1 error.
    """
    if (name is None) is not is_all:
        raise options.refuse("give the NAME of a machine, or --all")
    client = options.orchestrator()
    names = [name] if name is not None else [node.name for node in client.nodes() if node.is_remote]
    narrator = Narrator(is_quiet=quiet)
    if not names:
        narrator.say("orchestrator", "no machine behind SSH is in the pool: there is nothing to upgrade")
    done: list[NodeDone] = []
    failed: list[tuple[str, ArrieroError]] = []
    with terminable():
        for each in names:
            try:
                done.append(client.upgrade_node(each, _shown(narrator), carry=carry))
                narrator.clear()
                narrator.say("orchestrator", done[-1].message)
            except ArrieroError as error:
                narrator.clear()
                if not is_all:
                    raise
                failed.append((each, error))
                render.error(error)
    if failed:
        render.note(f"not upgraded: {', '.join(each for each, _ in failed)}")
    if as_json:
        render.data(
            {"nodes": [each.node for each in done], "failed": {each: e.body() for each, e in failed}}
            if is_all
            else done[0].node
        )
    return Exit.ERROR if failed else Exit.OK


@nodes.command("remove", epilog=options.examples(_REMOVE_EXAMPLES))
@name_argument
@click.option("--purge", is_flag=True, help="Remove models and installation there as well.")
@click.option("--force", is_flag=True, help="Forget it even if it cannot be reached.")
@options.quiet_option
@options.json_option
def remove(*, name: str, purge: bool, force: bool, quiet: bool, as_json: bool) -> int:
    """Stop what was started on a machine, and forget it.

    Models and installation stay there without --purge.  A machine that cannot be reached is kept, without
    --force.

    Exit codes: 0 it is no part of the pool any more, 1 error: it still is.
    """
    return _work(
        lambda client, on_step: client.remove_node(name, on_step, purge=purge, force=force),
        quiet=quiet,
        as_json=as_json,
    )


# --- What they share -------------------------------------------------------------------------


def _work(run: Callable[[Any, Callable[[NodeStep], None]], NodeDone], *, quiet: bool, as_json: bool) -> int:
    narrator = Narrator(is_quiet=quiet)
    with terminable():
        try:
            done = run(options.orchestrator(), _shown(narrator))
        finally:
            narrator.clear()
    return _ended(done, narrator, as_json=as_json)


def _ended(done: NodeDone, narrator: Narrator, *, as_json: bool) -> int:
    narrator.clear()
    narrator.say("orchestrator", done.message)
    if as_json:
        render.data(done.node if done.node is not None else {"message": done.message})
    return Exit.OK


def _shown(narrator: Narrator) -> Callable[[NodeStep], None]:
    def show_step(step: NodeStep) -> None:
        if step.fraction is None or step.fraction >= 1.0:
            # What advanced has come to its end.
            narrator.clear()
            narrator.say(step.actor, step.message)
        else:
            narrator.advance(step.step, step.fraction, step.message)

    return show_step


def _check_name(name: str) -> None:
    if ids.NODE_NAME.fullmatch(name) is None:
        raise options.refuse(
            f"the name {name[:80]!r} is not made of a-z, 0-9 and - alone, beginning with a letter or digit, "
            "63 at most",
            param="name",
        )


def _check_address(ssh: str, *, install_path: str | None = None, **parts: str | None) -> None:
    """Refuse what is wrong before anything is started for it."""
    from arriero.fabrics.base import INSTALL_PATH, NodeAddress

    NodeAddress.parse(ssh, install_path=INSTALL_PATH if install_path is None else install_path, **parts)


def _labels(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for label in given:
        key, equals, value = label.partition("=")
        if not equals or not key:
            raise options.refuse(f"--label {label[:80]!r}: give it as KEY=VALUE", param="label")
        if not LABEL.fullmatch(key) or not LABEL_VALUE.fullmatch(value):
            raise options.refuse(
                f"--label {label[:160]!r}: KEY is of letters, digits and ._/-, beginning with a letter or "
                "digit, 63 at most; VALUE of the same, or empty",
                param="label",
            )
        found[key] = value
    return found


def _key(given: str | None) -> str | None:
    """Return the key's path as the orchestrator finds it, whose working folder is another one."""
    if not given or given.startswith(("/", "~")):
        return given
    return str(Path.cwd() / given)


def _mac(given: str | None) -> str | None:
    if given is None:
        return None
    import re

    if re.fullmatch(r"([0-9a-fA-F]{2}[:-]){5}[0-9a-fA-F]{2}", given) is None:
        raise options.refuse(
            f"--mac {given[:80]!r} is no hardware address such as 00:1a:2b:3c:4d:5e", param="mac"
        )
    return given
