"""stub"""

from dataclasses import dataclass
from collections.abc import Sequence
from arriero.agent.fetch import RemoteFile
from arriero.contracts.requests import PeerSource
from arriero.runtime.http import Http


@dataclass(frozen=True, slots=True)
class PeerOffer:
    node: str
    files: Sequence[RemoteFile]
    revision: str = ""
    projector: str = ""


async def offers(
    peers: Sequence[PeerSource],
    model_ref: str | None,
    sha256s: Sequence[str],
    *,
    http: Http,
    timeout_s: float,
) -> list[PeerOffer]:
    return []
