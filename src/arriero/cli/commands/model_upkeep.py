"""`arriero models …`: how are a machine's models kept in order?"""

import os
import re
import tempfile
from pathlib import Path
from typing import Final, TypeVar

import click

from arriero.cli import model_agent, options, render
from arriero.cli.narrator import Narrator
from arriero.cli.signals import terminable
from arriero.client.models_api import CheckStream
from arriero.contracts import refs
from arriero.contracts.errors import ArrieroError, ErrorCode, Exit
from arriero.contracts.records import FoundModel, ModelRecord
from arriero.contracts.requests import ImportBody, PruneBody, ScanBody

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)
T = TypeVar("T")
_POWERS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class SizeType(click.ParamType[int]):
    """A number of bytes as people write it: `10G`, `500MiB`, `1.5 TB`; each step is 1024."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value).strip())
        size = int(float(match[1]) * 1024 ** _POWERS[match[2].upper()]) if match else 0
        if not 1 <= size <= 2**60:
            self.fail(f"{value!r} is no size; write for example 10G, 500M or 1.5T", param, ctx)
        return size


@click.command(
    "rm",
    epilog=options.examples(("arriero models rm hf:org/repo:Q4_K_M", "arriero models rm m-0123456789ab")),
)
@click.argument("wanted", nargs=-1, required=True, metavar="MODEL...")
@model_agent.node_option
@options.json_option
def remove(*, wanted: tuple[str, ...], node: str | None, as_json: bool) -> int:
    """Remove models, and their files where they are ours; a file of another program stays.

    A model that a worker has loaded is not removed.
    """
    removed: list[ModelRecord] = []
    with model_agent.serving_agent(node, Narrator()) as agent:
        for record in [model_agent.find(agent, name) for name in wanted]:
            agent.remove_model(record.model_id)
            removed.append(record)
            if not as_json:
                kept = "; its files stay, they are not ours" if record.is_external else ""
                render.out(f"removed {record.model_ref} ({render.bytes_text(record.size_bytes)}){kept}")
    if as_json:
        render.data({"removed": removed})
    return Exit.OK


@click.command(
    "verify",
    epilog=options.examples(("arriero models verify hf:org/repo:Q4_K_M", "arriero models verify --all")),
)
@click.argument("wanted", nargs=-1, metavar="[MODEL]...")
@click.option("--all", "is_all", is_flag=True, help="Every model of the machine.")
@model_agent.node_option
@options.quiet_option
@options.json_option
def verify(*, wanted: tuple[str, ...], is_all: bool, node: str | None, quiet: bool, as_json: bool) -> int:
    """Read models' files again and compare their checksums.

    All are read, also after one that is not as it was; exit code 1 if there is such a one.
    """
    if bool(wanted) == is_all:
        raise click.UsageError("give the models to verify, or --all")
    narrator = Narrator(is_quiet=quiet)
    results: list[dict[str, object]] = []
    failed: ArrieroError | None = None
    with terminable(), model_agent.serving_agent(node, narrator) as agent:
        records = agent.models() if is_all else [model_agent.find(agent, name) for name in wanted]
        for record in records:
            error = None
            try:
                _followed(agent.verify_model_stream(record.model_id), narrator)
            except ArrieroError as refused:
                failed = failed or refused
                error = refused
            results.append({"model": record, "error": error.body() if error else None})
            if not as_json:
                render.out(
                    f"{'bad ' if error else 'good'}  {record.model_ref}"
                    + (f"  {error.message}" if error else "")
                )
    if as_json:
        render.data({"verified": results})
    elif not results:
        render.note("this machine has no models")
    elif failed is not None:
        raise failed
    return int(failed.kind.exit_code) if failed is not None else Exit.OK


@click.command("scan", epilog=options.examples(("arriero models scan", "arriero models scan --dry-run")))
@click.option("--dry-run", is_flag=True, help="Only list what is there; nothing is read through or entered.")
@model_agent.node_option
@options.quiet_option
@options.json_option
def scan(*, dry_run: bool, node: str | None, quiet: bool, as_json: bool) -> int:
    """Find the models that other programs keep on a machine, and use them in place.

    Looks into the caches of Hugging Face, Ollama, LM Studio and llama.cpp.  What is found is verified,
    entered in the catalog and read where it lies; it is never changed or removed by us.
    """
    narrator = Narrator(is_quiet=quiet)
    with terminable(), model_agent.serving_agent(node, narrator) as agent:
        found = _followed(agent.scan_models(ScanBody(dry_run=dry_run)), narrator).found
    if as_json:
        render.data({"found": found})
        return Exit.OK
    if not found:
        render.note("no other program keeps models here")
    else:
        render.table(("source", "name", "size", "status", "model"), [_found_row(model) for model in found])
    return Exit.OK


def _found_row(model: FoundModel) -> list[str]:
    status = model.status + (f": {model.why}" if model.why else "")
    return [model.source, model.name, render.bytes_text(model.size_bytes), status, model.model_ref]


@click.command(
    "import",
    epilog=options.examples(
        (
            "arriero models import /media/usb/model.gguf --as hf:org/repo:Q4_K_M",
            "arriero models import /media/usb/models",
        )
    ),
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--as", "model_ref", metavar="REF", help="What the model is to be called.")
@model_agent.node_option
@options.quiet_option
@options.json_option
def import_(*, path: Path, model_ref: str | None, node: str | None, quiet: bool, as_json: bool) -> int:
    """Copy a model file, or every model of a folder, into the models folder: where there is no network.

    The models folder of another machine's state folder may be imported as a whole; checksums are
    compared, references are kept.
    """
    if model_ref is not None:
        refs.parse(model_ref)
    where = str(path if node else path.expanduser().absolute())
    narrator = Narrator(is_quiet=quiet)
    with terminable(), model_agent.serving_agent(node, narrator) as agent:
        result = _followed(agent.import_models(ImportBody(path=where, model_ref=model_ref)), narrator)
    if as_json:
        render.data(result)
    else:
        for record in result.imported:
            render.out(f"{record.model_id}  {record.model_ref}  {render.bytes_text(record.size_bytes)}")
        for refused in result.refused:
            render.note(f"left out: {refused.name}: {refused.code}: {refused.why}")
        for record in result.known:
            render.note(f"{record.model_ref} is here already")
    return Exit.ERROR if result.refused else Exit.OK


@click.command(
    "prune",
    epilog=options.examples(("arriero models prune 20G", "arriero models prune 500M --dry-run --json")),
)
@click.argument("size", type=SizeType())
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@model_agent.node_option
@options.json_option
def prune(*, size: int, dry_run: bool, node: str | None, as_json: bool) -> int:
    """Free SIZE of the disk by removing the models that were used least recently.

    Never one that is loaded, pinned, or not ours.  Exit code 1 if that did not suffice.
    """
    with model_agent.serving_agent(node, Narrator()) as agent:
        result = agent.prune_models(PruneBody(free_bytes=size, dry_run=dry_run))
    if as_json:
        render.data(result)
    else:
        for record in result.removed:
            verb = "would remove" if dry_run else "removed"
            render.out(f"{verb} {record.model_ref} ({render.bytes_text(record.size_bytes)})")
        verb = "would free" if dry_run else "freed"
        render.note(f"{verb} {render.bytes_text(result.freed_bytes)} of {render.bytes_text(size)}")
    return Exit.OK if result.freed_bytes >= size else Exit.ERROR


def _pin(wanted: tuple[str, ...], node: str | None, *, is_pinned: bool, as_json: bool) -> int:
    with model_agent.serving_agent(node, Narrator()) as agent:
        found = [model_agent.find(agent, name) for name in wanted]
        changed = [agent.pin_model(record.model_id, is_pinned=is_pinned) for record in found]
    if as_json:
        render.data({"models": changed})
    else:
        for record in changed:
            render.out(f"{'pinned' if is_pinned else 'unpinned'} {record.model_ref}")
    return Exit.OK


@click.command("pin", epilog=options.examples(("arriero models pin hf:org/repo:Q4_K_M",)))
@click.argument("wanted", nargs=-1, required=True, metavar="MODEL...")
@model_agent.node_option
@options.json_option
def pin(*, wanted: tuple[str, ...], node: str | None, as_json: bool) -> int:
    """Keep models from being pruned."""
    return _pin(wanted, node, is_pinned=True, as_json=as_json)


@click.command("unpin", epilog=options.examples(("arriero models unpin hf:org/repo:Q4_K_M",)))
@click.argument("wanted", nargs=-1, required=True, metavar="MODEL...")
@model_agent.node_option
@options.json_option
def unpin(*, wanted: tuple[str, ...], node: str | None, as_json: bool) -> int:
    """Let models be pruned again."""
    return _pin(wanted, node, is_pinned=False, as_json=as_json)


@click.command("backup", epilog=options.examples(("arriero models backup catalog.db",)))
@click.argument("file", type=click.Path(path_type=Path))
@model_agent.node_option
@options.json_option
def backup(*, file: Path, node: str | None, as_json: bool) -> int:
    """Write the catalog into FILE, checked; the models themselves stay where they are."""
    with model_agent.serving_agent(node, Narrator()) as agent:
        content = agent.backup_catalog()
        count = len(agent.models())
    try:
        _write_whole(file, content)
    except OSError as error:
        raise ArrieroError(
            ErrorCode.STATE_DIR_UNUSABLE, f"{file} cannot be written: {error.strerror}", file=str(file),
            suggested_action="Give a file in a folder that is there and may be written to.",
        ) from error  # fmt: skip
    if as_json:
        render.data({"file": str(file), "size_bytes": len(content), "models": count})
    else:
        counted = "1 model" if count == 1 else f"{count} models"
        render.out(f"{file}: {counted}, {render.bytes_text(len(content))}")
    return Exit.OK


@click.command("restore", epilog=options.examples(("arriero models restore catalog.db",)))
@click.argument("file", type=click.Path(path_type=Path))
@model_agent.node_option
@options.json_option
def restore(*, file: Path, node: str | None, as_json: bool) -> int:
    """Enter what a backup of the catalog names, as far as the files are there and are what it says.

    What the catalog has stays; a backup that is damaged changes nothing.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ArrieroError(
            ErrorCode.INVALID_MODEL_PATH, f"{file} cannot be read: {error.strerror}", file=str(file)
        ) from error
    with model_agent.serving_agent(node, Narrator()) as agent:
        result = agent.restore_catalog(content)
    if as_json:
        render.data(result)
    else:
        for record in result.restored:
            render.out(f"restored {record.model_ref}")
        for sentence in result.left_out:
            render.note(f"left out: {sentence}")
        if not result.restored and not result.left_out:
            render.note("the backup is of an empty catalog")
    return Exit.OK


def _followed(stream: CheckStream[T], narrator: Narrator) -> T:
    """Show how far work is that reads through files, and return what came of it."""
    try:
        with stream:
            for frame in stream:
                fraction = frame.bytes_read / frame.bytes_total if frame.bytes_total else None
                detail = render.progress_text(frame.bytes_read, frame.bytes_total, 0.0, None)
                narrator.advance("reading", fraction, f"{frame.what}: {detail}")
            return stream.result()
    finally:
        narrator.clear()


def _write_whole(file: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=file.parent or Path(), prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


COMMANDS: Final = (remove, verify, scan, import_, prune, pin, unpin, backup, restore)
