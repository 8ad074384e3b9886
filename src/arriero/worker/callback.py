"""Does the agent know that this worker's HTTP server is up?"""

import asyncio
from typing import Final
from urllib.parse import urlsplit

import msgspec

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.requests import ReadyCallback, WorkerSpec
from arriero.domain import backoff
from arriero.runtime import logs
from arriero.runtime.clock import Clock
from arriero.runtime.entropy import Entropy
from arriero.worker.lease import Lease

_BASE_S: Final = 0.2
_CAP_S: Final = 2.0
_ATTEMPT_S: Final = 10.0


async def deliver(spec: WorkerSpec, url: str, lease: Lease, clock: Clock, entropy: Entropy) -> None:
    """Tell the agent where the worker is; try again until it has taken it.

    Ends early when an agent has shown that it knows the worker (one that adopted it has another
    address).  Raises WORKER_READY_TIMEOUT after `spec.ready_timeout_s`.
    """
    log = logs.get("arriero.worker")
    told = ReadyCallback(
        worker_id=spec.worker_id, url=url, model_ref=spec.model_ref, backend=spec.backend, device=spec.device
    )
    last = "no answer"
    try:
        async with asyncio.timeout(spec.ready_timeout_s):
            attempt = 0
            while not lease.is_known:
                attempt += 1
                try:
                    status = await _post(spec.callback_url, spec.callback_token, msgspec.json.encode(told))
                except (OSError, ValueError, EOFError) as error:
                    last = type(error).__name__
                else:
                    if 200 <= status < 300:
                        log.info("callback_delivered", attempt=attempt)
                        return
                    last = f"status {status}"
                log.warning("callback_failed", attempt=attempt, reason=last)
                await clock.sleep_s(0.05 + backoff.delay_s(attempt, entropy.chance(), _BASE_S, _CAP_S))
    except TimeoutError:
        raise ArrieroError(
            ErrorCode.WORKER_READY_TIMEOUT,
            f"the ready callback was not taken within {spec.ready_timeout_s:g} s ({last})",
            timeout_s=spec.ready_timeout_s,
        ) from None


async def _post(url: str, token: str, content: bytes) -> int:
    """Send one JSON body over a connection of its own and return the answer's status.

    By hand, since an HTTP library takes longer to import than a small model to load.  Raises
    OSError, ValueError or EOFError if nothing, or nothing like HTTP, answers within `_ATTEMPT_S`.
    """
    parts = urlsplit(url)
    async with asyncio.timeout(_ATTEMPT_S):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80, limit=65_536)
        try:
            head = (
                f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
                f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
            )
            writer.write(head.encode("ascii") + content)
            line = await reader.readuntil(b"\n")
            protocol, _, rest = line.partition(b" ")
            if not protocol.startswith(b"HTTP/1."):
                raise ValueError("no HTTP answer")
            return int(rest[:3])
        finally:
            writer.transport.abort()
