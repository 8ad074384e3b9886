"""What is a table of states, and how does it answer, refuse and draw itself?"""

import enum
from collections.abc import Mapping
from typing import Generic, TypeVar

from arriero.contracts.errors import ErrorCode, fail

S = TypeVar("S", bound=enum.StrEnum)


class StateTable(Generic[S]):
    """The arrows between the states of one kind of thing.

    Every state has a row; a state without arrows is final.
    """

    def __init__(self, name: str, arrows: Mapping[S, frozenset[S]], initial: S) -> None:
        self.name = name
        self.arrows = dict(arrows)
        self.initial = initial
        assert set(self.arrows) == set(type(initial)), f"{name}: every state has a row"
        self.final: frozenset[S] = frozenset(state for state, targets in self.arrows.items() if not targets)

    def check(self, before: S, after: S) -> None:
        """Raise INVALID_STATE_TRANSITION if no arrow leads from `before` to `after`."""
        if after not in self.arrows[before]:
            allowed = sorted(str(state) for state in self.arrows[before])
            fail(
                ErrorCode.INVALID_STATE_TRANSITION,
                f"a {self.name} cannot go from {before} to {after}; from there it can go to "
                f"{', '.join(allowed) or 'nowhere, the state is final'}",
                before=str(before),
                after=str(after),
                allowed=allowed,
            )

    def reachable(self, start: S) -> frozenset[S]:
        """Return every state that some way leads to from `start`, itself included."""
        seen = {start}
        todo = [start]
        while todo:
            for target in self.arrows[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        return frozenset(seen)

    def mermaid(self) -> str:
        """Return the diagram, the same text for the same table."""
        lines = [f"  [*] --> {self.initial}"]
        lines += sorted(f"  {a} --> {b}" for a, targets in self.arrows.items() for b in targets)
        lines += sorted(f"  {state} --> [*]" for state in self.final)
        return "\n".join(["stateDiagram-v2", *lines])
