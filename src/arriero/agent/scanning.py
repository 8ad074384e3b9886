"""Which models do other programs keep on this machine, and how do they come into the catalog?"""

import os
from collections.abc import Callable
from pathlib import Path

from arriero.agent import found
from arriero.agent.catalog import ModelCatalog
from arriero.agent.files import in_thread
from arriero.agent.found_files import Found
from arriero.agent.provisioner import ModelProvisioner
from arriero.contracts.errors import ArrieroError
from arriero.contracts.records import FoundList, FoundModel

#: Told what is being read, the bytes read so far and those there are in all.
Tell = Callable[[str, int, int], None]


async def scan(
    provisioner: ModelProvisioner, catalog: ModelCatalog, tell: Tell, *, is_dry_run: bool
) -> FoundList:
    """Look for models, and enter those that are new, each where it lies; one that fails is told with why.

    With `is_dry_run` nothing is read through or entered.
    """
    everything = await in_thread(lambda: found.scan(os.environ, Path.home()))
    known = {seen.model_ref for seen in everything if await catalog.get(seen.model_ref) is not None}
    new = [seen for seen in everything if seen.model_ref not in known]
    total_bytes = sum(seen.size_bytes for seen in new)
    before_bytes = 0
    shown = []
    for seen in everything:
        if seen.model_ref in known:
            shown.append(_shown(seen, "known"))
        elif is_dry_run:
            shown.append(_shown(seen, "new"))
        else:
            shown.append(await _enter(provisioner, seen, tell, before_bytes, total_bytes))
            before_bytes += seen.size_bytes
    return FoundList(shown)


async def _enter(
    provisioner: ModelProvisioner, seen: Found, tell: Tell, before_bytes: int, total_bytes: int
) -> FoundModel:
    ticket = provisioner.start_found(seen)
    frames = provisioner.frames(ticket.download_id)
    try:
        async for _, frame in frames:
            tell(seen.name, before_bytes + min(frame.bytes_downloaded, seen.size_bytes), total_bytes)
        await provisioner.wait(ticket.download_id)
    except ArrieroError as error:
        return _shown(seen, "refused", error)
    finally:
        # Whoever watches has gone: then the reading ends as well.
        await frames.aclose()
        await provisioner.cancel(ticket.download_id, ticket.holder)
    return _shown(seen, "entered")


def _shown(seen: Found, status: str, error: ArrieroError | None = None) -> FoundModel:
    return FoundModel(
        source=seen.source,
        name=seen.name,
        model_ref=seen.model_ref,
        size_bytes=seen.size_bytes,
        files=[path.name for path in seen.paths],
        status=status,
        code=str(error.code) if error is not None else None,
        why=error.message if error is not None else "",
    )
