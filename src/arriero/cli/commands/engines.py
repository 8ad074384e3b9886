"""`arriero engines`: which builds of the engine has a machine, and how does it get the one that suits it?"""

import hashlib
from pathlib import Path
from typing import Final

import click

from arriero.cli import model_agent, options, render
from arriero.cli.narrator import Narrator
from arriero.cli.signals import terminable
from arriero.client.api import Agent
from arriero.contracts import names
from arriero.contracts.errors import ArrieroError, ErrorCode, Exit
from arriero.contracts.records import EngineBuild, EngineList
from arriero.contracts.requests import EngineInstallBody

_CHUNK: Final = 1 << 20
_LIST_EXAMPLES: Final = ("arriero engines list", "arriero engines list --node attic --json")
_INSTALL_EXAMPLES: Final = (
    "arriero engines install",
    "arriero engines install --node workstation",
    "arriero engines install cu128 --wheel xllamacpp-2026.10.11549-cp310-abi3-linux_x86_64.whl",
)


@click.group(epilog=options.examples(("arriero engines list", "arriero engines install")))
def engines() -> None:
    """Show which builds of the engine a machine has, and install the one that suits it."""


@engines.command("list", epilog=options.examples(_LIST_EXAMPLES))
@model_agent.node_option
@options.json_option
def list_engines(*, node: str | None, as_json: bool) -> int:
    """List a machine's builds of the engine, what each computes with, and which one suits it."""
    with model_agent.serving_agent(node, Narrator()) as agent:
        found = agent.engines()
    if as_json:
        render.data(found)
        return Exit.OK
    render.table(
        ("build", "version", "from", "backends", "devices", "suits", "problem"),
        [_row(build, found) for build in found.builds],
    )
    render.note(f"{found.node}: {found.wanted} suits it: {found.why}")
    for sentence in found.advice:
        render.note(f"note: {sentence}")
    return Exit.OK


def _row(build: EngineBuild, found: EngineList) -> list[str]:
    return [
        build.name,
        build.version,
        "arriero itself" if build.is_own else render.moment_text(build.installed_unix),
        ", ".join(build.backends),
        "; ".join(build.devices),
        "yes" if build.name == found.wanted else "",
        build.problem,
    ]


@engines.command("install", epilog=options.examples(_INSTALL_EXAMPLES))
@click.argument("build", required=False)
@click.option("--wheel", type=click.Path(path_type=Path), metavar="FILE",
              help="A wheel on this machine, which is sent there: where there is no internet.")  # fmt: skip
@click.option("--index", "index_url", metavar="URL", help="Instead of the setting engine_index_url.")
@click.option("--sha256", metavar="HEX", help="What the wheel must hash to.")
@model_agent.node_option
@options.quiet_option
@options.json_option
def install(
    *,
    build: str | None,
    wheel: Path | None,
    index_url: str | None,
    sha256: str | None,
    node: str | None,
    quiet: bool,
    as_json: bool,
) -> int:
    """Install a build of the engine beside the one there is; without BUILD the one that suits.

    The wheel is checked, unpacked and loaded before it takes its place; what fails leaves nothing.
    Workers that run go on as they are, the next ones use the new build.
    """
    if wheel is not None and index_url is not None:
        raise click.UsageError("--wheel and --index exclude each other")
    digest = sha256.lower() if sha256 is not None else None
    if digest is not None and not names.is_sha256(digest):
        raise options.refuse(f"--sha256 {sha256!r} is no checksum: 64 hexadecimal digits", param="sha256")
    narrator = Narrator(is_quiet=quiet)
    with terminable(), model_agent.serving_agent(node, narrator) as agent:
        name = None
        if wheel is not None:
            digest = _same(wheel, digest)
            name = _sent(agent, wheel, narrator)
        body = EngineInstallBody(build=build, wheel=name, index_url=index_url, sha256=digest)
        made = _installed(agent, body, narrator)
        found = agent.engines()
    if as_json:
        render.data({"node": found.node, "build": made})
    else:
        whose = "is arriero's own, nothing is to be installed" if made.is_own else "is installed"
        narrator.say(
            found.node, f"{made.name} {made.version} {whose}; it computes on {', '.join(made.backends)}"
        )
        render.out(made.name)
    return Exit.OK


def _same(wheel: Path, wanted: str | None) -> str:
    """Return a wheel's checksum, so that it is known to have arrived whole.

    Raises INVALID_REQUEST if it cannot be read, INSTALL_FAILED if it is not the one asked for.
    """
    digest = hashlib.sha256()
    try:
        with wheel.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise options.refuse(f"{wheel} cannot be read: {error.strerror}", file=str(wheel)) from error
    found = digest.hexdigest()
    if wanted not in (None, found):
        raise ArrieroError(
            ErrorCode.INSTALL_FAILED,
            f"{wheel.name} has the sha256 {found}, {wanted} was asked for",
            expected=wanted,
            actual=found,
            suggested_action="Get the wheel again, or compare the checksum with its publisher's.",
        )
    return found


def _sent(agent: Agent, wheel: Path, narrator: Narrator) -> str:
    def tell(done: int, total: int) -> None:
        detail = render.progress_text(done, total, 0.0, None)
        narrator.advance("sending", done / total if total else None, f"{wheel.name}: {detail}")

    try:
        return agent.upload_engine(wheel, tell)
    finally:
        narrator.clear()


def _installed(agent: Agent, body: EngineInstallBody, narrator: Narrator) -> EngineBuild:
    try:
        with agent.install_engine(body) as stream:
            for frame in stream:
                narrator.say_once("engine", frame.what)
                if frame.bytes_read:
                    fraction = frame.bytes_read / frame.bytes_total if frame.bytes_total else None
                    detail = render.progress_text(frame.bytes_read, frame.bytes_total or None, 0.0, None)
                    narrator.advance("engine", fraction, detail)
            return stream.result()
    finally:
        narrator.clear()
