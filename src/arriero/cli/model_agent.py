"""Which agent is asked for its models, and which model does a person mean?"""

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path

from arriero.cli import options, pool
from arriero.cli.narrator import Narrator
from arriero.client import discovery
from arriero.client.api import Agent, Orchestrator
from arriero.client.connection import Limits
from arriero.contracts.errors import ArrieroError, ErrorCode, fail
from arriero.contracts.peers import reading_token
from arriero.contracts.records import ModelRecord
from arriero.contracts.requests import PeerSource
from arriero.runtime.state_dir import StateDir

node_option = options.node_option("A machine of the pool; default: this one, or the only one there is.")
_LIMITS = Limits(total_s=30.0, attempts=3)


@contextlib.contextmanager
def serving_agent(node: str | None, narrator: Narrator) -> Iterator[Agent]:
    """Hold the agent of a node to ask; where nothing runs here, a pool is started as for a prompt."""
    with pool.serving(is_ephemeral=False, narrator=narrator, timeout_s=None) as client:
        yield _agent(client, node)


def running_agent(node: str | None) -> Agent:
    """Return the agent of a node that runs already.  Raises NOT_RUNNING."""
    if node is None and discovery.given_orchestrator() is None:
        found = discovery.agent()
        return Agent(found.url, found.token, limits=_LIMITS)
    return _agent(options.orchestrator(), node)


def _agent(client: Orchestrator, node: str | None) -> Agent:
    """Return this machine's agent, spoken to directly, or another one through the orchestrator."""
    if node is None and discovery.given_orchestrator() is None:
        found = discovery.running_agent(discovery.state_of())
        if found is not None:
            return Agent(found.url, found.token, limits=_LIMITS)
    return client.node_agent(node or _only_node(client))


def _only_node(client: Orchestrator) -> str:
    names = [node.name for node in client.nodes()]
    if len(names) != 1:
        fail(
            ErrorCode.NODE_NOT_FOUND,
            f"which machine? --node is one of: {', '.join(names)}" if names else "the pool has no machine",
            nodes=names,
        )
    return names[0]


def peer_of(home: Path) -> PeerSource:
    """Return the agent that runs with another state folder on this machine, as a source of models.

    Raises NOT_RUNNING if none does, NODE_UNREACHABLE if it does not answer.
    """
    found = discovery.running_agent(StateDir(home.expanduser().absolute()))
    if found is None:
        raise ArrieroError(ErrorCode.NOT_RUNNING, f"no agent runs with the state folder {home}")
    name = Agent(found.url, found.token, limits=_LIMITS).health().name
    return PeerSource(url=found.url, token=reading_token(found.token), node=name)


def find(agent: Agent, wanted: str) -> ModelRecord:
    """Return the model with an id or a reference.  Raises MODEL_NOT_FOUND, with near names."""
    records = agent.models()
    for record in records:
        if wanted in (record.model_id, record.model_ref):
            return record
    near = difflib.get_close_matches(wanted, [record.model_ref for record in records], n=3, cutoff=0.5)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise ArrieroError(
        ErrorCode.MODEL_NOT_FOUND,
        f"this machine has no model {wanted[:200]!r}{hint}",
        model=wanted[:200],
        near=near,
    )
