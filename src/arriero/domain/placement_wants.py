"""What does a request ask for, and how is it told why a candidate cannot give it?"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Final

from arriero.contracts.errors import ErrorCode

MIB_PER_GIB: Final = 1024


@dataclass(frozen=True, slots=True)
class Wants:
    """What a request asks for; None: anything."""

    model_ref: str
    node: str | None = None
    backend: str | None = None
    device: str | None = None
    #: Workers that this request was lost on already, and nodes that refused it.
    excluded: frozenset[str] = frozenset()
    #: Labels that the node must have, with their values, sorted.
    labels: tuple[tuple[str, str], ...] = ()
    #: Only nodes that have the model: nothing is fetched.
    on_disk: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one candidate was not taken.  `code` is what the person would be told if it were the only one."""

    candidate: str
    code: ErrorCode
    why: str


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of the model that is asked for, besides its size."""

    #: Nodes that have it on their disk.
    holders: Set[str] = frozenset()
    #: Whether a node that lacks it can fetch it from another one.
    has_neighbour: bool = False
    #: Whether every node has it without fetching (`demo`, `file:`).
    is_everywhere: bool = False
    #: Room that fetching it takes, in MiB; None: not known.
    disk_mb: int | None = None
    #: Tokens a second of each node with it, as measured.
    speeds: Mapping[str, float] = field(default_factory=dict)
    #: Requests that each node computes now.
    loads: Mapping[str, int] = field(default_factory=dict)

    def is_on(self, node: str) -> bool:
        """Whether a node has the model without fetching it."""
        return self.is_everywhere or node in self.holders


def labels_of(given: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return labels in the form that `Wants` has."""
    return tuple(sorted(given.items()))


def missing_labels(wanted: tuple[tuple[str, str], ...], has: Mapping[str, str]) -> str:
    """Return the labels that are asked for and not there, for people; empty: all are there."""
    return ", ".join(f"{name}={value}" for name, value in wanted if has.get(name) != value)


def gib(mib: int) -> str:
    """Return mebibytes as gibibytes with a digit that tells something."""
    value = mib / MIB_PER_GIB
    return f"{value:.1f}" if value >= 0.1 or mib == 0 else f"{value:.3f}"


def count(number: int, noun: str) -> str:
    """Return `1 slot`, `2 slots`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
