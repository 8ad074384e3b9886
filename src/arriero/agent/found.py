"""Which models do other programs keep on this machine, and is one of them what is about to be fetched?

Everything here blocks, for as long as it takes to list some folders: call it in a thread.  Nothing is
written, nothing outside the programs' folders is read, and what they say of a file's content is told
as it is: whoever uses a file hashes it first.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from arriero.agent import found_folders, found_hf, found_ollama
from arriero.agent.found_files import MODELS_MAX, Found
from arriero.contracts.refs import HfRef

#: Where a machine's own folders are; tests have another place.
SYSTEM: Final = Path("/")


def scan(env: Mapping[str, str], home: Path, system: Path = SYSTEM) -> list[Found]:
    """Return the models of all programs: whole ones alone, a model's projector with it."""
    return list(itertools.chain.from_iterable(_programs(env, home, system)))


def by_content(
    env: Mapping[str, str],
    home: Path,
    sha256s: Sequence[str],
    sizes: Sequence[int | None],
    system: Path = SYSTEM,
) -> Found | None:
    """Return a model of exactly these files, in this order; None if no program says it has them.

    A program that tells no checksums is believed by the sizes, where all are known: `sha256s` of the
    answer is None there.
    """
    wanted = list(zip(sha256s, sizes, strict=True))
    if not wanted:
        return None
    by_size: Found | None = None
    for model in itertools.chain.from_iterable(_programs(env, home, system)):
        there = list(zip(model.sha256s, model.sizes, strict=True))
        if all(any(_is_told(file, one) for one in there) for file in wanted):
            picks = [next(n for n, one in enumerate(there) if _is_told(file, one)) for file in wanted]
            return _picked(model, picks)
        if by_size is None and len(there) == len(wanted) and all(map(_is_likely, wanted, there)):
            by_size = model
    return by_size


def by_name(env: Mapping[str, str], home: Path, ref: HfRef) -> Found | None:
    """Return what the Hugging Face cache has for `ref`: for a machine that cannot ask the Hub."""
    return found_hf.by_name(env, home, ref)


def _programs(env: Mapping[str, str], home: Path, system: Path) -> Iterator[Iterator[Found]]:
    """Yield each program's models; those that tell checksums come first."""
    for models in (
        found_hf.scan(env, home),
        found_ollama.scan(env, home, system),
        found_folders.scan_llama_cpp(env, home),
        found_folders.scan_lm_studio(env, home),
    ):
        yield itertools.islice(models, MODELS_MAX)


def _is_told(wanted: tuple[str, int | None], there: tuple[str | None, int]) -> bool:
    return wanted[0] == there[0] and wanted[1] in (None, there[1])


def _is_likely(wanted: tuple[str, int | None], there: tuple[str | None, int]) -> bool:
    return wanted[1] == there[1] and there[0] in (None, wanted[0])


def _picked(model: Found, picks: Sequence[int]) -> Found:
    """Return a model of some of the files of another."""
    paths = tuple(model.paths[pick] for pick in picks)
    has_projector = bool(model.projector) and len(model.paths) - 1 in picks
    return Found(
        source=model.source,
        name=model.name,
        model_ref=model.model_ref,
        paths=paths,
        sizes=tuple(model.sizes[pick] for pick in picks),
        sha256s=tuple(model.sha256s[pick] for pick in picks),
        revision=model.revision,
        projector=model.projector if has_projector else "",
    )
