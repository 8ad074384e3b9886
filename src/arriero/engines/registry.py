"""Which engines are there?  A row a kind, imported when it is asked for."""

import importlib
from typing import Final, cast

from arriero.contracts.errors import ErrorCode, fail
from arriero.engines.base import EngineKind

#: Name of the engine, its module and the class of its kind.
KINDS: Final[dict[str, tuple[str, str]]] = {
    "llamacpp": ("arriero.engines.llamacpp", "LlamaCpp"),
    "fake": ("arriero.engines.fake", "Fake"),
}


def names() -> list[str]:
    """Return the names of all kinds."""
    return sorted(KINDS)


def kind(name: str) -> EngineKind:
    """Return the kind of engine called `name`.  Raises BACKEND_UNAVAILABLE if there is none."""
    if name not in KINDS:
        fail(
            ErrorCode.BACKEND_UNAVAILABLE,
            f"there is no engine {name!r}; there are {', '.join(names())}",
            engine=name,
        )
    module, attribute = KINDS[name]
    return cast(EngineKind, getattr(importlib.import_module(module), attribute)())
