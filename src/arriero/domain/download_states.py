"""Which way may a download go?"""

from typing import Final

from arriero.contracts.states import DownloadState as S
from arriero.domain.state_table import StateTable

_ENDS: Final = frozenset({S.FAILED, S.CANCELLED})

DOWNLOADS: Final = StateTable(
    "download",
    {
        S.QUEUED: frozenset({S.DOWNLOADING}) | _ENDS,
        S.DOWNLOADING: frozenset({S.VERIFYING}) | _ENDS,
        # Back to downloading: the checksum was wrong and the file is fetched once more.
        S.VERIFYING: frozenset({S.COMPLETE, S.DOWNLOADING}) | _ENDS,
        S.COMPLETE: frozenset(),
        S.FAILED: frozenset(),
        S.CANCELLED: frozenset(),
    },
    S.QUEUED,
)
