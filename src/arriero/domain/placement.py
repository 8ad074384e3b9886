"""Which worker takes a request, and which node takes a new worker?

Split by question: what is asked for (`placement_wants`), workers (`placement_workers`), nodes
(`placement_nodes`), the memory that is needed (`placement_memory`), room that is made
(`placement_eviction`) and when (`placement_turns`), machines that are woken (`placement_wake`).
"""

from arriero.domain.placement_nodes import Candidate, NodeChoice, NodeView, candidates, choose_node
from arriero.domain.placement_wants import ModelFacts, Refusal, Wants, gib, labels_of
from arriero.domain.placement_workers import WorkerChoice, WorkerIndex, WorkerView, choose_worker

__all__ = [
    "Candidate",
    "ModelFacts",
    "NodeChoice",
    "NodeView",
    "Refusal",
    "Wants",
    "WorkerChoice",
    "WorkerIndex",
    "WorkerView",
    "candidates",
    "choose_node",
    "choose_worker",
    "gib",
    "labels_of",
]
