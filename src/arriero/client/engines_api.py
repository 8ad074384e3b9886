"""What can be asked of an agent about the builds of its engine?"""

from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import quote

from arriero.client.caller import Caller
from arriero.client.models_api import CheckStream
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.records import EngineBuild, EngineList, UploadRecord
from arriero.contracts.requests import EngineInstallBody

#: One request each: small enough for every hop's limit, large enough that the hops do not count.
PIECE_BYTES: Final = 4 * 1024 * 1024
#: Loading a driver for the first time, or an index that answers late, may take a minute or two.
INSTALL_STALL_S: Final = 180.0
#: A piece that was lost on its way is asked after, and sent again.
_ATTEMPTS: Final = 3


class EngineCalls(Caller):
    """An agent's routes for the builds of its engine."""

    def engines(self, *, timeout_s: float | None = None) -> EngineList:
        """Return the builds there, and the one that suits the machine."""
        return self.call("GET", "/v1/engines", EngineList, timeout_s=timeout_s)

    def install_engine(
        self, body: EngineInstallBody, *, stall_s: float = INSTALL_STALL_S
    ) -> CheckStream[EngineBuild]:
        """Have a build installed, followed.  Closing it stops the installation, which leaves nothing."""
        stream = self.stream("POST", "/v1/engines/install", body=body, codes=self.codes, head_s=stall_s)
        return CheckStream(stream, EngineBuild, stall_s=stall_s, codes=self.codes)

    def upload_engine(self, wheel: Path, tell: Callable[[int, int], None]) -> str:
        """Send a wheel there, piece by piece, and return the name it has there.

        A piece that is lost is sent again; `sha256` in the installation's body says whether all is
        well.  Raises INVALID_REQUEST if the file cannot be read, and what the agent says of its name.
        """
        path = f"/v1/engines/uploads/{quote(wheel.name, safe='')}"
        try:
            with wheel.open("rb") as file:
                total = wheel.stat().st_size
                offset, failures = 0, 0
                while offset < total or offset == 0:
                    file.seek(offset)
                    piece = file.read(PIECE_BYTES)
                    try:
                        done = self.call("PUT", f"{path}?offset={offset}", UploadRecord, body=piece)
                        offset, failures = done.size_bytes, 0
                    except ArrieroError as error:
                        failures += 1
                        if not error.kind.is_retryable or failures >= _ATTEMPTS:
                            raise
                        offset = self.call("GET", path, UploadRecord).size_bytes
                    tell(offset, total)
                    if not piece:
                        break
        except OSError as error:
            raise ArrieroError(
                ErrorCode.INVALID_REQUEST, f"{wheel} cannot be read: {error.strerror}", file=str(wheel)
            ) from error
        return wheel.name
