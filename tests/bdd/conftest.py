"""What holds for every scenario: a World of its own, and nothing left behind."""

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pytest_bdd.steps import StepNamePrefix

from arriero.testing.memory_limit import can_limit
from tests.bdd.world import World

STEP_MODULES = (
    "checks", "pools", "downloads", "loading", "tokens", "health", "states", "starting", "models",
    "deadlines", "exhaustion", "hub",
)  # fmt: skip

# pytest-bdd finds steps among a conftest's own names.
for _module in STEP_MODULES:
    _steps = vars(importlib.import_module(f"tests.bdd.steps.{_module}"))
    globals().update(
        {name: step for name, step in _steps.items() if name.startswith(StepNamePrefix.step_def.value)}
    )


@pytest.fixture
def world(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[World]:
    """The state of one scenario."""
    caplog.set_level(logging.INFO, "bdd")
    made = World()
    try:
        yield made
        made.check_nothing_unseen()
    finally:
        made.close()


def pytest_bdd_apply_tag(tag: str, function: Callable[..., Any]) -> bool | None:
    """Turn `@root` and `@memory` into what pytest knows."""
    if tag == "root":
        why = "needs root: a memory cgroup, a mount"
        pytest.mark.root(function)
        pytest.mark.skipif(os.geteuid() != 0, reason=why)(function)
        return True
    if tag == "memory":
        pytest.mark.skipif(not can_limit(), reason="no memory cgroup can be made here")(function)
        return True
    return None
