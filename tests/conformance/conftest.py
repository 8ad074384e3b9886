"""On which event loop do the suites run?  Engines on uvloop, as in a worker."""

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Return uvloop for all: tests/integration has the real engine on asyncio's own."""
    return {"uvloop": uvloop.new_event_loop}
