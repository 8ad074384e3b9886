"""How is a machine that sleeps woken over the network?  (Wake-on-LAN)"""

import asyncio
import socket
from typing import Final

from arriero.contracts.errors import ArrieroError, ErrorCode

_SYNC: Final = b"\xff" * 6
_REPEATS: Final = 16
#: The packet is not acknowledged: sent so many times, so that one that is lost does not matter.
_TIMES: Final = 3


def magic_packet(mac: str) -> bytes:
    """Return the packet that wakes the machine with this hardware address (AMD, publication 20213).

    Raises INVALID_REQUEST if it is none.
    """
    digits = mac.replace(":", "").replace("-", "")
    try:
        address = bytes.fromhex(digits)
    except ValueError:
        address = b""
    if len(address) != 6:
        raise ArrieroError(ErrorCode.INVALID_REQUEST, f"{mac[:40]!r} is no hardware address", param="mac")
    return _SYNC + address * _REPEATS


def parse_target(text: str) -> tuple[str, int]:
    """Return host and port of `host:port`.  Raises INVALID_SETTINGS."""
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ArrieroError(ErrorCode.INVALID_SETTINGS, f"wake_address: {text[:80]!r} is no host:port")
    return host, int(port)


async def wake(mac: str, target: tuple[str, int]) -> None:
    """Send the packet, without waiting for anybody to wake.

    Raises INVALID_REQUEST for what is no hardware address, NODE_UNREACHABLE if the packet cannot be
    sent from here.
    """
    packet = magic_packet(mac)
    try:
        await asyncio.to_thread(_send, packet, target)
    except OSError as error:
        raise ArrieroError(
            ErrorCode.NODE_UNREACHABLE,
            f"the packet that wakes {mac} could not be sent to {target[0]}: {error.strerror or error}",
        ) from error


def _send(packet: bytes, target: tuple[str, int]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        for _ in range(_TIMES):
            sock.sendto(packet, target)
