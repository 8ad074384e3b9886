"""What could stand where a shell completes?

Names of what is in the pool: quick, and nothing where nothing answers.
"""

from collections.abc import Callable, Iterable

import click

from arriero.client import discovery
from arriero.client.api import Orchestrator
from arriero.client.connection import Limits
from arriero.contracts.errors import ArrieroError

#: Somebody has pressed a key and waits.
ANSWER_S = 1.0
Completes = Callable[[click.Context, click.Parameter, str], list[str]]


def _from_pool(ask: Callable[[Orchestrator], Iterable[str]]) -> Completes:
    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
        try:
            address = discovery.orchestrator()
            client = Orchestrator(address.url, address.token, limits=Limits(total_s=ANSWER_S, attempts=1))
            return sorted({text for text in ask(client) if text.startswith(incomplete)})
        except ArrieroError:
            return []

    return complete


nodes = _from_pool(lambda pool: (node.name for node in pool.nodes()))
labels = _from_pool(
    lambda pool: (f"{key}={value}" for node in pool.nodes() for key, value in node.labels.items())
)
models = _from_pool(lambda pool: (model.id for model in pool.models()))
